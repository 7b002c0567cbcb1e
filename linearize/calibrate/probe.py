"""The teacher with every head's far keys on a gate: at 1 it is the teacher, at 0 its window and sinks alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.bend import STRAIGHT, Bend, bend_logits, softmax_of
from ..modeling.reference import widen
from ..surgery.swap import swap


class Restored(nn.Module):
    """In a mixer's place: near + gate (whole - near), the teacher's softmax over the window and the sinks and over all.

    Args:
        num_heads: query heads, a gate each.
        scale: multiplies q . k.
        window, sinks: keys that `near` sees.
        local: the teacher's own sliding window, None where it attends to everything.
    """

    def __init__(self, num_heads: int, scale: float, window: int, sinks: int, local: int | None) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_heads))
        self.scale, self.window, self.sinks, self.local = scale, window, sinks, local

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None, bend: Bend = STRAIGHT, **kwargs: Any
    ) -> Tensor:
        """q [B, T, H, D], k and v [B, T, G, D] to [B, T, H, D]; one document a row."""
        tokens = q.shape[1]
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        place = torch.arange(tokens, device=q.device)
        behind = place[:, None] - place[None, :]
        whole_mask = behind >= 0 if self.local is None else (behind >= 0) & (behind < self.local)
        near_mask = whole_mask & ((behind < self.window) | (place < self.sinks))

        def attend(mask: Tensor) -> Tensor:
            if not bend.straight:
                return _attend(q, k, v, mask, self.scale, behind, bend)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)

        gate = self.gate.to(q.dtype)[:, None, None]
        near = attend(near_mask)
        out = near + gate * (attend(whole_mask) - near)
        return out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, behind: Tensor, bend: Bend) -> Tensor:
    """Softmax of bent logits: q [B, H, T, D] over the keys [B, G, T, D] that `mask` [T, T] shows, at distance
    `behind`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    slopes, null = (None if each is None else each[:, None, None] for each in bend[1:])
    scores = bend_logits(widen(q @ k.mT) * scale, bend.cap, slopes, behind)
    return softmax_of(scores.masked_fill(~mask, float("-inf")), null).to(v.dtype) @ v


def probe_of(teacher: Any, *, window: int, sinks: int) -> Any:
    """A student that shares the teacher's tensors, whose mixers are `Restored`; only the gates require gradients."""
    probe = swap(teacher, "retention", window=window, sinks=sinks, share_memory=True)
    probe.requires_grad_(False)
    for _, attention in probe.mixer_layers():
        anatomy = attention.anatomy
        restored = Restored(anatomy.num_heads, anatomy.scale, window, sinks, anatomy.window)
        attention.mixer = restored.to(  # type: ignore[assignment]
            attention.device
        )
    return probe
