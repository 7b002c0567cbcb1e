"""The benchmarks' results as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..convert.show import size
from ..evaluate.table import format_table

Results = Mapping[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, without an exponent; a dash where there is no figure."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def kernels_table(results: Results) -> str:
    """A line a row of `bench kernels`, then decoding and cold starts where they were measured."""
    parts = []
    if results["rows"]:
        head = ("", "tokens", "forward ms", "+ backward ms", "GiB", "+ backward GiB", "of the floor", "+ backward")
        lines: list[tuple[str, ...]] = [head]
        for row in results["rows"]:
            lines.append(
                (
                    f"{row['op']} {row['provider']}",
                    str(row["tokens"]),
                    number(row["forward_ms"]),
                    number(row["forward_backward_ms"]),
                    number(row["forward_peak_gib"]),
                    number(row["forward_backward_peak_gib"]),
                    _share(row["forward_floor_ms"], row["forward_ms"]),
                    _share(row["forward_backward_floor_ms"], row["forward_backward_ms"]),
                )
            )
        parts.append(format_table(lines))
        shape = f"batch {results['batch']}, {results['heads']} heads ({results['kv_heads']} of keys) of "
        parts.append(
            f"{results['hardware']}, {results['dtype']}, {shape}{results['head_dim']}; copies at "
            f"{results['copy_gbps']:.0f} GB/s. Floor: every input and output moved once at that rate."
        )
    if results["decode"]:
        lines = [("one step of decoding", "batch", "ms", "GB/s", "of a copy's")]
        for row in results["decode"]:
            share = "-" if row["fraction_of_copy"] is None else f"{row['fraction_of_copy']:.0%}"
            lines.append((row["provider"], str(row["batch"]), number(row["ms"]), number(row["gbps"], 4), share))
        parts.append(format_table(lines))
    if results["cold_start"]:
        lines = [("cold start", "forward s", "+ backward s")]
        for row in results["cold_start"]:
            cells = (number(row.get("forward_s")), number(row.get("forward_backward_s")))
            lines.append((f"{row['op']} {row['provider']}", *cells))
        parts.append(format_table(lines))
    errors = [
        f"{row.get('op', 'decode')} {row['provider']} {row.get('tokens', '')}: {row['error']}"
        for name in ("rows", "decode", "cold_start")
        for row in results[name]
        if "error" in row
    ]
    return "\n\n".join([*parts, *(["\n".join(["no figure where:", *errors])] if errors else [])])


def _share(floor: float | None, taken: float | None) -> str:
    return "-" if floor is None or not taken else f"{floor / taken:.0%}"


def model_table(results: Results) -> str:
    """A line a model, batch and context of `bench model`, then from where on the student is ahead."""
    lines: list[tuple[str, ...]] = [
        ("", "batch", "context", "prefill tok/s", "GiB", "decode ms/token", "tok/s", "GiB", "state", "KV")
    ]
    for row in results["rows"]:
        lines.append(
            (
                row["model"],
                str(row["batch"]),
                str(row["context"]),
                number(row["prefill_tokens_per_second"]),
                number(row["prefill_peak_gib"]),
                number(row["decode_ms"]),
                number(row["decode_tokens_per_second"]),
                number(row["decode_peak_gib"]),
                _size(row["state_bytes"]),
                _size(row["kv_bytes"]),
            )
        )
    said = [f"{results['hardware']}, {results['dtype']}; {results['student']} against {results['teacher']}"]
    for row in results["overtakes"]:
        told = ", ".join(f"{what} {_where(row[key])}" for key, what in _AHEAD.items() if key in row)
        said.append(f"batch {row['batch']}, the student is ahead in: {told}")
    errors = [
        f"{row['model']} batch {row['batch']} context {row['context']}: {row['error']}"
        for row in results["rows"]
        if "error" in row
    ]
    if errors:
        said += ["no figure where:", *errors]
    return format_table(lines) + "\n\n" + "\n".join(said)


_AHEAD = {"decode": "decoding", "prefill": "prefill", "cache": "cache size"}


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)


def _where(tokens: float | None) -> str:
    return "never" if tokens is None else f"from {tokens:,.0f} tokens on"
