"""How near each swapped layer's attention output is to its teacher's, on the teacher's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.layer_pass import attention_pairs


@dataclass(frozen=True)
class Fidelity:
    """One layer: the cosine between the outputs, and the error's length in units of the teacher's, |s - t| / |t|."""

    cosine: float
    relative_error: float


@torch.no_grad()
def fidelity(student: Any, teacher: Any, batches: Sequence[Tensor]) -> dict[int, Fidelity]:
    """By layer, over `batches` of ids [B, T]."""
    pairs = attention_pairs(student, teacher)
    sums = {layer: torch.zeros(4, dtype=torch.float64) for layer in pairs}

    def hook_for(layer: int, attention: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            target = (output[0] if isinstance(output, tuple) else output).float()
            found = attention(*args, **(kwargs | {"past_key_values": None}))[0].float()
            products = (found * target, found * found, target * target, (found - target).square())
            sums[layer] += torch.stack([product.double().sum() for product in products]).cpu()

        return hook

    handles = [
        original.register_forward_hook(hook_for(layer, attention), with_kwargs=True)
        for layer, (attention, original) in pairs.items()
    ]
    try:
        for ids in batches:
            teacher.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, Fidelity] = {}
    for layer, total in sums.items():
        across, own, other, error = total.tolist()
        found[layer] = Fidelity(across / max((own * other) ** 0.5, 1e-30), (error / max(other, 1e-30)) ** 0.5)
    return found
