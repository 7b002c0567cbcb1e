"""One token of decoding in plain torch: states and ring buffers are written in place, nothing else is kept.

    B batch   H query heads   G key heads (H = G * R, query head h reads key head h // R)   D channels of a head
    C channels before the feature map   K features   V value channels   W window   S sinks
    q [B, H, C]   k [B, G, C]   v [B, G, V]   kv [B, G, K, V] and k_state [B, G, K], written
    window_k and window_v [B, W, G, D]: slot j holds the newest token whose place in its document is j modulo W

The kernels in linearize/kernels/step.py have the same signatures. What stands around the recurrence, the feature map
before it and the joining with the window after it, is an argument here, because at one token a launch costs as much as
its work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bend import add_null, bend_logits
from .join_reference import join_norm, join_share, log_mass
from .reference import taylor_features, widen

KEY_GAIN_LIMIT = 12.0  # the largest log-weight that a key learns, either way
MOST_FEATURES = 512  # of the kernel, which holds all of them at once
FEATURES = ("none", "softmax", "hedgehog", "elu", "relu", "taylor", "unit")
JOINS = ("none", "share", "norm")


def activate(x: Tensor, feature: str) -> Tensor:
    """The part of a feature map that follows its projection: [..., C] to [..., K], in x's dtype.

    "unit" is no map but the length 1 that the delta rule asks for.

    Raises:
        ValueError: no such feature.
    """
    if feature == "none":
        return x
    if feature == "softmax":
        return x.softmax(-1)
    if feature == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    if feature == "elu":
        return F.elu(x) + 1
    if feature == "relu":
        return F.relu(x)
    if feature == "taylor":
        return taylor_features(x)
    if feature == "unit":
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    raise ValueError(f"feature is {feature!r}; it may be {', '.join(FEATURES)}")


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_state: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    weight: Tensor | None = None,
    beta: Tensor | None = None,
    value_scale: Tensor | None = None,
    skip: Tensor | None = None,
    feature: str = "none",
    q_scale: float = 1.0,
    join: str = "none",
    near: Tensor | None = None,
    lse: Tensor | None = None,
    norm_weight: Tensor | None = None,
    linear_scale: Tensor | None = None,
    window_scale: Tensor | None = None,
    eps: float = 1e-6,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S <- a S + w k v^T and o = q^T S, in place; with `beta` the delta rule, S <- a S + b w k (v - k^T a S)^T.

    Args:
        q, k, v: the token's; q is scaled by `q_scale`, then q and k go through `activate(..., feature)`.
        kv, k_state: fp32 (fp64), contiguous, written; k_state, the sum of keys, where the mixer normalises.
        log_decay: [B, G] or [B, G, K], at most 0.
        weight: [B, G], multiplies the key; where it is 0 the token is not there, and nothing decays either.
        beta: [B, G], how much of what the key held is replaced.
        value_scale: [B, G], multiplies v.
        skip: [H], adds skip * v * weight to the output (Mamba-2's D).
        join: "none"; "share", o / z in one denominator with the window's `near` [B, H, V] and `lse` [B, H] (less the
            gain); "norm", `window_scale` [H] * near + `linear_scale` [H] * RMSnorm(o) * `norm_weight` [H, V], or with
            `lse` (less the gain and the far mass), 1 of e^lse + 1 of it beside `near`.
        count: [B] int64, written: one token more.

    Returns:
        Output [B, H, V], in the accumulation dtype for join "none" and in v's for the others; the normaliser z [B, H]
        for join "none" with a k_state, else None.
    """
    groups = k.shape[1]
    out_dtype = v.dtype
    q, k = widen(q) * q_scale, widen(k)
    dtype = q.dtype
    q = activate(q, feature).unflatten(1, (groups, -1))
    k, v = activate(k, feature), v.to(dtype)
    if value_scale is not None:
        v = v * value_scale.to(dtype).unsqueeze(-1)
    heavy = k if weight is None else k * weight.to(dtype).unsqueeze(-1)
    if log_decay is not None:
        decay = log_decay.to(dtype)
        if decay.dim() == 2:
            decay = decay.unsqueeze(-1)
        if weight is not None:
            decay = decay.masked_fill(weight.unsqueeze(-1) == 0, 0)
        decay = decay.exp()
        kv.mul_(decay.unsqueeze(-1))
        if k_state is not None:
            k_state.mul_(decay)
    new = v
    if beta is not None:
        new = (v - torch.einsum("bgk,bgkv->bgv", k, kv)) * beta.to(dtype).unsqueeze(-1)
    kv.add_(heavy.unsqueeze(-1) * new.unsqueeze(-2))
    z: Tensor | None = None
    if k_state is not None:
        k_state.add_(heavy)
        z = torch.einsum("bgrk,bgk->bgr", q, k_state).flatten(1)
    out = torch.einsum("bgrk,bgkv->bgrv", q, kv)
    if skip is not None:
        seen = v if weight is None else v * weight.to(dtype).unsqueeze(-1)
        out = out + skip.to(dtype).unflatten(0, (groups, -1)).unsqueeze(-1) * seen.unsqueeze(2)
    out = out.flatten(1, 2)
    if count is not None:
        count.add_(1)
    if join == "none":
        return out, z
    if join == "share":
        assert z is not None
        return join_share(out, z, near, lse).to(out_dtype), None
    if join == "norm":
        assert norm_weight is not None and linear_scale is not None
        if near is not None and lse is not None:
            far = join_norm(out, None, norm_weight, linear_scale, None, eps)
            return join_share(far, torch.ones_like(lse), near, lse).to(out_dtype), None
        return join_norm(out, near, norm_weight, linear_scale, window_scale, eps).to(out_dtype), None
    raise ValueError(f"join is {join!r}; it may be {', '.join(JOINS)}")


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, *, beta: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, None]:
    """S <- a S, S <- S + b k (v - k^T S)^T, o = q^T S: `linear_step` with a `beta`."""
    return linear_step(q, k, v, kv, beta=beta, log_decay=log_decay)[0], None


