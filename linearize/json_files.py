"""JSON files read with one clear message where they are damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, one_line

Row = dict[str, Any]


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for every text that is none, nested too deeply, or holds half of a
    surrogate pair, which no file could be written with."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def read_object(path: Path, advice: str = "repair or remove it") -> Row:
    """The object in a JSON file. Raises UserError, with the `advice`: no plain file, no JSON, or none of an object."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no plain file")
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; {advice}")
    return found


def read_lines(path: Path) -> list[Row]:
    """The objects of a file of JSON lines. Raises UserError: a line is none."""
    try:
        found = [parse(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON lines ({error}); repair or remove it") from error
    if not all(isinstance(line, dict) for line in found):
        raise UserError(f"{path} has a line that is no JSON object; repair or remove it")
    return found


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """One message where a JSON of `folder` is valid, and has other kinds of values than the verbs write."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: a JSON file there (config.json, linearize.json, a record or a result) holds what linearize "
            f"does not write ({type(error).__name__}: {one_line(error, 200)}); make the folder again, or "
            "take that result out; LINEARIZE_DEBUG=1 shows where"
        ) from error
