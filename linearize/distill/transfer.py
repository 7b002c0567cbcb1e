"""Training layer by layer against the teacher's own (layer_pass.py): attention transfer, and the base of its like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import sharding, together
from .compiling import attentions, mixers, stacked_layers
from .feed import Item
from .layer_pass import Pair, attention_loss, attention_pairs, transfer_pass
from .options import TransferOptions
from .trainer import StageTrainer


class LayerTrainer(StageTrainer):
    """Trains each layer on its own against its teacher's; logs `layers`, the loss of each swapped layer.

    A kind says which modules are paired and what a pair's loss is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs = self.pairs_of(self.student, self.teacher)
        self.units: dict[int, sharding.Unit] = {}

    def pairs_of(self, student: Any, teacher: Any) -> dict[int, Pair]:
        raise NotImplementedError

    def layer_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, valid: Tensor | None
    ) -> Tensor:
        """Of several processes, this one's share: together they give the loss of the whole batch."""
        raise NotImplementedError

    def pair_loss(self, module: Any, *call: Any) -> Tensor:
        unit = self.units.get(id(module))
        return self.layer_loss(module, *call) if unit is None else unit(module, *call)

    def to_shard(self, student: Any, teacher: Any) -> tuple[nn.Module, list[nn.Module]]:
        self.pairs = self.pairs_of(student, teacher)
        ours = [module for module, _ in self.pairs.values()]
        self.units = {id(module): sharding.Unit(self.layer_loss, module) for module in ours}
        # a layer goes forward and backward inside the teacher's forward, so each is a unit of its own, as that is
        return nn.ModuleList(self.units.values()), [
            *stacked_layers(student, teacher),
            teacher.base_model,
            *self.units.values(),
        ]

    def step_losses(self, inputs: Item, num_items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        # mean over the layers, and over the batches of the step: each batch is in units of its own energy
        share = 1 / (len(self.pairs) * self.current_gradient_accumulation_steps)
        losses: list[Tensor] = []

        def on_loss(layer: int, loss: Tensor) -> None:
            losses.append(loss.detach())
            if loss.requires_grad:  # a mixer without parameters has nothing to learn
                self.backward(loss * share)

        transfer_pass(self.teacher, self.pairs, inputs, on_loss, self.autocast, self.pair_loss)
        layers = torch.stack(losses)
        return layers.sum() * share, {"layers": layers / self.current_gradient_accumulation_steps}

    def blame(self, parts: dict[str, Tensor]) -> str:
        bad = [layer for layer, value in zip(self.pairs, parts["layers"], strict=True) if not value.isfinite()]
        paths = {layer: attention.path for layer, attention in self.student.mixer_layers()}
        return f" in layer {bad[0]} ({paths[bad[0]]})" if bad else ""


class TransferTrainer(LayerTrainer):
    """Matches attention outputs."""

    title = "transfer"

    def to_compile(self) -> list[nn.Module]:
        return mixers(self.student) if self.isolated else attentions(self.student)

    def pairs_of(self, student: Any, teacher: Any) -> dict[int, Pair]:
        return attention_pairs(student, teacher)

    def layer_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, valid: Tensor | None
    ) -> Tensor:
        assert isinstance(self.options, TransferOptions)
        kind = self.options.loss
        loss = attention_loss(module, args, kwargs, output, valid, self.autocast, kind, together.total)
        # one kind is in units of the whole batch, the others are means
        return loss * self.options.loss_scale * (1.0 if kind == "relative" else self.share)
