"""Losses on the vocabulary: logit distillation (KL from the teacher) and, without a teacher, cross-entropy.

Both work from final hidden states, a chunk of tokens at a time (losses.py): the logits of a whole batch
never exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .compiling import decoder_layers, mixers, stacked_layers
from .feed import Item
from .losses import count_targets, head_losses, head_of, prove_head, scored_tokens
from .options import FinetuneOptions, LogitOptions
from .trainer import StageTrainer


def set_checkpointing(student: Any, enabled: bool) -> None:
    """Checkpoints every decoder layer, non-reentrant: reentrant loses the gradients of frozen inputs."""
    # transformers renamed gradient_checkpointing_* to activation_checkpointing_* after 5.17
    prefix = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if enabled:
        getattr(student, f"{prefix}_checkpointing_enable")(
            **{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
        )
    else:
        getattr(student, f"{prefix}_checkpointing_disable")()
    # enabling makes embeddings' outputs require gradients, which only reentrant checkpointing needs
    if hasattr(student, "_require_grads_hook") or hasattr(student, "_require_grads_hooks"):
        student.disable_input_require_grads()


class HeadTrainer(StageTrainer):
    """Loss: (1 - ce_weight) KL(teacher || student) + ce_weight cross-entropy, a mean over scored tokens.

    Scored are the tokens whose label is not -100, over all batches of a step together, so that accumulation
    changes nothing. Without a teacher the loss is cross-entropy. Logs `kl` and `ce`, each where it is in the loss.
    """

    title = "logits"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self.options
        assert isinstance(options, LogitOptions | FinetuneOptions)
        self.chunk, self.compiled = options.chunk, options.compile
        self.ce_weight, self.temperature = 1.0, 1.0
        if self.teacher is not None:
            assert isinstance(options, LogitOptions)
            self.ce_weight, self.temperature = options.ce_weight, options.temperature
        self.unit: sharding.Unit | None = None
        with self.autocast():  # what trains is fp32, also in a student of half precision
            for model in (self.student, self.teacher):
                if model is not None:
                    prove_head(model)

    def to_compile(self) -> list[nn.Module]:
        if self.isolated:
            return mixers(self.student)
        models = [self.student] if self.teacher is None else [self.student, self.teacher]
        return [layer for model in models for layer in decoder_layers(self.student, model)]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Item], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count_targets(batch["labels"]) for batch in batches]
        return batches, torch.stack(counts).sum() if counts else None

    def look(self, inputs: Item) -> Item:
        return {**inputs, "scored": scored_tokens(inputs["labels"])}

    def head_sums(self, inputs: Item, labels: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of KL and cross-entropy over the scored tokens."""
        with self.autocast():
            hidden = self.student.base_model(**inputs, use_cache=False).last_hidden_state
            teacher_hidden = teacher_head = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_hidden = self.teacher.base_model(**inputs, use_cache=False).last_hidden_state
                teacher_head = head_of(self.teacher)
            return head_losses(
                hidden,
                labels,
                head_of(self.student),
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
                temperature=self.temperature,
                with_ce=self.ce_weight > 0,
                scored=scored,
                chunk=self.chunk,
                compiled=self.compiled,
            )

    def to_shard(self, student: Any, teacher: Any) -> tuple[nn.Module, list[nn.Module]]:
        models = [model for model in (student, teacher) if model is not None]
        # the adapter, if any, has its modules inside the student
        self.unit = sharding.Unit(self.head_sums, *models)
        return self.unit, [*(layer for model in models for layer in stacked_layers(student, model)), self.unit]

    def step_losses(self, inputs: Item, num_items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = dict(inputs)
        head_sums = self.head_sums if self.unit is None else self.unit
        labels, scored = inputs.pop("labels"), inputs.pop("scored")
        kl, ce = head_sums(inputs, labels, scored)
        count = num_items.clamp_min(1)
        loss = ((1 - self.ce_weight) * kl + self.ce_weight * ce) / count
        self.backward(loss)
        parts = {}
        if self.ce_weight < 1:
            parts["kl"] = kl.detach() / count
        if self.ce_weight > 0:
            parts["ce"] = ce.detach() / count
        return loss.detach(), parts