class WindowStep(NamedTuple):
    """What a token sees of its window, and what leaves it.

    `near` [B, H, D] and `lse` [B, H], less the gain; of the token W places back, whose turn in the linear branch has
    come: key and value `k`, `v` [B, G, D], its `weight` [B, G] (0 where there is none, or it is a sink) and its gates.
    """

    near: Tensor
    lse: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    log_decay: Tensor | None
    value_scale: Tensor | None
    beta: Tensor | None


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    place: Tensor,
    *,
    scale: float = 1.0,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    log_decay: Tensor | None = None,
    window_decay: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_scale: Tensor | None = None,
    beta: Tensor | None = None,
    window_beta: Tensor | None = None,
    gain: Tensor | None = None,
    gain_q: Tensor | None = None,
    gain_k: Tensor | None = None,
    log_horizon: Tensor | None = None,
    cap: float = 0.0,
    slopes: Tensor | None = None,
    null: Tensor | None = None,
) -> WindowStep:
    """Softmax of one token over the window that ends with it and the document's first S keys; takes its place in it.

    Args:
        q, k, v: [B, H, D], [B, G, D], [B, G, D].
        window_k, window_v: the rings, written at the token's slot; sink_k, sink_v [B, S, G, D], written while the
            document is shorter than S.
        place: [B] int64, the token's place in its document, at least 0; not written.
        log_decay, value_scale, beta: the token's gates, [B, G] (log_decay also [B, G, K]), each with its ring
            window_decay, window_scale, window_beta [B, W, G(, K)], written.
        gain, gain_q: [H] and [H, D]: lse is returned less gain + scale * gain_q . q.
        gain_k: [G, D]: the leaving key's weight is exp(scale * gain_k . k), its logarithm at most 12 either way.
        log_horizon: [H]: lse is returned less `log_mass` of the far keys, too.
        cap, slopes, null: of `Bend`.
    """
    heads, groups, window = q.shape[1], k.shape[1], window_k.shape[1]
    repeat = heads // groups
    q = widen(q)
    dtype = q.dtype
    slot = place.remainder(window)

    def swap(ring: Tensor, new: Tensor) -> Tensor:
        """Puts `new` in the token's slot of `ring` and returns what was there."""
        index = slot.view(-1, *[1] * (ring.dim() - 1)).expand(-1, 1, *ring.shape[2:])
        old = ring.gather(1, index).squeeze(1)
        ring.scatter_(1, index, new.to(ring.dtype).unsqueeze(1))
        return old

    def swap_gate(ring: Tensor | None, new: Tensor | None) -> Tensor | None:
        return None if ring is None or new is None else swap(ring, new)

    late_k, late_v = swap(window_k, k), swap(window_v, v)
    late_decay = swap_gate(window_decay, log_decay)
    late_scale, late_beta = swap_gate(window_scale, value_scale), swap_gate(window_beta, beta)

    distance = (slot.unsqueeze(1) - torch.arange(window, device=q.device)).remainder(window)  # [B, W]
    visible = distance <= place.unsqueeze(1)
    keys, values = window_k, window_v
    if sink_k is not None and sink_v is not None:
        sinks = torch.arange(sink_k.shape[1], device=q.device)
        here = (sinks == place.unsqueeze(1))[..., None, None]
        sink_k.copy_(torch.where(here, k.to(sink_k.dtype).unsqueeze(1), sink_k))
        sink_v.copy_(torch.where(here, v.to(sink_v.dtype).unsqueeze(1), sink_v))
        keys, values = torch.cat([keys, sink_k], dim=1), torch.cat([values, sink_v], dim=1)
        behind = place.unsqueeze(1) - sinks
        distance = torch.cat([distance, behind], dim=1)
        visible = torch.cat([visible, behind >= window], dim=1)  # nearer ones are in the window
    scores = torch.einsum("bgrd,bjgd->bgrj", q.unflatten(1, (groups, repeat)) * scale, keys.to(dtype))
    leaning = None if slopes is None else slopes.view(groups, repeat, 1)
    scores = bend_logits(scores, cap, leaning, distance[:, None, None])
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    near = torch.einsum("bgrj,bjgv->bgrv", (scores - lse.unsqueeze(-1)).exp(), values.to(dtype)).flatten(1, 2)
    lse = lse.flatten(1)
    if null is not None:
        near, lse = add_null(near, lse, null)
    if gain is not None:
        lse = lse - gain.to(dtype)
    if gain_q is not None:
        lse = lse - torch.einsum("bhd,hd->bh", q, gain_q.to(dtype)) * scale

    first_far = 0 if sink_k is None else sink_k.shape[1]
    if log_horizon is not None:
        lse = lse - log_mass((place - (window + first_far - 1)).unsqueeze(1), log_horizon).to(dtype)
    weight = (place - window >= first_far).to(dtype).unsqueeze(1).expand(-1, groups)
    if gain_k is not None:
        learned = torch.einsum("bgd,gd->bg", late_k.to(dtype), gain_k.to(dtype)) * scale
        weight = weight * learned.clamp(-KEY_GAIN_LIMIT, KEY_GAIN_LIMIT).exp()
    return WindowStep(near, lse, late_k, late_v, weight, late_decay, late_scale, late_beta)
