"""Evaluation results side by side as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..convert.show import size
from .variants import LINEAR_OFF, STUDENT, TEACHER, WINDOW_ALONE, WINDOW_OFF

COLUMNS = ("perplexity", "ratio", "KL", "recall 1st", "recall 2nd")
LABELS = {
    LINEAR_OFF: "{}, linear branch off",
    WINDOW_OFF: "{}, window off",
    WINDOW_ALONE: "{}, window alone untrained",
}
# Costs this near to a group's smallest count as equal.
EQUAL = 0.05
_BEST = "*"

Result = Mapping[str, Any]


def format_results(results: Mapping[str, Result], *, equal_bytes: bool = False) -> str:
    """A table of students, one line for each name and result of `evaluate`, with their teacher (of the first
    result) above them and, where there are such, the student's variants below it.

    With `equal_bytes` the students stand in the order of what a sequence of the evaluated context holds, and in each
    group of equal bytes the lowest KL and recall loss have a star.
    """
    first = next(iter(results.values()))
    extras = _extras(results)
    groups = equal_groups(results) if equal_bytes else [list(results)]
    head = ["", *COLUMNS, *(["KV a token", "state"] if _costed(first) else []), *(["bytes"] if equal_bytes else [])]
    rows: list[list[str]] = [[*head, *extras]]

    def line(name: str, result: Result, role: str, costs: Result | None, stars: Mapping[str, bool]) -> None:
        cells = {
            column: _number(value) + (_BEST if stars.get(column) else "")
            for column, value in figures(result, role).items()
        }
        if _costed(first):
            cells |= {
                "KV a token": _size(None if costs is None else costs.get("kv_bytes_per_token")),
                "state": _size(None if costs is None else costs.get("state_bytes")),
            }
        if equal_bytes:
            cells["bytes"] = _size(None if costs is None else held_bytes(costs))
        whole = {name: _number(column[role]) for name, column in _columns(result).items()} if costs else {}
        rows.append([name, *cells.values(), *(whole.get(name, "-") for name in extras)])

    if first["perplexity"]["teacher"] is not None:
        line("teacher", first, TEACHER, teacher_costs(results), {})
    for group in groups:
        best = _best({name: results[name] for name in group}) if equal_bytes else {}
        for name in group:
            result = results[name]
            stars = {column: best.get(column) == name for column in ("KL", "recall 2nd")}
            line(name, result, STUDENT, result, stars)
            for variant, label in LABELS.items():
                if result.get(variant) is not None:
                    line(label.format(name), result[variant], STUDENT, None, {})
    return "\n".join([format_table(rows), *_skipped(results)])


def _skipped(results: Mapping[str, Result]) -> list[str]:
    """What was asked for and is no column: a length of retrieval that no student was made for."""
    told = {
        entry["context"]: entry["skipped"]
        for result in results.values()
        for entry in result.get("retrieval") or ()
        if entry.get("skipped")
    }
    shown = _extras(results)
    return [f"kv@{context}: none, {why}" for context, why in told.items() if f"kv@{context}" not in shown]


def figures(result: Result, role: str = STUDENT) -> dict[str, float | None]:
    """The figures of one line by COLUMNS, of the student or of the teacher."""
    own = role == STUDENT
    values = (
        result["perplexity"][role],
        result["perplexity"]["ratio"] if own else 1.0,
        result["kl"] if own else 0.0,
        result["recall"]["first_copy"][role],
        result["recall"][role],
    )
    return dict(zip(COLUMNS, values, strict=True))


def held_bytes(result: Result) -> int | None:
    """Bytes that a sequence of the evaluated context holds: its state, and its keys and values."""
    state, kv = result.get("state_bytes"), result.get("kv_bytes_per_token")
    return None if state is None or kv is None else state + kv * result["context"]


def equal_groups(results: Mapping[str, Result]) -> list[list[str]]:
    """Names by the bytes that their students hold, smallest first, in groups of equal bytes (5 % and less apart from
    the group's smallest); those of unknown bytes last."""
    known = {name: held for name, result in results.items() if (held := held_bytes(result)) is not None}
    groups: list[list[str]] = []
    for name in sorted(known, key=lambda name: known[name]):
        if groups and known[name] <= known[groups[-1][0]] * (1 + EQUAL):
            groups[-1].append(name)
        else:
            groups.append([name])
    unknown = [name for name in results if name not in known]
    return groups + ([unknown] if unknown else [])


def teacher_costs(results: Mapping[str, Result]) -> dict[str, Any]:
    """What the teacher holds, from the first student whose share of it is known."""
    for result in results.values():
        if result.get("kv_bytes_per_token_teacher") is not None:
            kv = result["kv_bytes_per_token_teacher"]
            state = result.get("state_bytes_teacher") or 0
            return {"kv_bytes_per_token": kv, "kv_share": 1.0, "state_bytes": state, "context": result["context"]}
    return {"kv_bytes_per_token": None, "kv_share": None, "state_bytes": None, "context": 0}


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


def _costed(result: Result) -> bool:
    return result.get("state_bytes") is not None


def _best(group: Mapping[str, Result]) -> dict[str, str]:
    """Who has the lowest KL and recall loss, where two or more are compared."""
    best: dict[str, str] = {}
    for column in ("KL", "recall 2nd"):
        values = {name: value for name, result in group.items() if (value := figures(result)[column]) is not None}
        if len(values) > 1:
            best[column] = min(values, key=lambda name: values[name])
    return best


def _extras(results: Mapping[str, Result]) -> list[str]:
    """Heads of the columns for what was asked for beyond perplexity and recall, in the order met."""
    return list(dict.fromkeys(name for result in results.values() for name in _columns(result)))


def _columns(result: Result) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for entry in result.get("retrieval") or ():
        if entry["items"]:
            found[f"kv@{entry['context']}"] = {role: entry[role] for role in (STUDENT, TEACHER)}
    if result.get("agreement") is not None:
        found["agreement"] = {STUDENT: result["agreement"]["same_prefix"], TEACHER: 1.0}
    for name, task in (result.get("tasks") or {}).items():
        found[name] = {role: task[role] for role in (STUDENT, TEACHER)}
    return found


def _size(value: int | None) -> str:
    return "-" if value is None else size(value)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
