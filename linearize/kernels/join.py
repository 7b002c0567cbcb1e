"""How a mixer's linear branch and its window become one output, in one pass over memory each way.

Signatures and mathematics as in `modeling.join_reference`; out, near [B, T, H, V], z and lse [B, T, H] in any strides.
In plain torch the same takes some ten passes over tensors of twice the size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.modeling.join_reference import TINY

from .common import (
    FLOATS,
    check_runs_here,
    check_shape,
    launch,
    on_device,
    opaque,
    power_of_2,
    refuse_second_derivative,
)

_TINY = tl.constexpr(TINY)
# Elements of a program's tile; programs of the norm's gradient, which leave a partial sum each.
TILE = 4096
PROGRAMS = 1056


@triton.jit
def _place(row, tokens, heads, batch_stride, token_stride, head_stride):
    """Where the number of `row` = (b * T + t) * H + h lies."""
    line = row // heads
    return (line // tokens) * batch_stride + (line % tokens) * token_stride + (row % heads) * head_stride


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "zb", "zt", "zh", "lb", "lt", "lh"])
def share_kernel(
    out,
    z,
    near,
    lse,
    joined,
    rows,
    tokens,
    heads,
    zb,
    zt,
    zh,
    lb,
    lt,
    lh,
    V: tl.constexpr,
    BV: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """joined [rows, V]; grid rows / R."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BV)
    live = row < rows
    at, there = row[:, None] * V + column[None, :], live[:, None] & (column < V)[None, :]
    mass = tl.load(z + _place(row, tokens, heads, zb, zt, zh), mask=live, other=1)
    some = tl.maximum(mass, _TINY)
    seen = there & (mass > 0)[:, None]
    far = tl.load(out + at, mask=seen, other=0).to(tl.float32) / some[:, None]
    if WINDOW:
        bound = tl.maximum(tl.load(lse + _place(row, tokens, heads, lb, lt, lh), mask=live, other=0), -1e4)
        share = tl.where(mass > 0, tl.sigmoid(tl.log(some) - bound), 0.0)
        held = tl.load(near + at, mask=there, other=0).to(tl.float32)
        far = held + share[:, None] * (far - held)
    tl.store(joined + at, far.to(joined.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "zb", "zt", "zh", "lb", "lt", "lh"])
