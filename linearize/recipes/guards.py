"""What is checked where one stage hands over to the next: architecture, weights, teacher, options, and the first KL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .. import provenance
from ..errors import UserError
from ..json_files import read_object
from ..paths import expanded
from ..source import ModelSource

# Of a config.json: what says how the model was loaded or saved, not what it is. peft sets pretraining_tp.
_PASSING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map", "pretraining_tp")
# Of a stage's options: what a stage that is done may differ in.
_FREE = ("save_steps", "log_steps", "compile", "cuda_graph")
MORE_THAN_LAST, MORE_THAN_START, SMALL = 3.0, 2.0, 0.05  # the last: nats


def architecture(folder: Path) -> str:
    """sha256 of a folder's config.json without what passes: mixers, kept heads, anatomy, the teacher's config."""

    def lasting(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lasting(entry) for key, entry in value.items() if key not in _PASSING}
        return value

    config = read_object(folder / "config.json", "the folder is not whole: make it again")
    return hashlib.sha256(json.dumps(lasting(config), sort_keys=True).encode()).hexdigest()


def identity(source: ModelSource) -> dict[str, Any]:
    """What tells this teacher from another: how it is called and, where it is a local folder or file, its hash."""
    path = expanded(source.model)
    if source.gguf_file is not None and path.is_dir():
        path = path / source.gguf_file
    return {**source.describe(), "hash": provenance.parent_hash(path) if path.exists() else None}


def _same_teacher(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if before.get("hash") and now.get("hash"):
        return before["hash"] == now["hash"]
    return dict(before) == dict(now)


def check_there(folders: Sequence[Path], ended: Collection[str], done: int) -> None:
    """Raises UserError where a stage that had ended, or that a begun one goes on from, is not among the first `done` of
    `folders`: what comes next would be made from something else. The last has become OUT, which may be removed."""
    for folder, later in list(pairwise(folders))[done:]:
        if folder.name in ended or later.with_name(f"{later.name}.work").is_dir():
            raise UserError(_missing(folder))


def _missing(folder: Path) -> str:
    return f"the folder of a stage is missing: {folder}. Put it back, or pass --overwrite to start anew"


def check_handover(
    folders: Sequence[Path],
    specs: Sequence[Mapping[str, Any]],
    teacher: Mapping[str, Any],
    hashes: Mapping[str, str],
    done: int,
) -> None:
    """Raises UserError unless the first `done` of `folders` are what the stages of this very run left.

    `specs` are the conversion's and the stages' settled keys; `hashes` maps folder names to `provenance.parent_hash` of
    what was left there.
    """
    start: dict[str, Any] = {}
    before = ""
    for folder, spec in list(zip(folders, specs, strict=True))[:done]:
        if not folder.is_dir():
            raise UserError(_missing(folder))
        record = provenance.read(folder) or {}
        told = record.get("recipe")
        if not isinstance(told, dict):
            raise UserError(f"{folder} was not left by a recipe (its {provenance.FILE} names none): move it away")
        start = start or record
        _check_spec(folder, told.get("spec", {}), json.loads(json.dumps(spec)))
        if not _same_teacher(told.get("teacher", {}), teacher):
            raise UserError(
                f"{folder} was made from another teacher ({told.get('teacher', {}).get('model')}, another hash or "
                f"revision) than {teacher.get('model')}: give the same MODEL, or another -o"
            )
        if not architecture(folder) == record.get("architecture") == start.get("architecture"):
            raise UserError(f"{folder} is of another architecture (config.json) than the stage before it left")
        now = provenance.parent_hash(folder)
        if hashes.get(folder.name, now) != now:
            raise UserError(f"{folder} has been changed since its stage ended: put it back, or start anew")
        if before and record.get("parent_hash") != before:
            raise UserError(f"{folder} was trained from other weights than lie in the folder before it")
        before = now


def _check_spec(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if key not in _FREE and before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} was made by other keys: {'; '.join(changed)}. Resume with the same recipe and --set (stages "
            "that are not done yet may change), or pass --overwrite to start anew"
        )


@torch.no_grad()
def kl_of(student: Any, teacher: Any, rows: Any) -> float:
    """KL(teacher || student) in nats a token, a mean over the packed `rows`."""
    from ..distill.losses import count_targets, head_losses, head_of

    total, count = 0.0, 0
    for index in range(len(rows)):
        row = {name: value[None].to(student.device) for name, value in rows[index].items()}
        labels = row.pop("labels")
        hidden = [model.base_model(**row, use_cache=False).last_hidden_state for model in (student, teacher)]
        kl, _ = head_losses(
            hidden[0], labels, head_of(student), teacher_hidden=hidden[1], teacher_head=head_of(teacher)
        )
        total, count = total + kl.item(), count + int(count_targets(labels))
    return total / max(count, 1)


def first_kl_watch(
    name: str, *, last: float | None, start: float | None, warn: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    """Reads a stage's loss log as it is written: warns when its first KL, before any update, is out of line.

    Out of line is more than 3 times the `last` KL of the logits stage before or, where there was none, more than twice
    what the student had at the `start`, right after the conversion; and by more than 0.05 nats.
    """
    against, factor, whose = (
        (last, MORE_THAN_LAST, "the last of the stage before")
        if last is not None
        else (start, MORE_THAN_START, "that of the student before any training")
    )

    def watch(line: dict[str, Any]) -> None:
        kl = line.get("kl")
        if line["step"] != 1 or kl is None or against is None:
            return
        if kl > factor * against and kl > against + SMALL:
            warn(
                f"warning: stage {name} starts at a KL of {kl:.3g} nats a token, {kl / max(against, 1e-9):.1f} times "
                f"{whose} ({against:.3g}): a wrong checkpoint, other data, or a stage before that did harm"
            )

    return watch


def last_kl(log: Sequence[Mapping[str, Any]], stage: str) -> float | None:
    """The KL of the last line that `stage` wrote into a loss log."""
    found = [line["kl"] for line in log if line.get("stage") == stage and "kl" in line]
    return found[-1] if found else None
