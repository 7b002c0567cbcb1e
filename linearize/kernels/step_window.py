"""One token of decoding: softmax over the window's ring and the sinks; see `modeling.step_reference` for shapes.

The token takes the slot of the key that leaves the window, which is handed on to the linear branch with its gates.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.modeling.join_reference import HIDDEN
from linearize.modeling.step_reference import KEY_GAIN_LIMIT, WindowStep

from .common import check_bend, check_scale, check_shape, on_device, opaque, power_of_2
from .step import check_place, check_state, check_token

_LIMIT, _HIDDEN = tl.constexpr(KEY_GAIN_LIMIT), tl.constexpr(HIDDEN)


@triton.jit
def _bound(score, CAP: tl.constexpr):
    """Logits bounded by CAP, where it is not 0: CAP tanh(s / CAP)."""
    if CAP > 0:
        e = tl.exp(-tl.abs(score) * (2.0 / CAP))
        tanh = (1.0 - e) / (1.0 + e)
        score = tl.where(score < 0, -tanh, tanh) * CAP
    return score


@triton.jit(do_not_specialize=["scale"])
def _window_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    window_k_ptr,
    window_v_ptr,
    place_ptr,
    sink_k_ptr,
    sink_v_ptr,
    log_decay_ptr,
    window_decay_ptr,
    value_scale_ptr,
    window_scale_ptr,
    beta_ptr,
    window_beta_ptr,
    gain_ptr,
    gain_q_ptr,
    gain_k_ptr,
    log_horizon_ptr,
    slopes_ptr,
    null_ptr,
    near_ptr,
    lse_ptr,
    late_k_ptr,
    late_v_ptr,
    weight_ptr,
    late_decay_ptr,
    late_scale_ptr,
    late_beta_ptr,
    scale,
    G,
    R: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    DECAY: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    BETA: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_Q: tl.constexpr,
    GAIN_K: tl.constexpr,
    HORIZON: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    NULL: tl.constexpr,
):
    """A program: one query head. The token's slot is left out of the ring for all, and written by the group's first."""
    pid = tl.program_id(0).to(tl.int64)  # batch * H + head
    head = pid // R  # batch * G + group
    batch = head // G
    group = head % G
    h = pid - batch * G * R
    place = tl.load(place_ptr + batch)
    slot = (place % W).to(tl.int32)
    d = tl.arange(0, BD)
    inside = d < D
    raw_q = tl.load(q_ptr + pid * D + d, mask=inside, other=0.0).to(tl.float32)
    q = raw_q * scale
    new_k = tl.load(k_ptr + head * D + d, mask=inside, other=0.0)
    new_v = tl.load(v_ptr + head * D + d, mask=inside, other=0.0)

    # Its own key comes first, so that no row is ever empty.
    top = _bound(tl.sum(q * new_k.to(tl.float32), 0), CAP)
    slope = tl.load(slopes_ptr + h) if ALIBI else 0.0
    total = top * 0 + 1.0
    acc = new_v.to(tl.float32)
    for start in range(0, W, BW):
        j = start + tl.arange(0, BW)
        behind = slot - j
        behind = tl.where(behind < 0, behind + W, behind)
        visible = (j < W) & (behind > 0) & (behind <= place)
        at = ((batch * W + j)[:, None] * G + group) * D + d[None, :]
        mask = visible[:, None] & inside[None, :]
        keys = tl.load(window_k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(window_v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scores = _bound(tl.sum(keys * q[None, :], 1), CAP)
        if ALIBI:
            scores -= behind.to(tl.float32) * slope
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        fade = tl.exp(top - higher)
        weights = tl.exp(scores - higher)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * values, 0)
        top = higher
    if S > 0:
        s = tl.arange(0, BS)
        visible = (s < S) & (place - s >= W)
        at = ((batch * S + s)[:, None] * G + group) * D + d[None, :]
        mask = visible[:, None] & inside[None, :]
        keys = tl.load(sink_k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(sink_v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scores = _bound(tl.sum(keys * q[None, :], 1), CAP)
        if ALIBI:
            scores -= (place - s).to(tl.float32) * slope
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        fade = tl.exp(top - higher)
        weights = tl.exp(scores - higher)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * values, 0)
        top = higher
    if NULL:
        null = tl.load(null_ptr + h).to(tl.float32)
        higher = tl.maximum(top, null)
        fade = tl.exp(top - higher)
        total = total * fade + tl.exp(null - higher)
        acc *= fade
        top = higher
    tl.store(near_ptr + pid * D + d, acc / total, mask=inside)
    lse = top + tl.log(total)
    if GAIN:
        lse -= tl.load(gain_ptr + h).to(tl.float32)
    if GAIN_Q:
        lse -= tl.sum(q * tl.load(gain_q_ptr + h * D + d, mask=inside, other=0.0).to(tl.float32), 0)
    if HORIZON:
        log_horizon = tl.load(log_horizon_ptr + h).to(tl.float32)
        count = (place - (W + S - 1)).to(tl.float32)
        gone = tl.maximum(count, 1.0) * tl.exp(-log_horizon)
        # 1 - e^-x loses its digits where x is small
        held = tl.where(gone < 0.02, gone * (1 - gone * (0.5 - gone / 6)), 1 - tl.exp(-gone))
        lse = tl.where(count > 0, lse - log_horizon - tl.log(held), lse + _HIDDEN)
    tl.store(lse_ptr + pid, lse)

    if pid % R == 0:
        at_slot = ((batch * W + slot) * G + group) * D + d
        old_k = tl.load(window_k_ptr + at_slot, mask=inside, other=0.0)
        old_v = tl.load(window_v_ptr + at_slot, mask=inside, other=0.0)
        tl.store(late_k_ptr + head * D + d, old_k, mask=inside)
        tl.store(late_v_ptr + head * D + d, old_v, mask=inside)
        tl.store(window_k_ptr + at_slot, new_k.to(window_k_ptr.dtype.element_ty), mask=inside)
        tl.store(window_v_ptr + at_slot, new_v.to(window_v_ptr.dtype.element_ty), mask=inside)
        weight = tl.where(place - W >= S, 1.0, 0.0)
        if GAIN_K:
            learned = tl.load(gain_k_ptr + group * D + d, mask=inside, other=0.0).to(tl.float32)
            learned = tl.sum(old_k.to(tl.float32) * learned, 0) * scale
            weight *= tl.exp(tl.minimum(tl.maximum(learned, -_LIMIT), _LIMIT))
        tl.store(weight_ptr + head, weight)
        if S > 0:
            at_sink = ((batch * S + place) * G + group) * D + d
            young = inside & (place + d < S + d)
            tl.store(sink_k_ptr + at_sink, new_k.to(sink_k_ptr.dtype.element_ty), mask=young)
            tl.store(sink_v_ptr + at_sink, new_v.to(sink_v_ptr.dtype.element_ty), mask=young)
        gate = (batch * W + slot) * G + group
        if DECAY:
            e = tl.arange(0, BE)
            old = tl.load(window_decay_ptr + gate * E + e, mask=e < E, other=0.0)
            new = tl.load(log_decay_ptr + head * E + e, mask=e < E, other=0.0)
            tl.store(late_decay_ptr + head * E + e, old, mask=e < E)
            tl.store(window_decay_ptr + gate * E + e, new.to(window_decay_ptr.dtype.element_ty), mask=e < E)
        if VALUE_SCALE:
            old = tl.load(window_scale_ptr + gate)
            tl.store(window_scale_ptr + gate, tl.load(value_scale_ptr + head).to(window_scale_ptr.dtype.element_ty))
            tl.store(late_scale_ptr + head, old)
        if BETA:
            old = tl.load(window_beta_ptr + gate)
            tl.store(window_beta_ptr + gate, tl.load(beta_ptr + head).to(window_beta_ptr.dtype.element_ty))
            tl.store(late_beta_ptr + head, old)


def _window_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    place: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    log_decay: Tensor | None,
    window_decay: Tensor | None,
    value_scale: Tensor | None,
    window_scale: Tensor | None,
    beta: Tensor | None,
    window_beta: Tensor | None,
    gain: Tensor | None,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    log_horizon: Tensor | None,
    slopes: Tensor | None,
    null: Tensor | None,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, dim = q.shape
    groups = k.shape[1]

    def like(ring: Tensor | None) -> Tensor:
        if ring is None:
            return torch.empty(0, dtype=torch.float32, device=q.device)
        return torch.empty(batch, *ring.shape[2:], dtype=ring.dtype, device=q.device)

    return (
        torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device),
        torch.empty(batch, heads, dtype=torch.float32, device=q.device),
        like(window_k),
        like(window_v),
        torch.empty(batch, groups, dtype=torch.float32, device=q.device),
        like(window_decay),
        like(window_scale),
        like(window_beta),
    )


_RINGS = ("window_k", "window_v", "sink_k", "sink_v", "window_decay", "window_scale", "window_beta")


@opaque("window_step", _window_outputs, mutates=_RINGS)
def _window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    place: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    log_decay: Tensor | None,
    window_decay: Tensor | None,
    value_scale: Tensor | None,
    window_scale: Tensor | None,
    beta: Tensor | None,
    window_beta: Tensor | None,
    gain: Tensor | None,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    log_horizon: Tensor | None,
    slopes: Tensor | None,
    null: Tensor | None,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _window_outputs(
        q, k, v, window_k, window_v, place, sink_k, sink_v, log_decay, window_decay, value_scale, window_scale,
        beta, window_beta, gain, gain_q, gain_k, log_horizon, slopes, null, scale, cap,
    )  # fmt: skip
    batch, heads, dim = q.shape
    groups, window = k.shape[1], window_k.shape[1]
    sinks = 0 if sink_k is None else sink_k.shape[1]
    width = 1 if window_decay is None else math.prod(window_decay.shape[3:])
    block = power_of_2(dim)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    with on_device(q):
        _window_step_kernel[(batch * heads,)](
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            window_k,
            window_v,
            place.contiguous(),
            sink_k,
            sink_v,
            flat(log_decay),
            window_decay,
            flat(value_scale),
            window_scale,
            flat(beta),
            window_beta,
            flat(gain),
            flat(gain_q),
            flat(gain_k),
            flat(log_horizon),
            slopes,
            flat(null),
            *outputs,
            scale,
            groups,
            R=heads // groups,
            W=window,
            S=sinks,
            BS=power_of_2(sinks, 1) if sinks else 1,
            D=dim,
            BD=block,
            BW=min(power_of_2(window), max(16, 8192 // block)),
            E=width,
            BE=power_of_2(width, 1),
            DECAY=window_decay is not None,
            VALUE_SCALE=window_scale is not None,
            BETA=window_beta is not None,
            GAIN=gain is not None,
            GAIN_Q=gain_q is not None,
            GAIN_K=gain_k is not None,
            HORIZON=log_horizon is not None,
            CAP=cap,
            ALIBI=slopes is not None,
            NULL=null is not None,
            num_warps=4,
            num_stages=1,
        )
    return outputs


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
    """See `modeling.step_reference.window_step`.

    Raises:
        ValueError: names the argument.
    """
    check_token(q, k, v)
    check_scale(scale)
    batch, heads, dim = q.shape
    groups = k.shape[1]
    if v.shape[2] != dim:
        raise ValueError(f"v has {v.shape[2]} channels, q {dim}: a window takes as many")
    if window_k.dim() != 4:
        raise ValueError(f"window_k must be [batch, window, groups, channels], got {tuple(window_k.shape)}")
    ring = (batch, window_k.shape[1], groups)
    sinks = 0 if sink_k is None else sink_k.shape[1]
    for name, tensor in (("window_k", window_k), ("window_v", window_v)):
        check_state(name, tensor, (*ring, dim), q, wide=False)
    for name, held in (("sink_k", sink_k), ("sink_v", sink_v)):
        check_state(name, held, (batch, sinks, groups, dim), q, wide=False)
    if (sink_k is None) != (sink_v is None):
        raise ValueError("sink_k and sink_v come together")
    gates = (
        ("decay", log_decay, window_decay),
        ("scale", value_scale, window_scale),
        ("beta", beta, window_beta),
    )
    for name, new, held in gates:
        if (new is None) != (held is None):
            raise ValueError(f"window_{name} and the token's gate come together")
        if new is not None:
            vector = new.shape[2:] if name == "decay" else ()
            check_shape(f"the token's {name}", new, (batch, groups, *vector), q)
            check_state(f"window_{name}", held, (*ring, *vector), q, wide=False)
    check_shape("gain", gain, (heads,), q)
    check_shape("gain_q", gain_q, (heads, dim), q)
    check_shape("gain_k", gain_k, (groups, dim), q)
    check_shape("log_horizon", log_horizon, (heads,), q)
    check_shape("null", null, (heads,), q)
    slopes = check_bend(cap, slopes, q)
    check_place("place", place, batch, q)
    near, lse, late_k, late_v, weight, late_decay, late_scale, late_beta = _window_step(
        q, k, v, window_k, window_v, place, sink_k, sink_v, log_decay, window_decay, value_scale, window_scale,
        beta, window_beta, gain, gain_q, gain_k, log_horizon, slopes, null, scale, cap,
    )  # fmt: skip
    return WindowStep(
        near,
        lse,
        late_k,
        late_v,
        weight,
        None if log_decay is None else late_decay,
        None if value_scale is None else late_scale,
        None if beta is None else late_beta,
    )
