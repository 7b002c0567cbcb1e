"""Softmax over a window of keys and the document's first ones (sinks): output and log-sum-exp, forward and backward.

Shapes, as in `linearize.modeling.reference`:
    q [B, Tq, H, K]   k [B, Tk, G, K]   v [B, Tk, G, V]   sinks [B, S, G, K or V]   out [B, Tq, H, V]   lse [B, Tq, H]
    R = H / G query heads share a key head, W keys make a window, BM queries and BN keys a block.

The kernels, in window_kernels.py, walk over the blocks in reach: cost linear in length. A block never holds two
documents, so a program's keys are one range and its sinks one small tile. Sinks' gradients are partial sums a block of
queries, which `sinks_kernel` adds up in a fixed order. Source: the blocks and the two backward passes are
FlashAttention-2's (Dao 2023, 2307.08691); sinks are those of Xiao et al. 2023 (2309.17453).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import (
    check_bend,
    check_bounds,
    check_heads,
    check_scale,
    check_shape,
    launch,
    on_device,
    opaque,
    power_of_2,
    precision,
    refuse_second_derivative,
)
from .window_kernels import forward_kernel, key_kernel, query_kernel, sinks_kernel


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# (pass, bytes of an element, channels of a head) to tile; fewer channels take the next entry up. An fp32 product is
# three of tf32, whose operands fill the registers: small tiles, or more warps.
TILES: dict[tuple[str, int, int], Tile] = {
    ("forward", 2, 64): Tile(64, 64, 4, 2),
    ("forward", 2, 128): Tile(64, 64, 4, 2),
    ("forward", 2, 256): Tile(64, 32, 8, 2),
    ("forward", 4, 64): Tile(64, 32, 4, 2),
    ("forward", 4, 128): Tile(64, 32, 8, 1),
    ("forward", 4, 256): Tile(16, 16, 8, 1),
    ("query", 2, 64): Tile(64, 64, 4, 2),
    ("query", 2, 128): Tile(64, 64, 4, 2),
    ("query", 2, 256): Tile(64, 32, 8, 2),
    ("query", 4, 64): Tile(64, 32, 4, 1),
    ("query", 4, 128): Tile(64, 32, 8, 1),
    ("query", 4, 256): Tile(16, 16, 8, 1),
    ("key", 2, 64): Tile(32, 64, 4, 2),
    ("key", 2, 128): Tile(32, 64, 4, 2),
    ("key", 2, 256): Tile(32, 64, 8, 2),
    ("key", 4, 64): Tile(32, 32, 4, 1),
    ("key", 4, 128): Tile(32, 32, 8, 1),
    ("key", 4, 256): Tile(16, 16, 8, 1),
}
# A step of decoding, and other short pieces, take a block of 16 queries.
SHORT = 16
# Sinks that `query_kernel` takes at once: dots of 16, or 1 with sums in their place. Dots do not fit fp32's registers.
SINKS: dict[int, int] = {2: 16, 4: 1}


def _tile(kind: str, q: Tensor, v: Tensor) -> Tile:
    channels = max(64, power_of_2(max(q.shape[3], v.shape[3])))
    tile = TILES[kind, v.element_size(), channels]
    return tile._replace(queries=SHORT) if kind == "forward" and q.shape[1] <= SHORT else tile


def _blocks(tokens: int, size: int, batch: int, bounds: Tensor | None) -> int:
    """How many blocks `_block` numbers."""
    return batch * -(-tokens // size) if bounds is None else tokens // size + bounds.shape[0] - 1


def _shared(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, bounds: Tensor | None, slopes: Tensor | None,
    window: int, scale: float, cap: float,
) -> tuple[tuple[int, ...], tuple[Any, ...]]:  # fmt: skip
    """Numbers and first constants of all kernels of a call."""
    documents = q.shape[0] if bounds is None else bounds.shape[0] - 1
    # A single row's stride grows with the length and is never used: 0.
    strides = [stride for x in (q, k, v) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))]
    # Numbers are not specialised; in units of 16 elements the compiler still sees that rows are aligned.
    unit = 1 if any(stride % 16 for stride in strides) else 16
    bits = struct.unpack("<i", struct.pack("<f", scale))[0]  # a number is whole
    numbers = (*(x // unit for x in strides), documents, q.shape[1], k.shape[1], q.shape[2], window, bits)
    widths = (q.shape[3], v.shape[3], power_of_2(q.shape[3]), power_of_2(v.shape[3]))
    bent = (cap, slopes is not None)
    placed = (bounds is not None, position is not None)
    return numbers, (q.shape[2] // k.shape[2], *widths, unit, *placed, *bent, precision(v.dtype))


def _fake_forward(q, k, v, sink_k, sink_v, position, bounds, slopes, window, sinks, scale, cap):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@opaque("window_forward", _fake_forward)
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, position: Tensor | None,
    bounds: Tensor | None, slopes: Tensor | None, window: int, sinks: int, scale: float, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, queries, heads = q.shape[:3]
    out = torch.empty(batch, queries, heads, v.shape[3], dtype=v.dtype, device=v.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    numbers, shared = _shared(q, k, v, position, bounds, slopes, window, scale, cap)
    tile = _tile("forward", q, v)
    programs = _blocks(queries, tile.queries, batch, bounds) * heads
    if out.numel():
        with on_device(q):
            tensors = (q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse)
            constants = (*shared, tile.queries, tile.keys, sinks, 16, sink_k is not None)
            launch(forward_kernel, programs, tensors, numbers, constants, tile.warps, tile.stages)
    return out, lse


def _fake_backward(q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse, dout, dlse, *numbers):
    given = [] if sink_k is None else [torch.empty_like(sink_k), torch.empty_like(sink_v)]
    return [x.new_empty(x.shape) for x in (q, k, v)] + given


@opaque("window_backward", _fake_backward)
def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, position: Tensor | None,
    bounds: Tensor | None, slopes: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    window: int, sinks: int, scale: float, cap: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of the sinks where they are given."""
    given = [x for x in (sink_k, sink_v) if x is not None]
    if not q.numel():
        return [x.new_zeros(x.shape) for x in (q, k, v, *given)]
    batch, queries, heads = q.shape[:3]
    groups = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=q.device) for x in (q, k, v))
    sink_grads = [torch.empty_like(x) for x in given]
    numbers, shared = _shared(q, k, v, position, bounds, slopes, window, scale, cap)
    tile, key_tile = _tile("query", q, v), _tile("key", q, v)
    blocks = _blocks(queries, tile.queries, batch, bounds)
    saved = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=q.device)
    part_k, part_v = (torch.empty(blocks, heads, sinks, x.shape[3], dtype=saved.dtype, device=q.device) for x in (k, v))
    tensors: tuple[Tensor | None, ...]
    constants: tuple[Any, ...]
    with on_device(q):
        tensors = (q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse, dout, dlse, dq, saved, part_k, part_v)
        several = SINKS[v.element_size()]
        constants = (*shared, tile.queries, tile.keys, sinks, several, sink_k is not None, dlse is not None)
        launch(query_kernel, blocks * heads, tensors, numbers, constants, tile.warps, tile.stages)
        tensors = (q, k, v, position, bounds, slopes, dout, saved, dk, dv)
        programs = _blocks(k.shape[1], key_tile.keys, batch, bounds) * groups
        constants = (*shared, key_tile.queries, key_tile.keys)
        launch(key_kernel, programs, tensors, numbers, constants, key_tile.warps, key_tile.stages)
        if sinks:
            documents, columns = numbers[9], 32
            programs = documents * groups * -(-max(q.shape[3], v.shape[3]) // columns)
            tensors = (part_k, part_v, *(sink_grads or (dk, dv)), position, bounds)
            constants = (*shared[:3], *shared[6:8], tile.queries, sinks, sink_k is not None, 64, columns)
            launch(sinks_kernel, programs, tensors, numbers[9:], constants, 4, 1)
    return [dq, dk, dv, *sink_grads]


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_k, sink_v, position, bounds, slopes, window, sinks, scale, cap):
        out, lse = _window_forward(q, k, v, sink_k, sink_v, position, bounds, slopes, window, sinks, scale, cap)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse)
        ctx.options = window, sinks, scale, cap
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        refuse_second_derivative()
        *inputs, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = _window_backward(*inputs, out, lse, dout, dlse, *ctx.options)
        sink_grads = grads[3:] or (None, None)
        return (*grads[:3], *sink_grads, *[None] * 7)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float = 1.0,
    position: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` keys (the token's own among them) and the document's first `sinks` keys.

    Args:
        q: [B, Tq, H, K]. q and k are computed in v's dtype.
        k, v: [B, Tk, G, K], [B, Tk, G, V], Tk >= Tq; the last key belongs to the last query.
        position: [B], the place in its document of the first query; negative by the number of pads on the left. Keys
            at places below 0 do not exist. None: the first key starts the document.
        sink_k, sink_v: [B, S, G, K or V], for a piece whose document began before it; None takes them from k and v.
        cu_seqlens: [N + 1] bounds of documents in a flattened batch of 1 (then Tk = Tq, no `position`, no `sink_k`).
        cap, slopes: of `modeling.bend.Bend`, the logits' bound (0: none) and [H] what a token of distance takes off
            them; constants, without a gradient.

    Returns:
        Output [B, Tq, H, V] in v's dtype and log-sum-exp of the logits [B, Tq, H], fp32; gradients flow into
        both. A query without any key gives 0 and -inf.

    Raises:
        ValueError: an argument's shape, dtype, device or range is wrong; names it.
    """
    check_heads(q, k, v, same_length=False)
    check_scale(scale)
    slopes = check_bend(cap, slopes, q)
    cu_seqlens = check_bounds(cu_seqlens, q)
    batch, keys, groups = k.shape[:3]
    if keys < q.shape[1]:
        raise ValueError(f"k has {keys} tokens, fewer than q with {q.shape[1]}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if (sink_k is None) != (sink_v is None):
        raise ValueError("sink_k and sink_v come together")
    if not sinks:
        sink_k = sink_v = None
    if sink_k is not None and sink_v is not None:
        check_shape("sink_k", sink_k, (batch, sinks, groups, k.shape[3]), q)
        check_shape("sink_v", sink_v, (batch, sinks, groups, v.shape[3]), q)
        sink_k, sink_v = sink_k.to(v.dtype).contiguous(), sink_v.to(v.dtype).contiguous()
    if position is not None:
        if position.shape != (batch,) or position.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"position must be whole numbers [{batch}], got {position.dtype} {tuple(position.shape)}")
        if position.device != q.device:
            raise ValueError(f"position is on {position.device}, q on {q.device}")
        position = position.contiguous()
    if cu_seqlens is not None:
        if keys != q.shape[1]:
            raise ValueError(f"cu_seqlens needs as many keys as queries, got {keys} and {q.shape[1]}")
        if position is not None or sink_k is not None:
            raise ValueError("cu_seqlens excludes position and sink_k: a packed document holds its own first keys")
        cu_seqlens = cu_seqlens.contiguous()
    q, k, v = (x.to(v.dtype) if x.stride(3) == 1 else x.to(v.dtype).contiguous() for x in (q, k, v))
    # Longer than any document, and sums of places and windows stay within 32 bits.
    window = min(window, 1 << 30)
    numbers = window, sinks, float(scale), float(cap)
    return _Window.apply(q, k, v, sink_k, sink_v, position, cu_seqlens, slopes, *numbers)
