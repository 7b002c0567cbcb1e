"""What a model holds while it generates, in bytes: what grows with the text, and what does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..modeling import LinearizeConfig, LinearizeForCausalLM


@dataclass(frozen=True)
class Costs:
    """Bytes of one sequence: `kv_bytes_per_token` of unbounded softmax, the teacher's, the share of the one in the
    other, and the constant `state_bytes` of mixers, windows, sinks, bounded kept heads and layers with a window of the
    teacher's own. None where the family is not known."""

    kv_bytes_per_token: int | None
    kv_bytes_per_token_teacher: int | None
    kv_share: float | None
    state_bytes: int | None
    state_bytes_teacher: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs_of(folder: Path) -> Costs | None:
    """The bytes of the converted model in a folder, from its config alone; None for what is none, or of a family that
    transformers does not have."""
    try:
        config = LinearizeConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = LinearizeForCausalLM(config)
            model.to(config.dtype or torch.float32)
        return costs(model)
    except Exception:  # of any damaged or foreign config: it is told of where the model is loaded
        return None


def costs(model: Any) -> Costs:
    """The bytes of a student, or of a model as it came (a share of 1 and no state), as `plan` counts them."""
    from ..surgery.anatomy import meta_model, read_anatomy
    from ..surgery.bytes import cache_bytes

    config: Any = model.config
    swapped: dict[int, Any] = {}
    teacher = model
    try:
        if hasattr(model, "mixer_layers"):  # of remote code it is no class of ours
            parent: Any = config.parent_config
            swapped = dict(model.mixer_layers())
            teacher = meta_model(type(parent).from_dict(parent.to_dict()))  # without the student's attention masks
        anatomies = read_anatomy(teacher)
    except (UserError, AttributeError):
        return Costs(None, None, None, None, None)
    element = torch.finfo(model.dtype).bits // 8
    held = cache_bytes(anatomies, swapped, element)
    return Costs(held.kv, held.kv_teacher, held.kv_share if swapped else 1.0, held.state, held.state_teacher)
