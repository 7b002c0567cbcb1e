"""Attention transfer: each swapped layer learns its teacher's attention output (LoLCATs, 2410.10254).

The teacher runs once, without gradients. At each swapped layer the student's attention module is given the
very inputs that the teacher's module got, and its loss goes backward at once, inside the teacher's forward
hook: one layer's graph is alive at a time, and the student's embeddings, MLPs and head never run. Layers
share nothing, so this is the gradient of the mean of the layers' losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .feed import Item
from .losses import transfer_loss
from .trainer import StageTrainer

Pair = tuple[nn.Module, nn.Module]


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


def transfer_pass(
    teacher: Any,
    pairs: dict[int, Pair],
    inputs: Item,
    on_loss: Callable[[int, Tensor], None],
    autocast: Callable[[bool], torch.autocast] = lambda enabled: torch.autocast("cpu", enabled=False),
) -> None:
    """One forward pass of the teacher over `inputs`; `on_loss(layer, loss)` is called with each layer's loss.

    The loss [] carries its layer's graph, which dies when `on_loss` returns. Padding (0 in
    `inputs["attention_mask"]` [B, T]) counts in no loss. `autocast(enabled)` gives the context to run in.
    """
    mask = inputs.get("attention_mask")
    valid = mask.bool() if mask is not None and mask.ndim == 2 else None

    def hook_for(layer: int, attention: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            target = output[0] if isinstance(output, tuple) else output
            with torch.enable_grad():
                result = attention(*args, **(kwargs | {"past_key_values": None}))[0]
                # a backward pass under autocast would run its fp32 products in bf16
                with autocast(False):
                    on_loss(layer, transfer_loss(result, target, valid))

        return hook

    handles = [
        original.register_forward_hook(hook_for(layer, attention), with_kwargs=True)
        for layer, (attention, original) in pairs.items()
    ]
    try:
        with torch.no_grad(), autocast(True):
            # the base model: no logits are needed
            teacher.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


class TransferTrainer(StageTrainer):
    """Trains the new parameters of each layer on its own; logs `layers`, the loss of each swapped layer."""

    title = "transfer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs = attention_pairs(self.student, self.teacher)

    def step_losses(self, inputs: Item, num_items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        # mean over the layers, and over the batches of the step: each batch is in units of its own energy
        share = 1 / (len(self.pairs) * self.current_gradient_accumulation_steps)
        losses: list[Tensor] = []

        def on_loss(layer: int, loss: Tensor) -> None:
            losses.append(loss.detach())
            if loss.requires_grad:  # a mixer without parameters has nothing to learn
                self.accelerator.backward(loss * share)

        transfer_pass(self.teacher, self.pairs, inputs, on_loss, self.autocast)
        layers = torch.stack(losses)
        return layers.sum() * share, {"layers": layers / self.current_gradient_accumulation_steps}

    def blame(self, parts: dict[str, Tensor]) -> str:
        bad = [layer for layer, value in zip(self.pairs, parts["layers"], strict=True) if not value.isfinite()]
        return f" in layer {bad[0]} ({self.pairs[bad[0]][0].path})" if bad else ""
