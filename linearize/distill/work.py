"""The work folder of a stage: checkpoints, the loss log, and what the run was started with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..json_files import as_written, read_lines, read_object
from ..output import is_disk_full

RUN_FILE = "run.json"
LOG_FILE = "loss.jsonl"
TRAINABLE_FILE = "trainable.safetensors"
TRAINER_STATE = "trainer_state.json"  # transformers' name for it
# a checkpoint may be read on other hardware and saved or logged at another pace
_FREE = ("save_steps", "log_steps", "device", "compile", "cuda_graph")
# what a run is of, and what is said of one that is of another
_OTHERS = {
    "start": "started from other weights: resume it with the same STUDENT",
    "teacher": "learned from another teacher: resume it with the same one",
    "text": "read other text: resume it with the same data set and its options",
}


def _anew(folder: Path) -> str:
    # `--overwrite` would take the stages before this one, too
    return f"put it back, or remove {folder} to start this stage anew"


@dataclass(frozen=True, kw_only=True)
class RecipeStage:
    """What a recipe adds to one of its stages: a name of its own, who is told each line of the loss log, `facts` for
    linearize.json, and the log of the stages before, which OUT's begins with."""

    name: str
    watch: Callable[[dict[str, Any]], None] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run keeps checkpoints and logs; without a `folder`, nowhere that outlives it."""

    folder: Path | None = None
    resume: bool = False
    overwrite: bool = False
    recipe: RecipeStage | None = None


def start_hash(model: nn.Module) -> str:
    """Names, shapes and the first values of every parameter, and how a student is built: tells another start, or
    another teacher, from this one at once."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    built = [getattr(config, name, None) for name in ("layers", "mixer_options")]
    digest.update(json.dumps(built, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:  # as what is offloaded
            digest.update(parameter.detach().flatten()[:16].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def text_hash(dataset: Any, count: int) -> str:
    """Of a few of `count` rows, spread over all: tells another text, or other sequences of it, from these."""
    digest = hashlib.sha256()
    for index in sorted({(count - 1) * part // 7 for part in range(8)}):
        for name, tensor in sorted(dataset[index].items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: the Trainer writes `trainer_state.json` last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / TRAINER_STATE).is_file()]
    return max(found, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def unreadable(checkpoint: Path, error: Exception) -> UserError:
    """What is said of a checkpoint that is damaged, by whatever the libraries raised on it."""
    said = (str(error).strip() or "no message").split("\n")[0]
    return UserError(f"{checkpoint} cannot be read ({type(error).__name__}: {said[:200]}); {_anew(checkpoint.parent)}")


def open_work(folder: Path, run: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Makes `folder` ready for `run` (plain data) and gives the checkpoint to go on from, if any.

    Raises UserError when a checkpoint is there and neither `resume` nor `overwrite` says what to do with it,
    or when the run to resume was started with other options, data or weights.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and not resume and not overwrite:
        raise UserError(
            f"{folder} holds an unfinished run at step {checkpoint_step(checkpoint)}: "
            "pass --resume to go on, --overwrite to start anew"
        )
    if checkpoint is not None and resume:
        with as_written(folder):
            _check_same_run(folder, read_object(folder / RUN_FILE, _anew(folder)), run)
        _cut_log(folder / LOG_FILE, checkpoint_step(checkpoint))
        return checkpoint
    if folder.exists():
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
    return None


def clear(folder: Path) -> None:
    """Removes what a run left, and nothing else that may lie in a folder of the person's own."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in (RUN_FILE, LOG_FILE):
        (folder / name).unlink(missing_ok=True)


def _check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    for key, said in _OTHERS.items():
        if before.get(key) != now.get(key):
            raise UserError(f"{folder} belongs to a run that {said}, or remove {folder} to start this stage anew")
    changed = [
        f"{where}{key.replace('_', '-')} was {old.get(key)!r} and is {new.get(key)!r}"
        for where, old, new in (("", before, now), ("--", before.get("options", {}), now.get("options", {})))
        for key in sorted(set(old) | set(new))
        if key not in (*_FREE, *_OTHERS, "options") and old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} was started differently: {'; '.join(changed)}. Resume with the same options, "
            f"or remove {folder} to start this stage anew"
        )


def _cut_log(log: Path, step: int) -> None:
    """Drops the lines after `step`: they are written again, and again the same. A link is not written through."""
    try:
        kept = [line for line in read_lines(log) if line["step"] <= step] if log.is_file() else []
        log.unlink(missing_ok=True)
    except (KeyError, TypeError, OSError) as error:
        raise UserError(f"{log} is no log of steps ({error!r}); {_anew(log.parent)}") from error
    if kept:
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))


@contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """One message for a disk that fills while a checkpoint is written. The checkpoint before it is kept."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"the disk is full: a checkpoint could not be written in {folder} ({free / 2**20:.0f} MiB free). "
            "Free some space, or pass --work-dir on another disk, then --resume"
        ) from error


def check_state(checkpoint: Path) -> None:
    """Raises ValueError where a number of the Trainer's state is none: it would be noticed steps later."""
    from transformers.trainer_callback import TrainerState  # takes a second, and is for those who resume

    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    for entry in fields(TrainerState):
        value = state.get(entry.name, entry.default)
        if type(entry.default) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"{TRAINER_STATE} says {entry.name}: {value!r}")
    if state.get("global_step") != checkpoint_step(checkpoint):
        raise ValueError(f"{TRAINER_STATE} is of step {state.get('global_step')}")
