"""JSON that the verbs left in a folder, read back with one clear message where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError

Row = dict[str, Any]


def read_object(path: Path) -> Row:
    """The object in a JSON file. Raises UserError: no JSON, or none of an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); repair or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; repair or remove it")
    return found


def read_lines(path: Path) -> list[Row]:
    """The entries of a file of JSON lines. Raises UserError: a line is no JSON."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON lines ({error}); repair or remove it") from error
