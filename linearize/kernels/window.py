"""Softmax over a window of keys and the document's first ones (sinks): output and log-sum-exp, forward and backward.

Shapes, as in `linearize.modeling.reference`:
    q [B, Tq, H, K]   k [B, Tk, G, K]   v [B, Tk, G, V]   sinks [B, S, G, K or V]   out [B, Tq, H, V]   lse [B, Tq, H]
    R = H / G query heads share a key head, W keys make a window, BM queries and BN keys a block.

A program takes one block of queries (`_forward`, `_backward_q`) or of keys (`_backward_kv`) of one head and walks over
the blocks in reach: cost linear in length. A block never holds two documents, so a program's keys are one range and its
sinks one small tile. Sinks' gradients are partial sums a block of queries, which `_backward_sinks` adds up in a fixed
order. Source: the blocks and the two backward passes are FlashAttention-2's (Dao 2023, 2307.08691); sinks are those of
Xiao et al. 2023 (2309.17453).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    check_bounds,
    check_heads,
    check_scale,
    check_shape,
    dot,
    dot_add,
    launch,
    on_device,
    opaque,
    power_of_2,
    precision,
)

_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


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
# Sinks that `_backward_q` takes at a time: dots of 16, or 1 with sums in their place. Dots do not fit fp32's registers.
SINKS: dict[int, int] = {2: 16, 4: 1}


def _tile(kind: str, q: Tensor, v: Tensor) -> Tile:
    channels = max(64, power_of_2(max(q.shape[3], v.shape[3])))
    tile = TILES[kind, v.element_size(), channels]
    return tile._replace(queries=SHORT) if kind == "forward" and q.shape[1] <= SHORT else tile


@triton.jit
def _block(number, bounds, position, documents, tokens, offset, BLOCK: tl.constexpr, PACKED: tl.constexpr,
           PLACED: tl.constexpr):  # fmt: skip
    """Row of the batch of block `number`, its tokens [start, end), and the key at place 0 of their document.

    The blocks of packed document n are numbered from bounds[n] // BLOCK + n on: nobody has to count the blocks of
    the documents before it, and at most one number a document is left without tokens (start >= end).
    """
    if PACKED:
        low = offset * 0
        high = low + documents - 1
        while low < high:
            middle = (low + high + 1) // 2
            found = tl.load(bounds + middle).to(tl.int32) // BLOCK + middle <= number
            low = tl.where(found, middle, low)
            high = tl.where(found, high, middle - 1)
        first = tl.load(bounds + low).to(tl.int32)
        end = tl.load(bounds + low + 1).to(tl.int32)
        start = first + (number - first // BLOCK - low) * BLOCK
        row = low * 0
    else:
        blocks = tl.cdiv(tokens, BLOCK)
        row = number // blocks
        start = (number - row * blocks) * BLOCK
        end = tokens
        first = offset * 0
        if PLACED:
            first = (offset - tl.load(position + row)).to(tl.int32)
    return row.to(tl.int64), start, end, first


@triton.jit
def _at(base, start, stride, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers [ROWS, PADDED] to rows start, start + 1, ... of `stride` elements."""
    rows = tl.arange(0, ROWS)[:, None] * stride
    return base + tl.cast(start, tl.int64) * stride + rows + tl.arange(0, PADDED)[None, :]