def share_gradient_kernel(
    dy,
    out,
    z,
    near,
    lse,
    d_out,
    d_z,
    d_near,
    d_lse,
    rows,
    tokens,
    heads,
    zb,
    zt,
    zh,
    lb,
    lt,
    lh,
    V: tl.constexpr,
    BV: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Gradients of what joined; those of z and lse lie as z and lse do."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BV)
    live = row < rows
    at, there = row[:, None] * V + column[None, :], live[:, None] & (column < V)[None, :]
    at_z = _place(row, tokens, heads, zb, zt, zh)
    mass = tl.load(z + at_z, mask=live, other=1)
    some = tl.maximum(mass, _TINY)
    grad = tl.load(dy + at, mask=there, other=0).to(tl.float32)
    far = tl.load(out + at, mask=there & (mass > 0)[:, None], other=0).to(tl.float32) / some[:, None]
    along = tl.sum(grad * far, 1)
    share = tl.where(mass > 0, 1.0, 0.0)
    if WINDOW:
        at_lse = _place(row, tokens, heads, lb, lt, lh)
        given = tl.load(lse + at_lse, mask=live, other=0)
        share = tl.where(mass > 0, tl.sigmoid(tl.log(some) - tl.maximum(given, -1e4)), 0.0)
        held = tl.load(near + at, mask=there, other=0).to(tl.float32)
        tl.store(d_near + at, (grad * (1 - share)[:, None]).to(d_near.dtype.element_ty), mask=there)
        # of the logit whose sigmoid the share is
        slope = (along - tl.sum(grad * held, 1)) * share * (1 - share)
        tl.store(d_lse + at_lse, tl.where(given >= -1e4, -slope, 0.0), mask=live)
        along = share * along - slope
    tl.store(d_out + at, (grad * (share / some)[:, None]).to(d_out.dtype.element_ty), mask=there)
    tl.store(d_z + at_z, tl.where(mass >= _TINY, -along / some, 0.0), mask=live)


@triton.jit(do_not_specialize=["tokens", "heads"])
def norm_kernel(
    out,
    near,
    norm_weight,
    linear_scale,
    window_scale,
    joined,
    tokens,
    heads,
    V: tl.constexpr,
    BV: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
):
    """joined [tokens, heads, V]; grid (tokens / R) x heads."""
    head = tl.program_id(0) % heads
    token = (tl.program_id(0) // heads).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BV)
    in_v = column < V
    at, there = (token[:, None] * heads + head) * V + column[None, :], (token < tokens)[:, None] & in_v[None, :]
    x = tl.load(out + at, mask=there, other=0).to(tl.float32)
    weight = tl.load(norm_weight + head * V + column, mask=in_v, other=0).to(tl.float32)
    weight *= tl.load(linear_scale + head).to(tl.float32)
    total = x * tl.rsqrt(tl.sum(x * x, 1) / V + EPS)[:, None] * weight[None, :]
    if WINDOW:
        held = tl.load(near + at, mask=there, other=0).to(tl.float32)
        if SCALED:
            held *= tl.load(window_scale + head).to(tl.float32)
        total += held
    tl.store(joined + at, total.to(joined.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "heads", "span"])
def norm_gradient_kernel(
    dy,
    out,
    near,
    norm_weight,
    linear_scale,
    window_scale,
    d_out,
    d_near,
    d_weight,
    d_linear,
    d_window,
    tokens,
    heads,
    span,
    V: tl.constexpr,
    BV: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
):
    """d_out, d_near [tokens, heads, V], and each program's share of the others, d_weight [parts, heads, V] and scales
    [parts, heads]; grid parts x heads, `span` tokens a part."""
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    column = tl.arange(0, BV)
    in_v = column < V
    weight = tl.load(norm_weight + head * V + column, mask=in_v, other=0).to(tl.float32)
    scale = tl.load(linear_scale + head).to(tl.float32)
    held_scale = 1.0
    if SCALED:
        held_scale = tl.load(window_scale + head).to(tl.float32)
    sum_weight = tl.zeros([R, BV], tl.float32)
    sum_window = tl.zeros([R], tl.float32)
    first = part.to(tl.int64) * span
    for i in range(0, span, R):
        token = first + i + tl.arange(0, R)
        there = ((token < tokens) & (i + tl.arange(0, R) < span))[:, None] & in_v[None, :]
        at = (token[:, None] * heads + head) * V + column[None, :]
        grad = tl.load(dy + at, mask=there, other=0).to(tl.float32)
        x = tl.load(out + at, mask=there, other=0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / V + EPS)[:, None]
        normed = x * inverse
        sum_weight += grad * normed
        inner = grad * (weight * scale)[None, :]
        d_x = inverse * (inner - normed * (tl.sum(inner * normed, 1) / V)[:, None])
        tl.store(d_out + at, d_x.to(d_out.dtype.element_ty), mask=there)
        if WINDOW:
            if SCALED:
                held = tl.load(near + at, mask=there, other=0).to(tl.float32)
                sum_window += tl.sum(grad * held, 1)
            tl.store(d_near + at, (grad * held_scale).to(d_near.dtype.element_ty), mask=there)
    total = tl.sum(sum_weight, 0)
    place = part * heads + head
    tl.store(d_weight + place * V + column, total * scale, mask=in_v)
    tl.store(d_linear + place, tl.sum(total * weight, 0))
    if SCALED:
        tl.store(d_window + place, tl.sum(sum_window, 0))


def _rows_of(channels: int) -> int:
    return max(1, TILE // power_of_2(channels))


def _numbers(out: Tensor, z: Tensor, lse: Tensor | None) -> tuple[int, ...]:
    batch, tokens, heads = out.shape[:3]
    bound = z.stride() if lse is None else lse.stride()
    return (batch * tokens * heads, tokens, heads, *z.stride(), *bound)


def _share_output(out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None) -> Tensor:
    return torch.empty_like(out if near is None else near)


@opaque("join_share", _share_output)
def _share(out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None) -> Tensor:
    joined = _share_output(out, z, near, lse)
    channels = out.shape[3]
    rows, numbers = _rows_of(channels), _numbers(out, z, lse)
    constants = (channels, power_of_2(channels), rows, near is not None)
    with on_device(out):
        launch(share_kernel, -(-numbers[0] // rows), (out, z, near, lse, joined), numbers, constants, 4, 1)
    return joined


def _share_gradients(
    dy: Tensor, out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = (torch.empty_like(x) if x is not None else None for x in (out, z, near, lse))
    return tuple(made)  # type: ignore[return-value]


@opaque("join_share_backward", _share_gradients)
def _share_backward(
    dy: Tensor, out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _share_gradients(dy, out, z, near, lse)
    channels = out.shape[3]
    rows, numbers = _rows_of(channels), _numbers(out, z, lse)
    constants = (channels, power_of_2(channels), rows, near is not None)
    with on_device(out):
        launch(
            share_gradient_kernel, -(-numbers[0] // rows), (dy, out, z, near, lse, *made), numbers, constants, 4, 1
        )  # fmt: skip
    return made


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None) -> Tensor:
        ctx.save_for_backward(out, z, near, lse)
        return _share(out, z, near, lse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_second_derivative()
        out, z, near, lse = ctx.saved_tensors
        d_out, d_z, d_near, d_lse = _share_backward(dy.contiguous(), out, z, near, lse)
        return d_out, d_z, *((None, None) if near is None else (d_near, d_lse))


def _checked(out: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if out.dim() != 4:
        raise ValueError(f"out must be [batch, tokens, heads, channels], got {tuple(out.shape)}")
    for name, tensor in (("out", out), ("near", near)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take bfloat16, float16 and float32")
    check_runs_here(out)
    check_shape("near", near, tuple(out.shape), out)
    return out.contiguous(), None if near is None else near.contiguous()


def join_share(out: Tensor, z: Tensor, near: Tensor | None, lse: Tensor | None) -> Tensor:
    """See `modeling.join_reference.join_share`; out and near [B, T, H, V].

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument.
    """
    out, near = _checked(out, near)
    check_shape("z", z, tuple(out.shape[:3]), out)
    check_shape("lse", lse, tuple(out.shape[:3]), out)
    if near is None or lse is None:
        near = lse = None
    z, lse = z.float(), None if lse is None else lse.float()
    if any(x is not None and x.stride() != torch.empty_like(x).stride() for x in (z, lse)):
        z, lse = z.contiguous(), None if lse is None else lse.contiguous()  # a gradient must lie where its input does
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (out, z, near, lse)):
        return _Share.apply(out, z, near, lse)
    return _share(out, z, near, lse)


def _norm_output(
    out: Tensor, near: Tensor | None, weight: Tensor, scale: Tensor, window_scale: Tensor | None, eps: float
) -> Tensor:
    return torch.empty_like(out if near is None else near)


@opaque("join_norm", _norm_output)
def _norm(
    out: Tensor, near: Tensor | None, weight: Tensor, scale: Tensor, window_scale: Tensor | None, eps: float
) -> Tensor:
    joined = _norm_output(out, near, weight, scale, window_scale, eps)
    batch, length, heads, channels = out.shape
    tokens, rows = batch * length, _rows_of(channels)
    constants = (channels, power_of_2(channels), rows, eps, near is not None, window_scale is not None)
    tensors = (out, near, weight, scale, window_scale, joined)
    with on_device(out):
        launch(norm_kernel, -(-tokens // rows) * heads, tensors, (tokens, heads), constants, 4, 1)
    return joined


def _parts(tokens: int, heads: int) -> int:
    return max(1, min(tokens // 32, PROGRAMS // heads))


def _norm_gradients(
    dy: Tensor, out: Tensor, near: Tensor | None, weight: Tensor, scale: Tensor, window_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (  # type: ignore[return-value]
        torch.empty_like(out),
        None if near is None else torch.empty_like(near),
        torch.empty_like(weight),
        torch.empty_like(scale),
        None if window_scale is None else torch.empty_like(window_scale),
    )


@opaque("join_norm_backward", _norm_gradients)
def _norm_backward(
    dy: Tensor, out: Tensor, near: Tensor | None, weight: Tensor, scale: Tensor, window_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, channels = out.shape
    tokens, rows = batch * length, min(_rows_of(channels), 16)
    parts = _parts(tokens, heads)
    d_out, d_near = torch.empty_like(out), None if near is None else torch.empty_like(near)
    d_weight = torch.empty(parts, heads, channels, dtype=torch.float32, device=out.device)
    d_scale = torch.empty_like(d_weight[..., 0])
    d_window = None if window_scale is None else torch.empty_like(d_scale)
    tensors = (dy, out, near, weight, scale, window_scale, d_out, d_near, d_weight, d_scale, d_window)
    constants = (channels, power_of_2(channels), rows, eps, near is not None, window_scale is not None)
    with on_device(out):
        launch(norm_gradient_kernel, parts * heads, tensors, (tokens, heads, -(-tokens // parts)), constants, 4, 1)
    return (  # type: ignore[return-value]
        d_out,
        d_near,
        d_weight.sum(0).to(weight.dtype),
        d_scale.sum(0).to(scale.dtype),
        None if d_window is None or window_scale is None else d_window.sum(0).to(window_scale.dtype),
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        near: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        window_scale: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(out, near, weight, scale, window_scale)
        ctx.eps = eps
        return _norm(out, near, weight, scale, window_scale, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_second_derivative()
        out, near, weight, scale, window_scale = ctx.saved_tensors
        made = _norm_backward(dy.contiguous(), out, near, weight, scale, window_scale, ctx.eps)
        d_out, d_near, d_weight, d_scale, d_window = made
        return (
            d_out,
            None if near is None else d_near,
            d_weight,
            d_scale,
            None if window_scale is None else d_window,
            None,
        )


def join_norm(
    out: Tensor,
    near: Tensor | None,
    norm_weight: Tensor,
    linear_scale: Tensor,
    window_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """See `modeling.join_reference.join_norm`; out and near [B, T, H, V], norm_weight [H, V], the scales [H].

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument.
    """
    out, near = _checked(out, near)
    heads, channels = out.shape[2:]
    check_shape("norm_weight", norm_weight, (heads, channels), out)
    check_shape("linear_scale", linear_scale, (heads,), out)
    check_shape("window_scale", window_scale, (heads,), out)
    if near is None:
        window_scale = None
    leaves = (
        out,
        near,
        norm_weight.contiguous(),
        linear_scale.contiguous(),
        None if window_scale is None else window_scale.contiguous(),
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _Norm.apply(*leaves, eps)
    return _norm(*leaves, eps)
