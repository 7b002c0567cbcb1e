"""One pass of the teacher in which each layer of the student meets its own (LoLCATs, 2410.10254).

The teacher runs once, without gradients. At each swapped layer the student's attention module is given the
very inputs that the teacher's module got, and its loss goes backward at once, inside the teacher's forward
hook: one layer's graph is alive at a time, and the student's embeddings, MLPs and head never run. Layers
share nothing, so this is the gradient of the mean of the layers' losses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.cache import CACHES
from .feed import Item
from .losses import itself, transfer_loss

Pair = tuple[nn.Module, nn.Module]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
Autocast = Callable[[bool], torch.autocast]
LayerLoss = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any, "Tensor | None"], Tensor]


def attention_pairs(student: Any, teacher: Any) -> dict[int, Pair]:
    """By layer: the student's swapped attention module and the teacher's module of the same path.

    Raises UserError when no layer is swapped, or when the teacher has no such module.
    """
    pairs: dict[int, Pair] = {}
    for layer, attention in student.mixer_layers():
        try:
            pairs[layer] = (attention, teacher.get_submodule(attention.path))
        except AttributeError:
            raise UserError(
                f"the teacher ({type(teacher).__name__}) has no module {attention.path}: pass as --teacher "
                "the model that the student was converted from"
            ) from None
    if not pairs:
        raise UserError("the student has no swapped attention layer: there is nothing to transfer")
    return pairs


def without_residual(attention: nn.Module, call: Call, output: Any) -> tuple[Call, Tensor]:
    """The call for the student's attention module, and what the teacher's gave, both without the residual that some
    families' attention adds: beside it every error looks small."""
    (args, kwargs), target = call, output[0] if isinstance(output, tuple) else output
    anatomy: Any = attention.anatomy
    if not anatomy.adds_residual:
        return call, target
    residual = args[1] if len(args) > 1 else kwargs["residual"]
    return (args[:1], {**kwargs, "residual": None}), target - residual


def attention_loss(
    attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    valid: Tensor | None,
    autocast: Autocast,
    kind: str = "relative",
    total: Callable[[Tensor], Tensor] = itself,
) -> Tensor:
    """The error of the student's attention module on its teacher's input and `output`; see `transfer_loss`."""
    (args, kwargs), target = without_residual(attention, (args, kwargs), output)
    result = attention(*args, **kwargs)[0]
    # a backward pass under autocast would run its fp32 products in bf16
    with autocast(False):
        return transfer_loss(result, target, valid, kind, total)


def meet_layers(
    teacher: Any, pairs: dict[int, Pair], inputs: Item, meet: Callable[[int, nn.Module, Call, Any], None]
) -> None:
    """One forward pass of the teacher's base model over `inputs`, without gradients. After each pair's second module
    has run, `meet(layer, first module, what the second was called with, its output)`; the call has no cache."""

    def hook_for(layer: int, ours: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            meet(layer, ours, (args, kwargs | {name: None for name in CACHES if name in kwargs}), output)

        return hook

    handles = [
        original.register_forward_hook(hook_for(layer, ours), with_kwargs=True)
        for layer, (ours, original) in pairs.items()
    ]
    try:
        with torch.no_grad():
            # the base model: no logits are needed
            teacher.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def transfer_pass(
    teacher: Any,
    pairs: dict[int, Pair],
    inputs: Item,
    on_loss: Callable[[int, Tensor], None],
    autocast: Autocast = lambda enabled: torch.autocast("cpu", enabled=False),
    layer_loss: LayerLoss | None = None,
) -> None:
    """One forward pass of the teacher over `inputs`; `on_loss(layer, loss)` is called with each layer's loss.

    The loss [] carries its layer's graph, which dies when `on_loss` returns. Padding (0 in
    `inputs["attention_mask"]` [B, T]) counts in no loss. `autocast(enabled)` gives the context to run in.
    `layer_loss(module, args, kwargs, output, valid)` is the loss of a pair's first module on what its second one was
    called with and gave; by default `attention_loss`.
    """
    mask = inputs.get("attention_mask")
    valid = mask.bool() if mask is not None and mask.ndim == 2 else None
    loss_of: LayerLoss = layer_loss or partial(attention_loss, autocast=autocast)

    def meet(layer: int, ours: nn.Module, call: Call, output: Any) -> None:
        with torch.enable_grad():
            loss = loss_of(ours, *call, output, valid)
            with autocast(False):
                on_loss(layer, loss)

    with autocast(True):
        meet_layers(teacher, pairs, inputs, meet)
