"""What a converted folder tells about itself, gathered for its card: nothing here is guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import provenance
from ..checkpoint_files import check_safetensors
from .files import Belongings
from .measured import Measured
from .teacher import Teacher, teacher_of

SOFTMAX = "softmax"
_MIXER = ".mixer."  # marks the parameters that the teacher has not


@dataclass(frozen=True)
class Stage:
    """One stage of training, as recorded; None for what was not."""

    name: str
    data: str | None
    tokens: int | None
    steps: int | None
    learning_rate: float | None
    loss: float | None
    time: str | None


@dataclass(frozen=True)
class Kept:
    """What stays softmax: whole layers, query heads by layer, the keys that those see (None: all), and the key groups
    that have a KV cache, of how many."""

    layers: list[int]
    heads: dict[int, list[int]]
    window: int | None
    groups: int
    groups_in_all: int


@dataclass(frozen=True)
class Facts:
    """All that a card says."""

    teacher: Teacher
    chain: list[dict[str, Any]]
    mixers: dict[str, list[int]]
    options: dict[str, Any]
    kept: Kept
    parameters: int
    new_parameters: int
    dtype: str
    stages: list[Stage]
    recipe: dict[str, Any] | None
    measured: Measured
    calibrated_on: str | None
    versions: dict[str, str]


def gather(folder: Path, belongings: Belongings) -> Facts:
    """Reads `folder`. Raises UserError for a record that is no JSON."""
    record = provenance.read(folder)
    chain = [] if record is None else [*record.get("history", []), record]
    config = belongings.config
    mixers: dict[str, list[int]] = {}
    for index, layer in enumerate(config["layers"]):
        mixers.setdefault(layer["mixer"], []).append(index)
    tensors = {name: entry for shard in belongings.shards for name, entry in check_safetensors(shard).items()}
    sizes = {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
    return Facts(
        teacher=teacher_of(chain, config),
        chain=chain,
        mixers={name: layers for name, layers in mixers.items() if name != SOFTMAX},
        options=dict(config.get("mixer_options") or {}),
        kept=_kept(config, mixers.get(SOFTMAX, [])),
        parameters=sum(sizes.values()),
        new_parameters=sum(size for name, size in sizes.items() if _MIXER in name),
        dtype=str(config.get("dtype") or "unknown dtype"),
        stages=[stage for entry in chain for stage in _stages(entry, belongings.measured.losses)],
        recipe=next((entry["recipe"] for entry in reversed(chain) if isinstance(entry.get("recipe"), dict)), None),
        measured=belongings.measured,
        calibrated_on=next((name for entry in chain if (name := data_name(entry.get("calibrated_on")))), None),
        versions=dict(chain[-1].get("versions") or {}) if chain else {},
    )


def data_name(spec: Any) -> str | None:
    """A DATASET as others may read it: a Hub name as it is, files without the folders that they lay in."""
    if not isinstance(spec, str) or not spec:
        return None
    from ..rows import SUFFIXES

    parts = [part.strip() for part in spec.split(",") if part.strip()]
    local = [part.endswith(SUFFIXES) or part.startswith((".", "/", "~")) or Path(part).exists() for part in parts]
    return ", ".join(Path(part).name if here else part for part, here in zip(parts, local, strict=True))


def _kept(config: Mapping[str, Any], whole: Sequence[int]) -> Kept:
    parent = config["parent_config"]
    usual = parent.get("num_key_value_heads") or parent.get("num_attention_heads") or 0
    heads: dict[int, list[int]] = {}
    windows: set[int | None] = set()
    groups = total = 0
    for index, layer in enumerate(config["layers"]):
        anatomy = layer.get("anatomy") or {}
        own = anatomy.get("num_kv_heads", usual)
        total += own
        if index in whole:
            groups += own
        elif layer.get("softmax_heads"):
            heads[index] = list(layer["softmax_heads"])
            windows.add(layer.get("softmax_window"))
            size = max(anatomy["num_heads"] // own, 1)
            groups += len({head // size for head in heads[index]})
    return Kept(
        layers=list(whole),
        heads=heads,
        window=windows.pop() if len(windows) == 1 else None,
        groups=groups,
        groups_in_all=total,
    )


def _stages(entry: Mapping[str, Any], losses: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """A row for each stage of training that a record tells of, none for a conversion."""
    steps, loss, options = (entry.get(name) or {} for name in ("steps", "loss", "options"))
    if not all(isinstance(found, Mapping) for found in (steps, loss, options)):
        return []
    seen = {line.get("stage"): line.get("tokens") for line in losses}  # the last line's
    settings = list(options.values())
    rows = []
    for index, name in enumerate(steps):
        own = options.get(name) or (settings[index] if index < len(settings) else {})
        tokens = entry.get("tokens") if len(steps) == 1 else seen.get(name)
        rows.append(
            Stage(
                name=name,
                data=data_name(entry.get("dataset")),
                tokens=tokens,
                steps=steps[name],
                learning_rate=own.get("learning_rate"),
                loss=loss.get(name),
                time=entry.get("time"),
            )
        )
    return rows
