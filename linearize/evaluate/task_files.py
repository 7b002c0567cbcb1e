"""Tasks in local files: what a line must hold, and which kind of task it makes.

{"context": ..., "question": ..., "answers": [...]}   an answer is to be generated
{"context": ..., "choices": [...], "gold": 0}         the likeliest choice is to be the right one

A .yaml file is a task of lm-eval's own kind, which runs it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, UserError
from ..paths import expanded

SUFFIXES = (".jsonl", ".jsonl.gz")
_YAML = ".yaml"
ANSWERS, CHOICES, HARNESS = "answers", "choices", "lm-eval"


@dataclass(frozen=True)
class Task:
    """A task by name. `rows` are its items, none for one of lm-eval's, which may be its user's own `file`."""

    name: str
    kind: str
    rows: list[dict[str, Any]]
    file: Path | None = None


def read_tasks(specs: str | Sequence[str | Task], items: int) -> list[Task]:
    """The first `items` lines of each local file, and the names that are lm-eval's to know.

    Args:
        specs: as of `--tasks`: one text with commas, or several; a task that was read before stays as it is.

    Raises:
        UsageError: `items` out of range. UserError: a missing or damaged file, a line that is no item of either kind
            or not of the file's, two tasks of one name; a name that is no file, and lm-eval is not installed.
    """
    if items < 1:
        raise UsageError(f"--task-items must be at least 1, got {items}")
    if isinstance(specs, str):
        specs = [specs]
    tasks: list[Task] = []
    for spec in specs:
        if isinstance(spec, Task):
            tasks.append(spec)
        else:
            tasks += [_task(part.strip(), items) for part in spec.split(",") if part.strip()]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks: two tasks are named {name}; rename one of the files")
    return tasks


def _task(part: str, items: int) -> Task:
    file = expanded(part)
    if file.is_file():
        if part.endswith(_YAML):
            _need_harness(f"{part} is a task of lm-eval's, which needs")
            return Task(_yaml_name(file), HARNESS, [], file.resolve())
        if not part.endswith(SUFFIXES):
            raise UserError(f"--tasks: {part} is of an unknown kind; there are {', '.join((*SUFFIXES, _YAML))}")
        rows = _rows(file, items)
        return Task(file.name.removesuffix(".gz").removesuffix(".jsonl"), _kind(rows[0]) or "", rows)
    if file.is_dir() or part.endswith((*SUFFIXES, _YAML)) or part.startswith((".", "/", "~")):
        raise UserError(f"--tasks: there is no file {part}; check the path")
    _need_harness(f"{part} is no local file, and tasks of the Hub need")
    return Task(part, HARNESS, [])


def _need_harness(why: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks: {why}: pip install 'linearize[tasks]', or lm-eval")


class _Names(yaml.SafeLoader):
    """Reads what stands in a task's file; what lm-eval makes of its tags, such as !function, is nothing here."""


_Names.add_multi_constructor("!", lambda loader, suffix, node: None)


def _yaml_name(file: Path) -> str:
    """The name that a task's file, or that of a group, gives to it."""
    try:
        told = yaml.load(file.read_text(encoding="utf-8"), Loader=_Names)
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--tasks: {file} is no YAML that can be read: {' '.join(str(error).split())}") from error
    keys = told if isinstance(told, dict) else {}
    name = next((keys[key] for key in ("task", "group") if isinstance(keys.get(key), str)), None)
    if not name:
        raise UserError(f"--tasks: {file} names no task: lm-eval's files have a line such as task: {file.stem}")
    return name


def _rows(file: Path, items: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for number, row in _lines(file):
            where = f"--tasks: {file}:{number}"
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON object is needed on each line, not {type(row).__name__}")
            kind = _kind(row)
            if kind is None or (rows and kind != _kind(rows[0])):
                raise UserError(
                    f"{where} has the fields {', '.join(row) or 'none'}; an item has context, question and answers, "
                    "or context, choices and gold, the same on each line"
                )
            if not _sound(row, kind):
                raise UserError(
                    f"{where}: context and question are texts, answers and choices lists of texts, and gold is the "
                    "number of one of the choices, from 0"
                )
            rows.append(row)
            if len(rows) == items:
                break
    except UnicodeDecodeError as error:
        raise UserError(f"--tasks: {file} is not UTF-8 text: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"--tasks: {file} is truncated or no gzip file ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"--tasks: {file} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"--tasks: {file} is empty: it has no items")
    return rows


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"--tasks: {file}:{number}: not a JSON object ({error}); repair it") from error
                yield number, row


def _kind(row: dict[str, Any]) -> str | None:
    for kind, fields in ((ANSWERS, {"context", "question", "answers"}), (CHOICES, {"context", "choices", "gold"})):
        if fields <= set(row):
            return kind
    return None


def _sound(row: dict[str, Any], kind: str) -> bool:
    def texts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)

    if not isinstance(row["context"], str):
        return False
    if kind == ANSWERS:
        return isinstance(row["question"], str) and texts(row["answers"])
    gold = row["gold"]
    return texts(row["choices"]) and type(gold) is int and 0 <= gold < len(row["choices"])
