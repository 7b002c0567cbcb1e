"""The kernels of `window_attention`: forward, dq, dk and dv, and the sum of the sinks' gradients.

A program takes one block of queries (`forward_kernel`, `query_kernel`) or of keys (`key_kernel`) of one head and walks
over the blocks in reach; `sinks_kernel` takes one document and key head.

    q [B, Tq, H, K]   k [B, Tk, G, K]   v [B, Tk, G, V]   out [B, Tq, H, V]   lse [B, Tq, H]
    R = H / G query heads share a key head   BM queries and BN keys of a block   S sinks, SP of them at a time
    KP, VP = K, V up to a power of two   strides in units of UNIT elements
    CAP bounds the logits, 0 does not   slopes [H] with ALIBI
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, dot_add

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


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
def _bound(score, CAP: tl.constexpr):
    """Logits (base 2) bounded by CAP: CAP tanh(s / CAP)."""
    if CAP > 0:
        e = tl.exp2(-tl.abs(score) * (2.0 / CAP))
        tanh = (1.0 - e) / (1.0 + e)
        score = tl.where(score < 0, -tanh, tanh) * (CAP * LOG2_E)
    return score


@triton.jit
def _unbound(grad, score, CAP: tl.constexpr):
    """A gradient of bounded logits, as it goes on to those from before, `score` (base 2)."""
    if CAP > 0:
        e = tl.exp2(-tl.abs(score) * (2.0 / CAP))
        grad *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, which would lose its digits
    return grad


@triton.jit
def _slope(slopes, head, ALIBI: tl.constexpr):
    """What a token of distance takes off a head's logits (base 2)."""
    return tl.load(slopes + head) * LOG2_E if ALIBI else 0.0


@triton.jit
def _lean(score, distance, slope, ALIBI: tl.constexpr):
    """Logits (base 2) of keys at `distance`."""
    if ALIBI:
        score -= distance.to(tl.float32) * slope
    return score


@triton.jit
def _raise(top, score):
    """New largest score (base 2), what to take off scores before their exponential, what the sums so far keep."""
    new = tl.maximum(top, score)
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, shift, tl.exp2(top - shift)


