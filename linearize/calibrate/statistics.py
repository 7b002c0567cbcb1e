"""What the teacher's attention does, by head: entropy, distance, the share that lies past the window, second moments.

Shapes: H query heads, G key heads, D channels, T tokens; probabilities p [H, T, T] of one row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling import AttentionAnatomy
from ..modeling.bend import bend_logits, softmax_of
from .capture import Seen


def causal(tokens: int, local: int | None, device: torch.device) -> Tensor:
    """What the teacher may see, bool [T, T]; `local` is its own sliding window."""
    place = torch.arange(tokens, device=device)
    behind = place[:, None] - place[None, :]
    return behind >= 0 if local is None else (behind >= 0) & (behind < local)


def far_from(tokens: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Pairs of the linear branch's, bool [T, T]: past the window, and no sinks."""
    place = torch.arange(tokens, device=device)
    return (place[:, None] - place[None, :] >= max(window, 0)) & (place[None, :] >= sinks)


def logits_of(anatomy: AttentionAnatomy, seen: Seen, b: int) -> Tensor:
    """Masked logits [H, T, T] in fp32 of row b."""
    q, k, bend = seen.q[b], seen.k[b], seen.bend
    k = k.repeat_interleave(anatomy.group_size, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * anatomy.scale
    place = torch.arange(len(q), device=q.device)
    slopes = None if bend.slopes is None else bend.slopes[:, None, None]
    scores = bend_logits(scores, bend.cap, slopes, place[:, None] - place)
    return scores.masked_fill(~causal(q.shape[0], anatomy.window, q.device), float("-inf"))


def probabilities(anatomy: AttentionAnatomy, seen: Seen, b: int) -> Tensor:
    """The teacher's attention [H, T, T] in fp32 of row b; a null logit takes its part of the sum of 1."""
    null = seen.bend.null
    return softmax_of(logits_of(anatomy, seen, b), None if null is None else null[:, None, None])


@dataclass
class HeadStatistics:
    """Means over tokens by query head, [H] each, and the moments of q [H, D, D] and k [G, D, D].

    `entropy` in nats; `distance` in tokens; `far_mass` is the share of attention past the window and off the sinks,
    `far_distance` how far past the window's edge it lies on average.
    """

    entropy: Tensor
    distance: Tensor
    far_mass: Tensor
    far_distance: Tensor
    moment_q: Tensor
    moment_k: Tensor

    def half_lives(self) -> Tensor:
        """[H] in tokens: log gamma = -1 / mean distance past the window."""
        return (0.6931 * self.far_distance).clamp(2.0, 65536.0)

    def to_dict(self) -> dict[str, Any]:
        names = ("entropy", "distance", "far_mass", "far_distance")
        return {name: [round(x, 4) for x in getattr(self, name).tolist()] for name in names}


class StatisticsOf:
    """Adds up one layer's statistics over batches."""

    def __init__(self, anatomy: AttentionAnatomy, window: int, sinks: int) -> None:
        self.anatomy, self.window, self.sinks = anatomy, window, sinks
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def add(self, seen: Seen) -> None:
        """One batch."""
        for b, (q, k) in enumerate(zip(seen.q, seen.k, strict=True)):
            tokens = q.shape[0]
            p = probabilities(self.anatomy, seen, b)
            place = torch.arange(tokens, device=q.device, dtype=p.dtype)
            behind = (place[:, None] - place).clamp(min=0)
            far = p * far_from(tokens, self.window, self.sinks, q.device)
            found = {
                "entropy": -(p * p.clamp(min=1e-30).log()).sum((1, 2)) / tokens,
                "distance": (p * behind).sum((1, 2)) / tokens,
                "far_mass": far.sum((1, 2)) / tokens,
                "far_sum": (far * (behind - self.window + 1)).sum((1, 2)) / tokens,
                "moment_q": torch.einsum("thd,the->hde", q.double(), q.double()) / tokens,
                "moment_k": torch.einsum("thd,the->hde", k.double(), k.double()) / tokens,
            }
            for name, value in found.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.rows += 1

    def found(self) -> HeadStatistics:
        """The means."""
        mean = {name: (value / self.rows).cpu() for name, value in self.sums.items()}
        far_distance = mean.pop("far_sum") / mean["far_mass"].clamp(min=1e-9)
        return HeadStatistics(**mean, far_distance=far_distance)
