"""Short alignment: the mixers' new parameters against the teacher's attention outputs, each layer on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..distill.layer_pass import attention_pairs, transfer_pass
from ..distill.parameters import training_only


def align(student: Any, teacher: Any, batches: Sequence[Tensor], *, passes: int, learning_rate: float) -> list[float]:
    """Goes `passes` times through `batches` of ids [B, T]; AdamW, a cosine without warmup.

    Returns:
        The mean relative loss of each step. Non-finite gradients are skipped: a start is never made worse by them.
    """
    names = {name for name, _ in student.named_parameters() if ".mixer." in name}
    steps = passes * len(batches)
    if not names or not steps:
        return []
    pairs = attention_pairs(student, teacher)
    trace: list[float] = []
    with training_only(student, names):
        trained = [parameter for name, parameter in student.named_parameters() if name in names]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step in logging.tqdm(range(steps), desc="aligning"):
            losses: list[Tensor] = []

            def on_loss(layer: int, loss: Tensor, losses: list[Tensor] = losses) -> None:
                losses.append(loss.detach())
                if loss.requires_grad:
                    (loss / len(pairs)).backward()

            transfer_pass(teacher, pairs, {"input_ids": batches[step % len(batches)]}, on_loss)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if bool(norm.isfinite()):
                optimizer.step()
            optimizer.zero_grad()
            trace.append(float(torch.stack(losses).mean()))
    return trace
