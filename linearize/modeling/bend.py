"""What stands between q.k and the softmax besides the scale: a bound, ALiBi's distances, a logit that has no key.

    s = cap tanh(scale q.k / cap) - slope distance,   p = e^s / (e^null + sum e^s)

Logits are bounded as in Gemma 2 (2408.00118); ALiBi is Press et al. 2021 (2108.12409), its distances counted inside a
document; a learned logit a head with neither key nor value is what gpt-oss (2508.10925) calls a sink. Here it is
`null`, because sinks are a document's first keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bend(NamedTuple):
    """`cap` bounds the logits, 0 does not; `slopes` [H] is what a token of distance takes off a head's logits; `null`
    [H] is a head's logit without a key. None where there is none."""

    cap: float = 0.0
    slopes: Tensor | None = None
    null: Tensor | None = None

    @property
    def straight(self) -> bool:
        """Whether logits are scale q.k and nothing else."""
        return not self.cap and self.slopes is None and self.null is None

    def of(self, heads: Tensor) -> Bend:
        """That of the heads at the places `heads` [n]."""
        slopes, null = (None if each is None else each.index_select(0, heads) for each in self[1:])
        return Bend(self.cap, slopes, null)


STRAIGHT = Bend()


def bend_logits(scores: Tensor, cap: float, slopes: Tensor | None, distance: Tensor) -> Tensor:
    """Scaled products bounded by `cap`, less `slopes` times `distance`, both of a shape that broadcasts to theirs."""
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype) * distance.to(scores.dtype)
    return scores


def add_null(out: Tensor, lse: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """A softmax's output [..., H, V] and log-sum-exp [..., H] with one more logit, `null` [H], that has no value."""
    null = null.to(lse.dtype)
    share = torch.sigmoid(lse - null).unsqueeze(-1)
    return (out.to(lse.dtype) * share).to(out.dtype), torch.logaddexp(lse, null)


def softmax_of(scores: Tensor, null: Tensor | None) -> Tensor:
    """Softmax over the last dimension, with one more logit `null` [..., 1] that broadcasts to theirs."""
    if null is None:
        return scores.softmax(-1)
    one = null.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, one], dim=-1).softmax(-1)[..., :-1]
