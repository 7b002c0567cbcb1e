"""The model that a student was converted from, as its folder records it, and what that model's own card says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import expanded
from ..public import CACHED
from . import front_matter

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a student has from its teacher, and a card's reader must know.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Teacher:
    """`name` is for people: a Hub id, or the last part of a path. `hub_id` where it is known to be one; `sure` is off
    where that was read from a name alone. `revision` is what a person asked for, `commit` what that was then."""

    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    gguf_file: str | None = None
    folder: Path | None = None
    hash: str | None = None
    sure: bool = True


def teacher_of(chain: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Teacher:
    """The teacher, from the records of a folder, oldest first, or else from its config."""
    converted = next((entry for entry in chain if isinstance(entry.get("teacher"), dict)), None)
    if converted is not None:
        told = converted["teacher"]
        model, local = str(told.get("model") or ""), converted.get("parent_hash") is not None
        facts: dict[str, Any] = {name: told.get(name) for name in ("revision", "commit", "gguf_file")}
        facts["hash"] = converted.get("parent_hash")
    else:
        named = [entry["teacher"] for entry in chain if isinstance(entry.get("teacher"), str)]
        model = str((named or [config["parent_config"].get("_name_or_path")])[0] or "")
        local, facts = expanded(model).exists(), {"sure": False}
    if not model:
        return Teacher()
    if cached := CACHED.search(Path(model).as_posix() + "/"):
        return Teacher(**{**facts, **_named(f"{cached['owner']}/{cached['name']}", cached["commit"])})
    if not local and _HUB_ID.fullmatch(model) and not model.startswith("."):
        return Teacher(**{**facts, **_named(model, facts.get("revision"))})
    folder = expanded(model)
    name = folder.name if folder.name not in ("", ".", "..") else folder.resolve().name
    return Teacher(name=name, folder=folder if folder.is_dir() else None, **facts)


def _named(hub_id: str, revision: str | None) -> dict[str, Any]:
    return {"name": hub_id, "hub_id": hub_id, "revision": revision}


def inherited(card: str, teacher: Teacher) -> dict[str, Any]:
    """Licence and language from the text of the teacher's card, {} where it says neither."""
    try:
        fields, _ = front_matter.split(card)
    except ValueError:
        return {}
    found = {name: fields[name] for name in _INHERITED if _plain(fields.get(name))}
    link = found.get("license_link")
    if isinstance(link, str) and not link.startswith(("http://", "https://")):
        if teacher.hub_id is None:
            del found["license_link"]
        else:  # a file that lies beside the teacher's card
            at = f"https://huggingface.co/{teacher.hub_id}/blob/{teacher.commit or teacher.revision or 'main'}"
            found["license_link"] = f"{at}/{link.removeprefix('./')}"
    return found


def _plain(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (
        isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)
    )


def local_card(teacher: Teacher) -> str | None:
    """The teacher's card where it lies on this machine, in its folder or in the Hub's cache."""
    path: Any = None if teacher.folder is None else teacher.folder / "README.md"
    if teacher.hub_id is not None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(teacher.hub_id, "README.md", revision=teacher.commit or teacher.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")
