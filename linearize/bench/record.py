"""The JSON of a benchmark: where, when, with what and by which command, and rows that can be merged run by run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, UserError
from ..paths import expanded
from ..provenance import hardware
from ..provenance import versions as package_versions

Row = dict[str, Any]
_PEERS = ("triton", "flash-linear-attention", "fla-core", "mamba_ssm")


def versions() -> dict[str, str]:
    """Versions of what the timings depend on."""
    found = package_versions()
    for name in _PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str | None:
    """The commit that runs, "-dirty" with changes; LINEARIZE_COMMIT where the code was copied without its history."""
    if given := os.environ.get("LINEARIZE_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    # An installed copy may lie inside someone else's repository: only a checkout that tracks this file counts.
    if head is None or git("ls-files", "--error-unmatch", str(here / "__init__.py")) is None:
        return None
    return f"{head}-dirty" if git("status", "--porcelain", "--", str(here.parent)) else head


def header(command: str | Sequence[str], device: str) -> Row:
    return {
        "command": command if isinstance(command, str) else shlex.join(command),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
    }


def folder(out: str | Path, name: str, *, merge: bool = False, hint: str = "") -> Path:
    """`out` as a folder that is there, to hold `name`.

    Raises:
        UsageError: `out` is a file, or it has a `name` already and `merge` is off; `hint` says what else would do.
        UserError: no permission.
    """
    path = expanded(out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"-o/--out: {path} is a file; the results are a folder")
    if (path / name).exists() and not merge:
        raise UsageError(f"-o/--out: {path / name} exists; choose another folder{hint}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-o/--out: cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"-o/--out: no permission to write in {path}; choose another folder")
    return path


def read(path: Path) -> Row:
    """The results in `path`. Raises UserError where it is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as results ({error}); remove it or choose another folder") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise UserError(f"{path} holds no results of this benchmark; remove it or choose another folder")
    return found


def check_same(path: Path, old: Row, new: Row, names: Sequence[str]) -> None:
    """Raises UsageError where `old`, what `path` holds, and `new` differ in one of the facts `names`: no rows of the
    two belong together."""
    for name in names:
        if old.get(name) != new[name]:
            raise UsageError(
                f"--merge: {path} was measured with {name} {old.get(name)}, this run with {new[name]}; choose another "
                "folder"
            )


def merged(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """`old` with the rows that agree in the fields `key` replaced by `new`'s, and the others of `new` after them."""
    return list({tuple(row.get(name) for name in key): row for row in (*old, *new)}.values())


def write(path: Path, results: Row) -> None:
    """Writes the results, a row a line, whole or not at all."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
