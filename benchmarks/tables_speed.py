"""The tables of time and memory: operations, decoding, a student over length."""

from __future__ import annotations

from typing import Any

from wording import figure, installed, size, spaced


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
                size(row["cache_bytes"]),
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
    lines += [
        "",
        "Milliseconds forward / forward and backward at each length in tokens, and peak GiB above the inputs likewise. "
        f"Floor: every input and output moved once at a copy's measured {data['copy_gbps'] / 1000:.2f} TB/s. `fla`: "
        "flash-linear-attention; a dash where it refuses, as its backward pass does on Hopper with this Triton (3.4 to "
        f"3.7.0), or where memory ended. {kernels_source(data)}",
    ]
    return lines


def beside_table(data: dict[str, Any]) -> list[str]:
    """Each operation beside its fastest peer, at one length."""
    length = 32768
    timed = [row for row in data["rows"] if row["tokens"] == length and row["op"] != "window"]
    softmax = min(row["forward_backward_ms"] for row in timed if row["op"] == "softmax")
    lines = [
        f"| {spaced(length)} tokens, ms | linearize | the fastest other | softmax |",
        "|---|---|---|---|",
    ]
    for row in timed:
        if row["provider"] != "linearize":
            continue
        others = [other for other in timed if other["op"] == row["op"] and other["provider"] != "linearize"]
        best = [fastest(others, f"{part}_ms") for part in ("forward", "forward_backward")]
        told = " / ".join(figure(ms) for ms, _ in best)
        who = " / ".join(dict.fromkeys(provider for _, provider in best if provider))
        lines.append(f"| `{row['op']}` | **{pair(row, 'ms')}** | {told} ({who}) | {figure(softmax)} |")
    return [
        *lines,
        "",
        "Milliseconds forward / forward and backward; softmax: cuDNN's, forward and backward. `fla`: "
        f"flash-linear-attention, whose backward pass refuses `gated_delta` with this Triton. {kernels_source(data)}",
    ]


def fastest(rows: list[dict[str, Any]], name: str) -> tuple[float | None, str]:
    """The least figure of this name and whose it is."""
    return min(((row[name], row["provider"]) for row in rows if row[name] is not None), default=(None, ""))


def kernels_source(data: dict[str, Any]) -> str:
    heads = f"{data['heads']} heads of {data['head_dim']} (`based`: queries and keys of 16)"
    return (
        f"One {data['hardware']}, {data['dtype']}, batch {data['batch']}, {heads}. {installed(data, *data['rows'])}; "
        "[JSON](benchmarks/results/kernels-h200.json), made by `linearize bench kernels`."
    )


def pair(row: dict[str, Any] | None, ending: str) -> str:
    """A row's figure forward / forward and backward; a dash for one that was refused or did not fit."""
    if row is None or (row[f"forward_{ending}"] is None and row[f"forward_backward_{ending}"] is None):
        return "-"
    return " / ".join(figure(row[f"{part}_{ending}"]) for part in ("forward", "forward_backward"))


def model_table(data: dict[str, Any]) -> list[str]:
    timed = any(row["prefill_tokens_per_second"] is not None for row in data["rows"])
    each = ("prefill tok/s | " if timed else "") + "ms a token"
    lines = [
        f"| batch | context | teacher: {each} | KV | student: {each} | state + KV |",
        "|---" * (8 if timed else 6) + "|",
    ]
    by_key = {(row["batch"], row["context"], row["model"]): row for row in data["rows"]}
    places = list(dict.fromkeys((row["batch"], row["context"]) for row in data["rows"]))
    for batch, context in places:
        cells: list[str] = []
        for role in ("teacher", "student"):
            row = by_key.get((batch, context, role))
            if row is None:
                cells += ["-"] * (3 if timed else 2)
                continue
            if timed:
                speed = row["prefill_tokens_per_second"]
                cells.append("-" if speed is None else spaced(speed))
            held = None if row["kv_bytes"] is None else row["state_bytes"] + row["kv_bytes"]
            cells += [figure(row["decode_ms"]), "-" if held is None else size(held)]
        lines.append(f"| {batch} | {spaced(context)} | " + " | ".join(cells) + " |")
    compiled = any("compiled" in (row["decoder"] or "") for row in data["rows"])
    lines += [
        "",
        f"Student: {data['student']}; teacher: {data['teacher']}"
        f"{', each decoding compiled or not, whichever is faster' if compiled else ''}. {data['dtype']}, one "
        f"{data['hardware']}, {installed(data, *data['rows'])}; [JSON](benchmarks/results/model-h200.json), made by "
        "`linearize bench model`.",
    ]
    return lines
