"""How a mixer's linear branch and its window become one output, in plain torch.

Shapes: the linear branch's `out` [..., H, V] and normaliser z [..., H], the window's output `near` [..., H, V] and
log-sum-exp `lse` [..., H]. The result has the window's dtype, or `out`'s where there is none; inside all is fp32, or
fp64 for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import widen

TINY = 1e-20  # a weight below it is none
HIDDEN = 1e4  # a log-sum-exp beside which nothing counts


def join_share(out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None) -> Tensor:
    """Near and far keys in one denominator; `lse` is the window's log-sum-exp less the far side's gain.

        (e^lse near + out) / (e^lse + z)

    A z of 0, no far key yet, weighs nothing. Without a window out / z, and 0 for a z of 0.
    """
    some = z.clamp(min=TINY)
    far = widen(out).masked_fill((z <= 0).unsqueeze(-1), 0) / some.unsqueeze(-1)  # nor has it a gradient
    if near is None or lse is None:
        return far.to(out.dtype)
    share = torch.sigmoid(some.log() - lse.clamp(min=-HIDDEN))
    share = share.masked_fill(z <= 0, 0).unsqueeze(-1)
    wide = widen(near)
    return (wide + share * (far - wide)).to(near.dtype)


def join_norm(
    out: Tensor,
    near: Tensor | None,
    norm_weight: Tensor,
    linear_scale: Tensor,
    window_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """window_scale * near + linear_scale * RMSnorm(out) * norm_weight; `norm_weight` [H, V], the scales [H]."""
    wide = widen(out)
    total = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide.dtype)
    total = total * linear_scale.to(wide.dtype).unsqueeze(-1)
    if near is None:
        return total.to(out.dtype)
    held = widen(near)
    total = total + (held if window_scale is None else held * window_scale.to(held.dtype).unsqueeze(-1))
    return total.to(near.dtype)


def log_mass(count: Tensor, log_horizon: Tensor) -> Tensor:
    """Logarithm of how many keys a decaying state still holds of `count` [..., 1]: h (1 - e^(-count / h)) with the
    horizon h = exp(`log_horizon`) [H]; -HIDDEN where there is none."""
    log_horizon = widen(log_horizon)
    some = count.clamp(min=1).to(log_horizon.dtype)
    held = log_horizon + torch.log(-torch.expm1(-some * torch.exp(-log_horizon)))
    return held.masked_fill(count <= 0, -HIDDEN)