@triton.jit
def _within(start, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Mask of such a tile: rows below `end`, channels that exist."""
    mask = (start + tl.arange(0, ROWS) < end)[:, None]
    if PADDED != WIDTH:
        mask = mask & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return mask


@triton.jit
def _rows(base, start, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows start, start + 1, ... below `end`, zeros after them."""
    return tl.load(_at(base, start, stride, ROWS, PADDED), mask=_within(start, end, ROWS, WIDTH, PADDED), other=0.0)


@triton.jit
def _sinks(own, given, row, group, groups, first, keys, stride, s, S: tl.constexpr, WIDTH: tl.constexpr,
           PADDED: tl.constexpr, GIVEN: tl.constexpr, used):  # fmt: skip
    """Sinks s of `given` [B, S, G, WIDTH], or of the keys, where `own` is key 0; zeros where they are not `used`."""
    if GIVEN:
        at = given + ((row * S + s) * groups + group) * WIDTH
    else:
        at = own + tl.minimum(tl.maximum(first + s, 0), keys - 1).to(tl.int64) * stride
    d = tl.arange(0, PADDED)[None, :]
    return tl.load(at[:, None] + d, mask=(s < tl.where(used, S, 0))[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def _window(start, end, offset, first, window, BM: tl.constexpr):
    """Each query's own key and how many keys back it sees (0 for a pad); the keys [low, high) that the block sees."""
    index = start + offset + tl.arange(0, BM)
    reach = tl.maximum(tl.minimum(window, index - tl.maximum(first, 0) + 1), 0)
    low = tl.maximum(start + offset - window + 1, tl.maximum(first, 0))
    return index, reach, low, tl.minimum(start + BM, end) + offset


@triton.jit
def _sees(distance, reach):
    """0 <= distance < reach in one comparison."""
    return distance.to(tl.uint32, bitcast=True) < reach.to(tl.uint32, bitcast=True)


@triton.jit
def _raise(top, score):
    """New largest score (base 2), what to take off scores before their exponential, what the sums so far keep."""
    new = tl.maximum(top, score)
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, shift, tl.exp2(top - shift)


_NUMBERS = ["q_row", "q_token", "q_head", "k_row", "k_token", "k_head", "v_row", "v_token", "v_head"]
_NUMBERS += ["documents", "queries", "keys", "heads", "window", "scale"]


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    q, k, v, sink_k, sink_v, position, bounds, out, lse,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One block of queries. Neighbouring programs are the heads of a block: together they read whole rows."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    group = head // R
    offset = keys - queries
    row, start, end, first = _block(block, bounds, position, documents, queries, offset, BM, PACKED, PLACED)
    if PACKED and start >= end:
        return
    k += (row * k_row + group.to(tl.int64) * k_head) * UNIT
    v += (row * v_row + group.to(tl.int64) * v_head) * UNIT
    q_tile = _rows(q + (row * q_row + head.to(tl.int64) * q_head) * UNIT, start, end, q_token * UNIT, BM, K, KP)

    index, reach, low, high = _window(start, end, offset, first, window, BM)
    scale = scale.to(tl.float32, bitcast=True)
    c = scale * _LOG2_E
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VP], tl.float32)
    # Before the loop: its first loads wait for the queries' anyway, and nothing has to be rescaled yet.
    used = high - 1 - first >= window
    for least in range(0, S, SP):
        s = least + tl.arange(0, SP)
        k_tile = _sinks(k, sink_k, row, group, heads // R, first, keys, k_token * UNIT, s, S, K, KP, GIVEN, used)
        v_tile = _sinks(v, sink_v, row, group, heads // R, first, keys, v_token * UNIT, s, S, V, VP, GIVEN, used)
        beyond = (index[:, None] - first - s[None, :] >= window) & (s < S)[None, :]
        scores = tl.where(beyond, dot(q_tile, tl.trans(k_tile), PRECISION) * c, float("-inf"))
        top, shift, keep = _raise(top, tl.max(scores, 1))
        p = tl.exp2(scores - shift[:, None])
        total = total * keep + tl.sum(p, 1)
        acc = dot_add(p.to(v_tile.dtype), v_tile, acc * keep[:, None], PRECISION)
    for n in range(low, high, BN):
        k_tile = _rows(k, n, high, k_token * UNIT, BN, K, KP)
        v_tile = _rows(v, n, high, v_token * UNIT, BN, V, VP)
        seen = _sees(index[:, None] - (n + tl.arange(0, BN))[None, :], reach[:, None])
        scores = tl.where(seen, dot(q_tile, tl.trans(k_tile), PRECISION) * c, float("-inf"))
        top, shift, keep = _raise(top, tl.max(scores, 1))
        p = tl.exp2(scores - shift[:, None])
        total = total * keep + tl.sum(p, 1)
        acc = dot_add(p.to(v_tile.dtype), v_tile, acc * keep[:, None], PRECISION)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    rows = (row * queries + start) * heads + head
    tile = (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    tl.store(_at(out + rows * V, 0, heads * V, BM, VP), tile, mask=_within(start, end, BM, V, VP))
    i = tl.arange(0, BM)
    tile = tl.where(empty, float("-inf"), (top + tl.log2(total)) * _LN_2)
    tl.store(lse + rows + i * heads, tile, mask=start + i < end)


@triton.jit(do_not_specialize=_NUMBERS)
def _backward_q(
    q, k, v, sink_k, sink_v, position, bounds, out, lse, dout, dlse, dq, saved, part_k, part_v,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, GIVEN: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """dq; lse and delta, saved for `_backward_kv` [2, B, H, Tq]; this block's part of the sinks' gradients."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    group = head // R
    offset = keys - queries
    row, start, end, first = _block(block, bounds, position, documents, queries, offset, BM, PACKED, PLACED)
    if PACKED and start >= end:
        return
    k += (row * k_row + group.to(tl.int64) * k_head) * UNIT
    v += (row * v_row + group.to(tl.int64) * v_head) * UNIT
    rows = (row * queries + start) * heads + head
    i = tl.arange(0, BM)
    real = start + i < end
    q_tile = _rows(q + (row * q_row + head.to(tl.int64) * q_head) * UNIT, start, end, q_token * UNIT, BM, K, KP)
    v_mask = _within(start, end, BM, V, VP)
    dout_tile = tl.load(_at(dout + rows * V, 0, heads * V, BM, VP), mask=v_mask, other=0.0)
    out_tile = tl.load(_at(out + rows * V, 0, heads * V, BM, VP), mask=v_mask, other=0.0)
    own_lse = tl.load(lse + rows + i * heads, mask=real, other=0.0)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if DLSE:
        # d lse / d s = p, as in the output's own p (dp - delta). A row without keys has no gradient, whatever came.
        own_dlse = tl.load(dlse + rows + i * heads, mask=real, other=0.0)
        delta -= tl.where(own_lse == float("-inf"), 0.0, own_dlse)
    own_lse *= _LOG2_E
    saved += (row * heads + head) * queries + start
    tl.store(saved + i, own_lse, mask=real)
    half = (1 if PACKED else documents) * heads.to(tl.int64) * queries
    tl.store(saved + half + i, delta, mask=real)

    index, reach, low, high = _window(start, end, offset, first, window, BM)
    scale = scale.to(tl.float32, bitcast=True)
    c = scale * _LOG2_E
    acc = tl.zeros([BM, KP], tl.float32)
    used = high - 1 - first >= window
    for least in range(0, S, SP):
        s = least + tl.arange(0, SP)
        k_tile = _sinks(k, sink_k, row, group, heads // R, first, keys, k_token * UNIT, s, S, K, KP, GIVEN, used)
        v_tile = _sinks(v, sink_v, row, group, heads // R, first, keys, v_token * UNIT, s, S, V, VP, GIVEN, used)
        if SP == 1:
            q_wide, dout_wide = q_tile.to(tl.float32), dout_tile.to(tl.float32)
            p = tl.exp2(tl.sum(q_wide * k_tile, 1) * c - own_lse)
            p = tl.where(index - first - least >= window, p, 0.0)
            ds = p * (tl.sum(dout_wide * v_tile, 1) - delta)
            acc += ds[:, None] * k_tile
            own_k = tl.sum(ds[:, None] * q_wide, 0)[None, :]
            own_v = tl.sum(p[:, None] * dout_wide, 0)[None, :]
        else:
            beyond = (index[:, None] - first - s[None, :] >= window) & (s < S)[None, :]
            p = tl.where(beyond, tl.exp2(dot(q_tile, tl.trans(k_tile), PRECISION) * c - own_lse[:, None]), 0.0)
            ds = p * (dot(dout_tile, tl.trans(v_tile), PRECISION) - delta[:, None])
            acc = dot_add(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
            # The same again with the sinks as rows, from memory: a transposed p is not to be fed to a dot.
            beyond = (index[None, :] - first - s[:, None] >= window) & (s < S)[:, None]
            p = tl.where(beyond, tl.exp2(dot(k_tile, tl.trans(q_tile), PRECISION) * c - own_lse[None, :]), 0.0)
            ds = p * (dot(v_tile, tl.trans(dout_tile), PRECISION) - delta[None, :])
            own_k = dot(ds.to(q_tile.dtype), q_tile, PRECISION)
            own_v = dot(p.to(dout_tile.dtype), dout_tile, PRECISION)
        part = (block.to(tl.int64) * heads + head) * S
        last = tl.where(used, S, 0)
        tl.store(_at(part_k + part * K, least, K, SP, KP), own_k * scale, mask=_within(least, last, SP, K, KP))
        tl.store(_at(part_v + part * V, least, V, SP, VP), own_v, mask=_within(least, last, SP, V, VP))
    for n in range(low, high, BN):
        k_tile = _rows(k, n, high, k_token * UNIT, BN, K, KP)
        v_tile = _rows(v, n, high, v_token * UNIT, BN, V, VP)
        seen = _sees(index[:, None] - (n + tl.arange(0, BN))[None, :], reach[:, None])
        p = tl.where(seen, tl.exp2(dot(q_tile, tl.trans(k_tile), PRECISION) * c - own_lse[:, None]), 0.0)
        ds = p * (dot(dout_tile, tl.trans(v_tile), PRECISION) - delta[:, None])
        acc = dot_add(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
    tile = (acc * scale).to(dq.dtype.element_ty)
    tl.store(_at(dq + rows * K, 0, heads * K, BM, KP), tile, mask=_within(start, end, BM, K, KP))


@triton.jit(do_not_specialize=_NUMBERS)
def _backward_kv(
    q, k, v, position, bounds, dout, saved, dk, dv,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys from the windows that hold them, over all R query heads of the group."""
    groups = heads // R
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups
    offset = keys - queries
    row, start, end, first = _block(block, bounds, position, documents, keys, offset, BN, PACKED, PLACED)
    if PACKED and start >= end:
        return
    k += (row * k_row + group.to(tl.int64) * k_head) * UNIT
    v += (row * v_row + group.to(tl.int64) * v_head) * UNIT
    k_tile = _rows(k, start, end, k_token * UNIT, BN, K, KP)
    v_tile = _rows(v, start, end, v_token * UNIT, BN, V, VP)
    key = start + tl.arange(0, BN)
    reach = tl.where(key >= first, window, 0)  # keys at places below 0 do not exist

    low = tl.maximum(tl.maximum(start, first) - offset, 0)
    high = tl.minimum(start + BN + window - 1, end) - offset  # the last key belongs to the last query
    blocks = tl.maximum(tl.cdiv(high - low, BM), 0)
    half = (1 if PACKED else documents) * heads.to(tl.int64) * queries
    scale = scale.to(tl.float32, bitcast=True)
    c = scale * _LOG2_E
    acc_k = tl.zeros([BN, KP], tl.float32)
    acc_v = tl.zeros([BN, VP], tl.float32)
    i = tl.arange(0, BM)
    for step in range(blocks * R):
        r = step // blocks if R > 1 else step * 0
        m = low + (step - r * blocks) * BM
        head = tl.cast(group * R + r, tl.int64)
        q_tile = _rows(q + (row * q_row + head * q_head) * UNIT, m, high, q_token * UNIT, BM, K, KP)
        dout_tile = _rows(dout + (row * queries * heads + head) * V, m, high, heads * V, BM, V, VP)
        saved_at = saved + (row * heads + head) * queries + m + i
        lse = tl.load(saved_at, mask=m + i < high, other=float("inf"))  # no weight after the end
        delta = tl.load(saved_at + half, mask=m + i < high, other=0.0)
        seen = _sees(i[None, :] - (key - m - offset)[:, None], reach[:, None])
        p = tl.where(seen, tl.exp2(dot(k_tile, tl.trans(q_tile), PRECISION) * c - lse[None, :]), 0.0)
        acc_v = dot_add(p.to(dout_tile.dtype), dout_tile, acc_v, PRECISION)
        ds = p * (dot(v_tile, tl.trans(dout_tile), PRECISION) - delta[None, :])
        acc_k = dot_add(ds.to(q_tile.dtype), q_tile, acc_k, PRECISION)
    rows = (row * keys + start) * groups + group
    tile = (acc_k * scale).to(dk.dtype.element_ty)
    tl.store(_at(dk + rows * K, 0, groups * K, BN, KP), tile, mask=_within(start, end, BN, K, KP))
    tile = acc_v.to(dv.dtype.element_ty)
    tl.store(_at(dv + rows * V, 0, groups * V, BN, VP), tile, mask=_within(start, end, BN, V, VP))


@triton.jit(do_not_specialize=_NUMBERS[9:])
def _backward_sinks(
    part_k, part_v, dk, dv, position, bounds, documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, PLACED: tl.constexpr,
    BM: tl.constexpr, S: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up one document's parts [blocks, H, S, K or V] for one key head, over its blocks and the R query heads."""
    groups = heads // R
    columns: tl.constexpr = tl.cdiv(max(K, V), COLUMNS)
    d = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(0) // columns % groups
    document = tl.program_id(0) // columns // groups
    offset = keys - queries
    block = tl.load(bounds + document).to(tl.int32) // BM + document if PACKED else document * tl.cdiv(queries, BM)
    row, start, end, first = _block(block, bounds, position, documents, queries, offset, BM, PACKED, PLACED)
    i = tl.arange(0, ROWS)
    count = tl.cdiv(end - start, BM) * R
    for s in range(S):
        sum_k = tl.zeros([ROWS, COLUMNS], tl.float32)
        sum_v = tl.zeros([ROWS, COLUMNS], tl.float32)
        for item in range(0, count, ROWS):
            j = (item + i) // R
            last = tl.minimum(start + (j + 1) * BM, end) - 1 + offset
            written = ((item + i < count) & (last - first >= window))[:, None]
            part = (((block + j).to(tl.int64) * heads + group * R + (item + i) % R) * S + s)[:, None]
            sum_k += tl.load(part_k + part * K + d[None, :], mask=written & (d < K)[None, :], other=0.0)
            sum_v += tl.load(part_v + part * V + d[None, :], mask=written & (d < V)[None, :], other=0.0)
        own_k, own_v = tl.sum(sum_k, 0), tl.sum(sum_v, 0)
        if GIVEN:
            to = (row * S + s) * groups + group
            k_mask, v_mask = d < K, d < V
        else:
            key = tl.minimum(tl.maximum(first + s, 0), keys - 1)
            to = (row * keys + key) * groups + group
            # A document too short for this sink has no key there, but its neighbour may.
            used = end - 1 + offset - first - s >= window
            k_mask, v_mask = d < tl.where(used, K, 0), d < tl.where(used, V, 0)
            own_k += tl.load(dk + to * K + d, mask=k_mask, other=0.0).to(tl.float32)
            own_v += tl.load(dv + to * V + d, mask=v_mask, other=0.0).to(tl.float32)
        tl.store(dk + to * K + d, own_k.to(dk.dtype.element_ty), mask=k_mask)
        tl.store(dv + to * V + d, own_v.to(dv.dtype.element_ty), mask=v_mask)


def _blocks(tokens: int, size: int, batch: int, bounds: Tensor | None) -> int:
    """How many blocks `_block` numbers."""
    return batch * -(-tokens // size) if bounds is None else tokens // size + bounds.shape[0] - 1


def _shared(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, bounds: Tensor | None, window: int, scale: float
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Numbers and first constants of all kernels of a call."""
    documents = q.shape[0] if bounds is None else bounds.shape[0] - 1
    # A single row's stride grows with the length and is never used: 0.
    strides = [stride for x in (q, k, v) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))]
    # Numbers are not specialised; in units of 16 elements the compiler still sees that rows are aligned.
    unit = 1 if any(stride % 16 for stride in strides) else 16
    bits = struct.unpack("<i", struct.pack("<f", scale))[0]  # a number is whole
    numbers = (*(x // unit for x in strides), documents, q.shape[1], k.shape[1], q.shape[2], window, bits)
    widths = (q.shape[3], v.shape[3], power_of_2(q.shape[3]), power_of_2(v.shape[3]))
    shared = (q.shape[2] // k.shape[2], *widths, unit, bounds is not None, position is not None, precision(v.dtype))
    return numbers, shared


def _fake_forward(q, k, v, sink_k, sink_v, position, bounds, window, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@opaque("window_forward", _fake_forward)
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, position: Tensor | None,
    bounds: Tensor | None, window: int, sinks: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, queries, heads = q.shape[:3]
    out = torch.empty(batch, queries, heads, v.shape[3], dtype=v.dtype, device=v.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    numbers, shared = _shared(q, k, v, position, bounds, window, scale)
    tile = _tile("forward", q, v)
    programs = _blocks(queries, tile.queries, batch, bounds) * heads
    if out.numel():
        with on_device(q):
            tensors = (q, k, v, sink_k, sink_v, position, bounds, out, lse)
            constants = (*shared, tile.queries, tile.keys, sinks, 16, sink_k is not None)
            launch(_forward, programs, tensors, numbers, constants, tile.warps, tile.stages)
    return out, lse


def _fake_backward(q, k, v, sink_k, sink_v, position, bounds, out, lse, dout, dlse, window, sinks, scale):
    given = [] if sink_k is None else [torch.empty_like(sink_k), torch.empty_like(sink_v)]
    return [x.new_empty(x.shape) for x in (q, k, v)] + given


@opaque("window_backward", _fake_backward)
def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, position: Tensor | None,
    bounds: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    window: int, sinks: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of the sinks where they are given."""
    given = [x for x in (sink_k, sink_v) if x is not None]
    if not q.numel():
        return [x.new_zeros(x.shape) for x in (q, k, v, *given)]
    batch, queries, heads = q.shape[:3]
    groups = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=q.device) for x in (q, k, v))
    sink_grads = [torch.empty_like(x) for x in given]
    numbers, shared = _shared(q, k, v, position, bounds, window, scale)
    tile, key_tile = _tile("query", q, v), _tile("key", q, v)
    blocks = _blocks(queries, tile.queries, batch, bounds)
    saved = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=q.device)
    part_k, part_v = (torch.empty(blocks, heads, sinks, x.shape[3], dtype=saved.dtype, device=q.device) for x in (k, v))
    tensors: tuple[Tensor | None, ...]
    constants: tuple[Any, ...]
    with on_device(q):
        tensors = (q, k, v, sink_k, sink_v, position, bounds, out, lse, dout, dlse, dq, saved, part_k, part_v)
        several = SINKS[v.element_size()]
        constants = (*shared, tile.queries, tile.keys, sinks, several, sink_k is not None, dlse is not None)
        launch(_backward_q, blocks * heads, tensors, numbers, constants, tile.warps, tile.stages)
        tensors = (q, k, v, position, bounds, dout, saved, dk, dv)
        programs = _blocks(k.shape[1], key_tile.keys, batch, bounds) * groups
        constants = (*shared, key_tile.queries, key_tile.keys)
        launch(_backward_kv, programs, tensors, numbers, constants, key_tile.warps, key_tile.stages)
        if sinks:
            documents, columns = numbers[9], 32
            programs = documents * groups * -(-max(q.shape[3], v.shape[3]) // columns)
            tensors = (part_k, part_v, *(sink_grads or (dk, dv)), position, bounds)
            constants = (*shared[:3], *shared[6:8], tile.queries, sinks, sink_k is not None, 64, columns)
            launch(_backward_sinks, programs, tensors, numbers[9:], constants, 4, 1)
    return [dq, dk, dv, *sink_grads]


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_k, sink_v, position, bounds, window, sinks, scale):
        out, lse = _window_forward(q, k, v, sink_k, sink_v, position, bounds, window, sinks, scale)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, position, bounds, out, lse)
        ctx.options = window, sinks, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = _window_backward(*inputs, out, lse, dout, dlse, *ctx.options)
        sink_grads = grads[3:] or (None, None)
        return (*grads[:3], *sink_grads, None, None, None, None, None)


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
) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` keys (the token's own among them) and the document's first `sinks` keys.

    Args:
        q: [B, Tq, H, K]. q and k are computed in v's dtype.
        k, v: [B, Tk, G, K], [B, Tk, G, V], Tk >= Tq; the last key belongs to the last query.
        position: [B], the place in its document of the first query; negative by the number of pads on the left. Keys
            at places below 0 do not exist. None: the first key starts the document.
        sink_k, sink_v: [B, S, G, K or V], for a piece whose document began before it; None takes them from k and v.
        cu_seqlens: [N + 1] bounds of documents in a flattened batch of 1 (then Tk = Tq, no `position`, no `sink_k`).

    Returns:
        Output [B, Tq, H, V] in v's dtype and log-sum-exp of the scaled scores [B, Tq, H], fp32; gradients flow into
        both. A query without any key gives 0 and -inf.

    Raises:
        ValueError: an argument's shape, dtype, device or range is wrong; names it.
    """
    check_heads(q, k, v, same_length=False)
    check_scale(scale)
    check_bounds(cu_seqlens, q)
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
    return _Window.apply(q, k, v, sink_k, sink_v, position, cu_seqlens, window, sinks, float(scale))
