"""The teacher's attention layers as they run: the inputs of each, projected as the student's module projects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modeling import LinearizeAttention
from ..modeling.bend import STRAIGHT, Bend


class Seen(NamedTuple):
    """One layer on one batch: its input x [B, T, hidden], q [B, T, H, D], k and v [B, T, G, D], rotated, and what its
    logits are besides scale q.k."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    bend: Bend = STRAIGHT


def attentions_of(student: Any) -> dict[int, LinearizeAttention]:
    """The swapped attention modules by layer."""
    return dict(student.mixer_layers())


@torch.no_grad()
def watch(
    teacher: Any,
    attentions: Mapping[int, LinearizeAttention],
    ids: Tensor,
    on_layer: Callable[[int, Seen], None],
) -> None:
    """Runs the teacher on `ids` [B, T] without gradients and calls `on_layer` at each layer of `attentions`."""

    def hook_for(layer: int, attention: LinearizeAttention) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            on_layer(layer, Seen(x, *attention.project(x, kwargs.get("position_embeddings")), attention.bend(x.device)))

        return hook

    handles = [
        teacher.get_submodule(attention.path).register_forward_pre_hook(hook_for(layer, attention), with_kwargs=True)
        for layer, attention in attentions.items()
    ]
    try:
        teacher.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
