"""Writes README.md's tables from the JSON files under benchmarks/results: `python benchmarks/tables.py [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ("linear", "based", "mamba2", "retention", "gla", "gated_delta")


def transfer_table(data: dict[str, Any]) -> list[str]:
    rows = sorted(data["rows"], key=lambda row: (row["variant"] != "default", ORDER.index(row["mixer"])))
    off = rows[0]["start"]["linear_off"]
    lines = [
        "| student | training tokens | perplexity / teacher's | KL, nats a token | recall loss |",
        "|---|---|---|---|---|",
        f"| the teacher | | 1 | 0 | {rows[0]['recall_teacher']:.2f} |",
        f"| window and sink alone | 0 | {off['ppl_ratio']:.2f} | {off['kl']:.3f} | {off['recall']:.2f} |",
    ]
    for row in rows:
        name = f"`{row['mixer']}`" + ("" if row["variant"] == "default" else f", {row['variant']}")
        tokens = f"{row['tokens'] / 1e6:.1f}M"
        lines.append(f"| {name} | {tokens} | {row['ppl_ratio']:.2f} | {row['kl']:.3f} | {row['recall']:.2f} |")
    evaluated = " and ".join(name.removesuffix(".jsonl.gz") for name in data["eval"])
    lines += [
        "",
        f"Measured on {evaluated}, 32 x 1024 tokens each, on one {rows[0]['hardware']}; "
        "[JSON](benchmarks/results/transfer-smollm2.json), [script](benchmarks/transfer.py).",
    ]
    return lines


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
    """A line a student, the best of its learning rates: ours, then the published recipes, by KL."""
    best: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        if "error" in row:
            continue
        told = {name: value for name, value in row["settings"].items() if not name.endswith(".learning_rate")}
        name = json.dumps([row["recipe"], told, row["tokens"]], sort_keys=True)
        if name not in best or row["kl"] < best[name]["kl"]:
            best[name] = row
    rows = sorted(best.values(), key=lambda row: (row["recipe"] != "default", row["kl"]))
    contexts = [str(found["context"]) for found in rows[0]["retrieval"]]
    with_answers = any("squad_dev" in row.get("tasks", {}) for row in rows)
    lines = [
        "| student | KV bytes | state | tokens | perplexity / teacher's | KL | recall loss | "
        f"retrieval at {', '.join(contexts)} |" + (" answers |" if with_answers else ""),
        "|---" * (8 + with_answers) + "|",
    ]
    first = rows[0]
    lines.append(
        f"| the teacher | 100% | | | 1 | 0 | {first['recall_teacher']:.2f} | {shares(first, 'teacher')} |"
        + (f" {first['tasks']['squad_dev']['teacher']:.2f} |" if with_answers else "")
    )
    for row in rows:
        cells = [
            student_name(row),
            f"{row['kv_share']:.0%}",
            f"{row['state_bytes'] / 2**20:.1f} MiB",
            f"{row['tokens'] / 1e6:.1f}M",
            f"{row['ppl_ratio']:.3f}",
            f"{row['kl']:.3f}",
            f"{row['recall']:.2f}",
            shares(row, "student"),
        ]
        if with_answers:
            found = row.get("tasks", {}).get("squad_dev")
            cells.append("-" if found is None else f"{found['student']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Each student the best of its learning rates. {installed(data)}, one {data['hardware']}; "
        "[JSON](benchmarks/results/quality-smollm2.json), [script](benchmarks/quality.py).",
    ]
    return lines


def student_name(row: dict[str, Any]) -> str:
    """Mixer, window and what is kept, and the recipe where it is not ours."""
    parts = [f"`{row['mixer']}`", f"window {row['window']}" if row["window"] else "no window"]
    if row["settings"].get("stages.logits.linear_branch") is False:
        parts = [f"window {row['window']} alone"]
    if row["keep_softmax"]:
        parts.append(f"`{row['keep_softmax']}`" + (f" of {row['keep_window']} keys" if row.get("keep_window") else ""))
    return ("" if row["recipe"] == "default" else f"{row['recipe']}: ") + ", ".join(parts)


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
        ahead.append(f"batch {row['batch']} {', '.join(told)}")
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
    "keep": (keep_table, "keep-scores-smollm2.json"),
    "transfer": (transfer_table, "transfer-smollm2.json"),
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
