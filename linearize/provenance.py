"""`linearize.json`: where a folder comes from, told beside its weights."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import struct
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .json_files import read_object
from .paths import expanded
from .version import __version__

FILE = "linearize.json"
_BLOCK = 4096
_BLOCKS = 64
_PIECE = 64  # of each tensor


def record(
    *,
    command: str | Sequence[str],
    stage: str,
    parent: str | Path | None = None,
    parent_folder: Path | None = None,
    parent_revision: str | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """What made a folder, as plain data: command, stage, versions, UTC time, the parent and its hash, and
    `facts`.

    `parent` is the folder or the .gguf file that the work started from, or a Hub id, whose files lie in
    `parent_folder` (without one it has no hash), at the commit `parent_revision`. What the parent's own
    `linearize.json` says goes into `history`, oldest first, so the last folder tells the whole way.
    """
    made: dict[str, Any] = {
        "stage": stage,
        "command": command if isinstance(command, str) else shlex.join(command),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        **facts,
    }
    if parent is not None:
        path = expanded(parent) if parent_folder is None else parent_folder
        made["parent"] = str(parent)
        made |= {} if parent_revision is None else {"parent_revision": parent_revision}
        made["parent_hash"] = parent_hash(path) if path.exists() else None
        before = read(path) if path.is_dir() else None
        if before is not None:
            earlier = before.pop("history", [])
            made["history"] = [*earlier, before]
    return made


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "linearize": __version__}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # convert and eval do without peft
            found[name] = "unknown"
    return found


def hardware(device: str | torch.device) -> str:
    """What a figure was measured on: the accelerator's name, or the kind of CPU and the threads in use."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def write(folder: str | Path, record: dict[str, Any]) -> None:
    """Writes `record` (plain data) to `folder`'s linearize.json."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    (Path(folder) / FILE).write_text(text, encoding="utf-8")


def read(folder: str | Path) -> dict[str, Any] | None:
    """The record of `folder`, None where there is none. Raises UserError for one that is no JSON object."""
    path = Path(folder) / FILE
    return read_object(path) if path.is_file() else None


def parent_hash(path: str | Path) -> str:
    """sha256 that tells one checkpoint from another in milliseconds: not a checksum of every byte.

    Over config.json and, for each safetensors file, its name, size, header, 64 blocks of 4 KiB spread over it
    (headers alone are the same before and after training) and the beginning and middle of every tensor (a stage may
    train the small ones alone). A .gguf file: size and blocks.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_file():
        _add_sample(digest, path)
        return digest.hexdigest()
    for name in ("config.json", "adapter_config.json"):
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    for shard in sorted(path.glob("*.safetensors")):
        digest.update(f"{shard.name}\0".encode())
        with shard.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) == 8:
                header = file.read(min(struct.unpack("<Q", prefix)[0], 100 << 20))
                digest.update(header)
                size = shard.stat().st_size
                for start in _places(header, size):
                    file.seek(8 + len(header) + start)
                    digest.update(file.read(_PIECE))
        _add_sample(digest, shard)
    return digest.hexdigest()


def warn_of_another_teacher(student: Any, teacher: Any) -> None:
    """A UserWarning where both are on this disk, and the teacher's files are not those that the student's conversion
    recorded: the same shapes, and perhaps other weights. Nothing for models in memory or on the Hub."""
    names = [each if isinstance(each, str | Path) else getattr(each, "label", None) for each in (student, teacher)]
    if not all(isinstance(name, str | Path) for name in names):
        return
    folder, path = (expanded(str(name)) for name in names)
    if file := getattr(teacher, "gguf_file", None):
        path = path / file
    first: dict[str, Any] = {}
    try:
        record = (read(folder) if folder.is_dir() else None) or {}
        whole = [*record.get("history", []), record]
        first = next((entry for entry in whole if entry.get("stage") == "convert"), first)
        other = first.get("parent_hash") and path.exists() and parent_hash(path) != first["parent_hash"]
    except (UserError, OSError, TypeError, AttributeError):  # who needs the damaged file says so
        return
    if other:
        warnings.warn(
            f"{path} is not the checkpoint that {folder} was converted from ({first.get('parent')}): if it is no other "
            "form of the same model, the student is held against another teacher",
            stacklevel=3,
        )


def _places(header: bytes, size: int) -> list[int]:
    """Where in the data of a safetensors file every tensor begins, and its middle; none for a header that is broken."""
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        places = {place for start, end in spans for place in (int(start), (int(start) + int(end)) // 2)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return sorted(place for place in places if 0 <= place < size)


def _add_sample(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{size}\0".encode())
    with path.open("rb") as file:
        for block in range(_BLOCKS):
            file.seek(max(size - _BLOCK, 0) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
