"""Tables, numbers and others' names in a card's Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first row is its head; None is a dash."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return "-" if value is None else plain(str(value)).replace("|", "\\|")


def plain(text: str | None) -> str:
    """Of a name that someone else chose: one line, and no HTML."""
    return " ".join((text or "").split()).replace("<", "&lt;")


def number(value: Any) -> str:
    """Four digits of a measured figure, all of a count, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def duration(seconds: Any) -> str:
    """Seconds as a person says them: 42 s, 7.5 min, 3.2 h."""
    if not isinstance(seconds, int | float):
        return "not recorded"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def picture(name: str, caption: str) -> str:
    """The picture `name` of the repository above its caption."""
    return f"![{caption}]({name})\n\n{caption}"
