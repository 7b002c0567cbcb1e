"""How near each swapped layer's attention output is to its teacher's, on the teacher's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.layer_pass import Call, attention_pairs, meet_layers, without_residual


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

    def meet(layer: int, attention: nn.Module, call: Call, output: Any) -> None:
        (args, kwargs), target = without_residual(attention, call, output)
        target = target.float()
        found = attention(*args, **kwargs)[0].float()
        products = (found * target, found * found, target * target, (found - target).square())
        sums[layer] += torch.stack([product.double().sum() for product in products]).cpu()

    for ids in batches:
        meet_layers(teacher, pairs, {"input_ids": ids}, meet)
    found: dict[int, Fidelity] = {}
    for layer, total in sums.items():
        across, own, other, error = total.tolist()
        found[layer] = Fidelity(across / max((own * other) ** 0.5, 1e-30), (error / max(other, 1e-30)) ** 0.5)
    return found
