"""Evaluation results side by side as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("perplexity", "ratio", "KL", "recall 1st", "recall 2nd")


def format_results(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of students, one line for each name and result of `evaluate`, with their teacher (of the first
    result) above them and, where there is one, the student with its linear branch off below it."""
    rows: list[tuple[str, dict[str, float | None]]] = []
    for name, result in results.items():
        if not rows and result["perplexity"]["teacher"] is not None:
            rows.append(("teacher", figures(result, "teacher")))
        rows.append((name, figures(result)))
        if result.get("linear_off") is not None:
            rows.append((f"{name}, linear branch off", figures(result["linear_off"])))
    return format_table([("", *COLUMNS), *((name, *map(_number, cells.values())) for name, cells in rows)])


def figures(result: Mapping[str, Any], role: str = "student") -> dict[str, float | None]:
    """The figures of one line by COLUMNS, of the student or of the teacher."""
    own = role == "student"
    values = (
        result["perplexity"][role],
        result["perplexity"]["ratio"] if own else 1.0,
        result["kl"] if own else 0.0,
        result["recall"]["first_copy"][role],
        result["recall"][role],
    )
    return dict(zip(COLUMNS, values, strict=True))


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first line being the head: names to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def laid(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([laid(lines[0]), rule, *map(laid, lines[1:])])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