NUMBERS = ["q_row", "q_token", "q_head", "k_row", "k_token", "k_head", "v_row", "v_token", "v_head"]
NUMBERS += ["documents", "queries", "keys", "heads", "window", "scale"]


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, GIVEN: tl.constexpr,
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
    c = scale * LOG2_E
    slope = _slope(slopes, head, ALIBI)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VP], tl.float32)
    # Before the loop: its first loads wait for the queries' anyway, and nothing has to be rescaled yet.
    used = high - 1 - first >= window
    for least in range(0, S, SP):
        s = least + tl.arange(0, SP)
        k_tile = _sinks(k, sink_k, row, group, heads // R, first, keys, k_token * UNIT, s, S, K, KP, GIVEN, used)
        v_tile = _sinks(v, sink_v, row, group, heads // R, first, keys, v_token * UNIT, s, S, V, VP, GIVEN, used)
        distance = index[:, None] - first - s[None, :]
        beyond = (distance >= window) & (s < S)[None, :]
        scores = _bound(dot(q_tile, tl.trans(k_tile), PRECISION) * c, CAP)
        scores = tl.where(beyond, _lean(scores, distance, slope, ALIBI), float("-inf"))
        top, shift, keep = _raise(top, tl.max(scores, 1))
        p = tl.exp2(scores - shift[:, None])
        total = total * keep + tl.sum(p, 1)
        acc = dot_add(p.to(v_tile.dtype), v_tile, acc * keep[:, None], PRECISION)
    for n in range(low, high, BN):
        k_tile = _rows(k, n, high, k_token * UNIT, BN, K, KP)
        v_tile = _rows(v, n, high, v_token * UNIT, BN, V, VP)
        distance = index[:, None] - (n + tl.arange(0, BN))[None, :]
        seen = _sees(distance, reach[:, None])
        scores = _bound(dot(q_tile, tl.trans(k_tile), PRECISION) * c, CAP)
        scores = tl.where(seen, _lean(scores, distance, slope, ALIBI), float("-inf"))
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
    tile = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN_2)
    tl.store(lse + rows + i * heads, tile, mask=start + i < end)


@triton.jit(do_not_specialize=NUMBERS)
def query_kernel(
    q, k, v, sink_k, sink_v, position, bounds, slopes, out, lse, dout, dlse, dq, saved, part_k, part_v,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, GIVEN: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """dq; lse and delta, saved for `key_kernel` [2, B, H, Tq]; this block's part of the sinks' gradients."""
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
    own_lse *= LOG2_E
    saved += (row * heads + head) * queries + start
    tl.store(saved + i, own_lse, mask=real)
    half = (1 if PACKED else documents) * heads.to(tl.int64) * queries
    tl.store(saved + half + i, delta, mask=real)

    index, reach, low, high = _window(start, end, offset, first, window, BM)
    scale = scale.to(tl.float32, bitcast=True)
    c = scale * LOG2_E
    slope = _slope(slopes, head, ALIBI)
    acc = tl.zeros([BM, KP], tl.float32)
    used = high - 1 - first >= window
    for least in range(0, S, SP):
        s = least + tl.arange(0, SP)
        k_tile = _sinks(k, sink_k, row, group, heads // R, first, keys, k_token * UNIT, s, S, K, KP, GIVEN, used)
        v_tile = _sinks(v, sink_v, row, group, heads // R, first, keys, v_token * UNIT, s, S, V, VP, GIVEN, used)
        if SP == 1:
            q_wide, dout_wide = q_tile.to(tl.float32), dout_tile.to(tl.float32)
            scores = tl.sum(q_wide * k_tile, 1) * c
            distance = index - first - least
            p = tl.exp2(_lean(_bound(scores, CAP), distance, slope, ALIBI) - own_lse)
            p = tl.where(distance >= window, p, 0.0)
            ds = _unbound(p * (tl.sum(dout_wide * v_tile, 1) - delta), scores, CAP)
            acc += ds[:, None] * k_tile
            own_k = tl.sum(ds[:, None] * q_wide, 0)[None, :]
            own_v = tl.sum(p[:, None] * dout_wide, 0)[None, :]
        else:
            distance = index[:, None] - first - s[None, :]
            beyond = (distance >= window) & (s < S)[None, :]
            scores = dot(q_tile, tl.trans(k_tile), PRECISION) * c
            p = tl.where(beyond, tl.exp2(_lean(_bound(scores, CAP), distance, slope, ALIBI) - own_lse[:, None]), 0.0)
            ds = _unbound(p * (dot(dout_tile, tl.trans(v_tile), PRECISION) - delta[:, None]), scores, CAP)
            acc = dot_add(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
            # The same again with the sinks as rows, from memory: a transposed p is not to be fed to a dot.
            distance = index[None, :] - first - s[:, None]
            beyond = (distance >= window) & (s < S)[:, None]
            scores = dot(k_tile, tl.trans(q_tile), PRECISION) * c
            p = tl.where(beyond, tl.exp2(_lean(_bound(scores, CAP), distance, slope, ALIBI) - own_lse[None, :]), 0.0)
            ds = _unbound(p * (dot(v_tile, tl.trans(dout_tile), PRECISION) - delta[None, :]), scores, CAP)
            own_k = dot(ds.to(q_tile.dtype), q_tile, PRECISION)
            own_v = dot(p.to(dout_tile.dtype), dout_tile, PRECISION)
        part = (block.to(tl.int64) * heads + head) * S
        last = tl.where(used, S, 0)
        tl.store(_at(part_k + part * K, least, K, SP, KP), own_k * scale, mask=_within(least, last, SP, K, KP))
        tl.store(_at(part_v + part * V, least, V, SP, VP), own_v, mask=_within(least, last, SP, V, VP))
    for n in range(low, high, BN):
        k_tile = _rows(k, n, high, k_token * UNIT, BN, K, KP)
        v_tile = _rows(v, n, high, v_token * UNIT, BN, V, VP)
        distance = index[:, None] - (n + tl.arange(0, BN))[None, :]
        seen = _sees(distance, reach[:, None])
        scores = dot(q_tile, tl.trans(k_tile), PRECISION) * c
        p = tl.where(seen, tl.exp2(_lean(_bound(scores, CAP), distance, slope, ALIBI) - own_lse[:, None]), 0.0)
        ds = _unbound(p * (dot(dout_tile, tl.trans(v_tile), PRECISION) - delta[:, None]), scores, CAP)
        acc = dot_add(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
    tile = (acc * scale).to(dq.dtype.element_ty)
    tl.store(_at(dq + rows * K, 0, heads * K, BM, KP), tile, mask=_within(start, end, BM, K, KP))


@triton.jit(do_not_specialize=NUMBERS)
def key_kernel(
    q, k, v, position, bounds, slopes, dout, saved, dk, dv,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    documents, queries, keys, heads, window, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
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
    c = scale * LOG2_E
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
        distance = i[None, :] - (key - m - offset)[:, None]
        seen = _sees(distance, reach[:, None])
        scores = dot(k_tile, tl.trans(q_tile), PRECISION) * c
        slope = _slope(slopes, head, ALIBI)
        p = tl.where(seen, tl.exp2(_lean(_bound(scores, CAP), distance, slope, ALIBI) - lse[None, :]), 0.0)
        acc_v = dot_add(p.to(dout_tile.dtype), dout_tile, acc_v, PRECISION)
        ds = _unbound(p * (dot(v_tile, tl.trans(dout_tile), PRECISION) - delta[None, :]), scores, CAP)
        acc_k = dot_add(ds.to(q_tile.dtype), q_tile, acc_k, PRECISION)
    rows = (row * keys + start) * groups + group
    tile = (acc_k * scale).to(dk.dtype.element_ty)
    tl.store(_at(dk + rows * K, 0, groups * K, BN, KP), tile, mask=_within(start, end, BN, K, KP))
    tile = acc_v.to(dv.dtype.element_ty)
    tl.store(_at(dv + rows * V, 0, groups * V, BN, VP), tile, mask=_within(start, end, BN, V, VP))


@triton.jit(do_not_specialize=NUMBERS[9:])
def sinks_kernel(
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
