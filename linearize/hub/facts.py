"""What a converted folder tells about itself, gathered for its card: nothing here is guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import provenance
from ..checkpoint_files import check_safetensors
from ..evaluate.costs import Costs, costs_of
from ..rows import SUFFIXES
from .files import TOKENIZERS, Belongings
from .measured import Measured
from .teacher import Teacher, teacher_of

SOFTMAX = "softmax"
_HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[^/]*)?")
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
    seconds: float | None
    hardware: str | None
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
    """All that a card says. `conversion` is the record of `convert`, {} without one; `datasets` those of the Hub that
    it was trained on."""

    teacher: Teacher
    chain: list[dict[str, Any]]
    mixers: dict[str, list[int]]
    options: dict[str, Any]
    kept: Kept
    parameters: int
    new_parameters: int
    costs: Costs | None
    dtype: str
    stages: list[Stage]
    recipe: dict[str, Any] | None
    measured: Measured
    conversion: dict[str, Any]
    datasets: list[str]
    tokenizer: bool
    chat: bool
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
        costs=costs_of(folder),
        dtype=str(config.get("dtype") or "unknown dtype"),
        stages=[stage for entry in chain for stage in _stages(entry, belongings.measured.losses)],
        recipe=next((entry["recipe"] for entry in reversed(chain) if isinstance(entry.get("recipe"), dict)), None),
        measured=belongings.measured,
        conversion=next((entry for entry in chain if entry.get("stage") == "convert"), {}),
        datasets=_hub_datasets(chain),
        tokenizer=bool(TOKENIZERS & set(belongings.files)),
        chat=_has_template(belongings),
        versions=dict(chain[-1].get("versions") or {}) if chain else {},
    )


def _has_template(belongings: Belongings) -> bool:
    """Whether the tokenizer brings a chat template."""
    if "chat_template.jinja" in belongings.files or "chat_template.json" in belongings.files:
        return True
    path = belongings.files.get("tokenizer_config.json")
    return path is not None and '"chat_template"' in path.read_text(encoding="utf-8", errors="replace")


def _hub_datasets(chain: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names, owner/name, of the data sets of the Hub that the records tell of."""
    found: dict[str, None] = {}
    for entry in chain:
        for spec in (entry.get("calibrated_on"), entry.get("dataset")):
            name = data_name(spec)
            if name is not None and name == spec and on_hub(name):
                found[re.split("[@:]", name)[0]] = None
    return list(found)


def on_hub(dataset: str) -> bool:
    """Whether a DATASET's name is owner/name of a data set on the Hub."""
    return _HUB_DATA.fullmatch(dataset) is not None


def data_name(spec: Any) -> str | None:
    """A DATASET as others may read it: a Hub name as it is, files without the folders that they lay in, on one line."""
    if not isinstance(spec, str) or not spec.strip():
        return None
    spec = " ".join(spec.split())
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    local = [part.endswith(SUFFIXES) or part.startswith((".", "/", "~")) or Path(part).exists() for part in parts]
    return ", ".join(Path(part).name if here else part for part, here in zip(parts, local, strict=True))


def _kept(config: Mapping[str, Any], whole: Sequence[int]) -> Kept:
    parent = config["parent_config"]
    # A layer that stays whole has no anatomy, and each family names its key groups otherwise.
    read = next((layer["anatomy"]["num_kv_heads"] for layer in config["layers"] if layer.get("anatomy")), None)
    usual = read or parent.get("num_key_value_heads") or parent.get("num_attention_heads") or 0
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
    steps, loss, options, seconds = (entry.get(name) or {} for name in ("steps", "loss", "options", "seconds"))
    if not all(isinstance(found, Mapping) for found in (steps, loss, options)) or not isinstance(seconds, Mapping):
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
                seconds=seconds.get(name),
                hardware=entry.get("hardware"),
                time=entry.get("time"),
            )
        )
    return rows
