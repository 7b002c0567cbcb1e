"""What a decay a channel needs around the sweep: pairs inside a chunk, weighted inputs, and the gradients of both.

Inside a chunk of 64 the weight of a pair is exp(G_i - G_j) a channel, G the decay's sum since the chunk's start. Where
the whole chunk fades by less than e^-140 that is one product of factors around the middle of G's range. A steeper chunk
is split at halving blocks: in a block of 2h tokens the pairs of its upper half with its lower half are
(q exp(G_i - P)) . (k exp(P - G_j)), P = G at the last token of the lower half, so that no factor exceeds 1 whatever the
decay; six levels (h = 32 ... 1) and the diagonal cover the triangle. GLA (2312.06635) has two levels.

    q [rows, H, K]   k, g [rows, G, K]   scores [rows, H, 64]   C = 64 tokens of a chunk; slots as in sweep.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot, dot_add, launch, power_of_2
from .packed import packed_chunks
from .sweep import MARKED_VECTOR

CHUNK = 64
# Beyond this a token's weight is nothing (2e-22), and sums of larger numbers would lose the smaller ones.
LEAST_LOG_DECAY = tl.constexpr(-50.0)
# A chunk that fades no further is done in one piece, with factors of at most e^70 around its middle.
MILD = tl.constexpr(-140.0)
# Programs of a kernel that seldom has anything to do.
FEW = 528
# Channels at a time, whatever the head's size, and warps. Narrower dots read outside their shared memory on Hopper
# (Triton 3.6, found with compute-sanitizer): a configuration is admitted here once its numbers were checked.
PREPARE = (32, 4)
GRADIENT = (64, 4)


def chunk_table(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """First row, end and slot of every chunk of packed documents, its place in its document and that one's chunks, in
    [tokens // 64 + N, 5]; chunks past the last are empty. Nothing here waits for the device."""
    bounds = cu_seqlens.long()
    starts, document, place = packed_chunks(bounds, tokens, CHUNK)
    count = starts.diff()[document]
    inside = place < count
    first = bounds[document] + place * CHUNK
    end = torch.minimum(bounds[document + 1], first + CHUNK)
    return torch.stack([first * inside, end * inside, first // CHUNK + document, place, count], dim=1)


@triton.jit
def _chunk(table, chunk, T, CHUNKS, C: tl.constexpr, PACKED: tl.constexpr):
    """First row in memory, length and slot of a chunk."""
    if PACKED:
        start = tl.load(table + chunk * 5)
        return start, (tl.load(table + chunk * 5 + 1) - start).to(tl.int32), tl.load(table + chunk * 5 + 2)
    else:
        n, inside = chunk // CHUNKS, chunk % CHUNKS
        return n.to(tl.int64) * T + inside * C, tl.minimum(T - inside * C, C), chunk.to(tl.int64)


@triton.jit(do_not_specialize=["T", "chunks", "G", "g_batch", "g_token", "g_head"])
def cumulate_kernel(
    g,
    cum,
    table,
    T,
    chunks,
    G,
    g_batch,
    g_token,
    g_head,
    C: tl.constexpr,
    BG: tl.constexpr,
    PACKED: tl.constexpr,
):
    """cum [B, G, T] = the sum of a scalar decay g [B, T, G] since the chunk's start."""
    blocks = tl.cdiv(G, BG)
    head = (tl.program_id(0) % blocks) * BG + tl.arange(0, BG)
    chunk = tl.program_id(0) // blocks
    start, length, _ = _chunk(table, chunk, T, chunks, C, PACKED)
    n = start * 0 if PACKED else start // T
    rows = tl.arange(0, C)
    there = (rows < length)[:, None] & (head < G)[None, :]
    at = n * g_batch + (start - n * T + rows[:, None]) * g_token + head[None, :] * g_head
    step = tl.maximum(tl.load(g + at, mask=there, other=0).to(tl.float32), LEAST_LOG_DECAY)
    at = (n * G + head[None, :]) * T + start - n * T + rows[:, None]
    tl.store(cum + at, tl.cumsum(step, 0), mask=there)


@triton.jit
def _decay(g, at, there):
    """A chunk's decays, their sums up to each token and that of all, [C, BK], [C, BK] and [BK]."""
    step = tl.maximum(tl.load(g + at, mask=there, other=0).to(tl.float32), LEAST_LOG_DECAY)
    return step, tl.cumsum(step, 0), tl.sum(step, 0)


@triton.jit
def _level(step, sums, rows, level, C: tl.constexpr):
    """Of blocks of 64 >> level tokens: exp(-|G - P|), whether a row lies in its upper half, and pairs of one block."""
    pivot = ((rows >> (6 - level)) << (6 - level)) + (32 >> level) - 1
    until = (rows[None, :] <= pivot[:, None]).to(tl.float32)
    # Both halves take the same P, so that its rounding cancels.
    fade = tl.exp(-tl.abs(sums - dot(until, step, "tf32x3")))
    same = (rows[:, None] >> (6 - level)) == (rows[None, :] >> (6 - level))
    return fade, ((rows >> (5 - level)) & 1) == 1, same


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare_kernel(
    q,
    k,
    g,
    q_in,
    k_out,
    scores,
    whole_out,
    least,
    table,
    T,
    chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q_in = q exp(G_i), k_out = k exp(G_end - G_j), the pairs inside the chunk, its whole decay [slots, G, K] and the
    strongest of those, `least` [slots, G]; one program a chunk and head. Pairs of a chunk that fades further than one
    factor can hold come out wrong, and right from `pairs_kernel`."""
    OPERAND: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    h = tl.program_id(0) % H
    group = h // (H // G)
    start, length, slot = _chunk(table, tl.program_id(0) // H, T, chunks, C, PACKED)
    rows = tl.arange(0, C)
    owner = h % (H // G) == 0
    pairs = tl.zeros([C, C], tl.float32)
    steepest = 0.0
    for block in range((K + BK - 1) // BK):
        channel = block * BK + tl.arange(0, BK)
        there = (rows < length)[:, None] & (channel < K)[None, :]
        at_q = (start * H + h) * K + rows[:, None] * (H * K) + channel[None, :]
        at_k = (start * G + group) * K + rows[:, None] * (G * K) + channel[None, :]
        q_t = tl.load(q + at_q, mask=there, other=0).to(tl.float32)
        k_t = tl.load(k + at_k, mask=there, other=0).to(tl.float32)
        _, sums, whole = _decay(g, at_k, there)
        middle = tl.minimum(tl.maximum(sums - 0.5 * whole[None, :], 0.5 * MILD), -0.5 * MILD)
        q_half, k_half = (q_t * tl.exp(middle)).to(OPERAND), (k_t * tl.exp(-middle)).to(OPERAND)
        pairs = dot_add(q_half, tl.trans(k_half), pairs, PRECISION)
        tl.store(q_in + at_q, (q_t * tl.exp(sums)).to(q_in.dtype.element_ty), mask=there)
        if owner:
            faded = k_t * tl.exp(tl.where(there, whole[None, :] - sums, 0))
            tl.store(k_out + at_k, faded.to(k_out.dtype.element_ty), mask=there)
            in_slot = channel < tl.where(length > 0, K, 0)
            tl.store(whole_out + (slot * G + group) * K + channel, whole, mask=in_slot)
        steepest = tl.minimum(steepest, tl.min(whole, 0))
    pairs = tl.where((rows[:, None] >= rows[None, :]) & (rows < length)[None, :], pairs, 0.0)
    at_pair = (start * H + h) * C + rows[:, None] * (H * C) + rows[None, :]
    tl.store(scores + at_pair, pairs.to(scores.dtype.element_ty), mask=(rows < length)[:, None])
    if owner & (length > 0):
        tl.store(least + slot * G + group, steepest)


@triton.jit(do_not_specialize=["T", "chunks", "items"])
def pairs_kernel(
    q,
    k,
    g,
    scores,
    least,
    table,
    T,
    chunks,
    items,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The pairs inside those chunks that fade too far for `prepare_kernel`, level by level; few programs, as there are
    seldom any."""
    OPERAND: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    rows = tl.arange(0, C)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        item += tl.program_id(0) * 0  # the interpreter counts in Python's numbers
        h = item % H
        group = h // (H // G)
        start, length, slot = _chunk(table, item // H, T, chunks, C, PACKED)
        steep = False
        if length > 0:
            steep = tl.load(least + slot * G + group) < MILD
        if steep:
            pairs = tl.zeros([C, C], tl.float32)
            for block in range((K + BK - 1) // BK):
                channel = block * BK + tl.arange(0, BK)
                there = (rows < length)[:, None] & (channel < K)[None, :]
                at_q = (start * H + h) * K + rows[:, None] * (H * K) + channel[None, :]
                at_k = (start * G + group) * K + rows[:, None] * (G * K) + channel[None, :]
                q_t = tl.load(q + at_q, mask=there, other=0).to(tl.float32)
                k_t = tl.load(k + at_k, mask=there, other=0).to(tl.float32)
                step, sums, _ = _decay(g, at_k, there)
                pairs += tl.where(rows[:, None] == rows[None, :], tl.sum(q_t * k_t, 1)[:, None], 0.0)
                for level in range(6):  # not unrolled: that would take many seconds to compile
                    fade, upper, same = _level(step, sums, rows, level, C)
                    q_up = tl.where(upper[:, None], q_t * fade, 0).to(OPERAND)
                    k_low = tl.where(upper[:, None], 0, k_t * fade).to(OPERAND)
                    pairs += tl.where(same, dot(q_up, tl.trans(k_low), PRECISION), 0.0)
            at_pair = (start * H + h) * C + rows[:, None] * (H * C) + rows[None, :]
            tl.store(scores + at_pair, pairs.to(scores.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit(do_not_specialize=["T", "chunks", "items"])
def gradient_kernel(
    q,
    k,
    v,
    do,
    dz,
    g,
    least,
    dq,
    dk,
    dg,
    sums_dg,
    table,
    T,
    chunks,
    items,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    DECAY: tl.constexpr,
    STEEP: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the pairs inside the chunk to dq and dk [rows, H, K], which hold what other chunks give, before the decay to
    the chunk's edge. dg [rows, H, K] is its reverse sum inside the chunk, sums_dg [slots, H, K] its total. STEEP takes
    the chunks that fade further than one factor can hold, level by level, and not STEEP the others."""
    OPERAND: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    rows = tl.arange(0, C)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        item += tl.program_id(0) * 0  # the interpreter counts in Python's numbers
        h = item % H
        group = h // (H // G)
        start, length, slot = _chunk(table, item // H, T, chunks, C, PACKED)
        mine = False
        if length > 0:
            mine = (tl.load(least + slot * G + group) < MILD) == STEEP
        if mine:
            column = tl.arange(0, BV)
            live = rows < length
            # do . v of every pair, twice: a transposed dot result must not enter a dot.
            in_v = live[:, None] & (column < V)[None, :]
            v_at, do_at = v + (start * G + group) * V, do + (start * H + h) * V
            v_t = tl.load(v_at + rows[:, None] * (G * V) + column[None, :], mask=in_v, other=0).to(OPERAND)
            do_t = tl.load(do_at + rows[:, None] * (H * V) + column[None, :], mask=in_v, other=0).to(OPERAND)
            grad = dot(do_t, tl.trans(v_t), PRECISION)
            grad_T = dot(v_t, tl.trans(do_t), PRECISION)
            if STEEP:
                own = tl.sum(do_t.to(tl.float32) * v_t.to(tl.float32), 1)
            if NORM:
                n = start * 0 if PACKED else start // T
                slope = tl.load(dz + (n * H + h) * T + start - n * T + rows, mask=live, other=0)
                grad += slope[:, None]
                grad_T += slope[None, :]
                if STEEP:
                    own += slope
            if not STEEP:
                grad = tl.where(rows[:, None] >= rows[None, :], grad, 0.0).to(OPERAND)
                grad_T = tl.where(rows[None, :] >= rows[:, None], grad_T, 0.0).to(OPERAND)

            for block in range((K + BK - 1) // BK):
                channel = block * BK + tl.arange(0, BK)
                there = live[:, None] & (channel < K)[None, :]
                at_q = (start * H + h) * K + rows[:, None] * (H * K) + channel[None, :]
                at_k = (start * G + group) * K + rows[:, None] * (G * K) + channel[None, :]
                q_t = tl.load(q + at_q, mask=there, other=0).to(tl.float32)
                k_t = tl.load(k + at_k, mask=there, other=0).to(tl.float32)
                dq_t = tl.load(dq + at_q, mask=there, other=0).to(tl.float32)
                dk_t = tl.load(dk + at_q, mask=there, other=0).to(tl.float32)
                step, sums, whole = _decay(g, at_k, there)
                if STEEP:
                    dq_t = dq_t * tl.exp(sums) + own[:, None] * k_t
                    dk_t = dk_t * tl.exp(tl.where(there, whole[None, :] - sums, 0)) + own[:, None] * q_t
                    for level in range(6):
                        fade, upper, same = _level(step, sums, rows, level, C)
                        q_up = tl.where(upper[:, None], q_t * fade, 0).to(OPERAND)
                        k_low = tl.where(upper[:, None], 0, k_t * fade).to(OPERAND)
                        lower = upper == 0
                        here = tl.where(same & upper[:, None] & lower[None, :], grad, 0).to(OPERAND)
                        here_T = tl.where(same & lower[:, None] & upper[None, :], grad_T, 0).to(OPERAND)
                        dq_t += fade * dot(here, k_low, PRECISION)
                        dk_t += fade * dot(here_T, q_up, PRECISION)
                else:
                    up = tl.exp(sums - 0.5 * whole[None, :])
                    down = tl.exp(0.5 * whole[None, :] - sums)
                    edge = tl.exp(0.5 * whole)[None, :]
                    dq_t = dot_add(grad, (k_t * down).to(OPERAND), dq_t * edge, PRECISION) * up
                    dk_t = dot_add(grad_T, (q_t * up).to(OPERAND), dk_t * edge, PRECISION) * down
                tl.store(dq + at_q, dq_t.to(dq.dtype.element_ty), mask=there)
                tl.store(dk + at_q, dk_t.to(dk.dtype.element_ty), mask=there)
                if DECAY:
                    gain = tl.where(there, q_t * dq_t - k_t * dk_t, 0)
                    tl.store(dg + at_q, tl.cumsum(gain, 0, reverse=True).to(dg.dtype.element_ty), mask=there)
                    tl.store(sums_dg + (slot * H + h) * K + channel, tl.sum(gain, 0), mask=channel < K)


@triton.jit(do_not_specialize=["T", "chunks"])
def finish_kernel(
    local,
    sums_dg,
    edges,
    dg,
    table,
    T,
    chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dg [rows, G, K], summed over the key head's query heads: `local` [rows, H, K] inside the chunk, `sums_dg`
    [slots, H, K] of the chunks after it up to the next mark, and what is owed from there on, `edges` [slots, H, K]."""
    group = tl.program_id(0) % G
    chunk = tl.program_id(0) // G
    start, length, slot = _chunk(table, chunk, T, chunks, C, PACKED)
    rows, channel = tl.arange(0, C), tl.arange(0, BK)
    there = (rows < length)[:, None] & (channel < K)[None, :]
    place, count = chunk % chunks, chunks
    if PACKED:
        place, count = tl.load(table + chunk * 5 + 3).to(tl.int32), tl.load(table + chunk * 5 + 4).to(tl.int32)
    left = tl.minimum(MARKED_VECTOR - 1 - place % MARKED_VECTOR, count - 1 - place)
    total = tl.zeros([C, BK], tl.float32)
    for r in range(H // G):
        h = group * (H // G) + r
        at = (start * H + h) * K + rows[:, None] * (H * K) + channel[None, :]
        total += tl.load(local + at, mask=there, other=0).to(tl.float32)
        later = tl.load(edges + ((slot + left) * H + h) * K + channel, mask=channel < K, other=0)
        for i in range(left):
            later += tl.load(sums_dg + ((slot + 1 + i) * H + h) * K + channel, mask=channel < K, other=0)
        total += later[None, :]
    at = (start * G + group) * K + rows[:, None] * (G * K) + channel[None, :]
    tl.store(dg + at, total.to(dg.dtype.element_ty), mask=there)


def _chunks(batch: int, tokens: int, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The chunk table of packed documents, the chunks of a row of the batch, and the slots of all chunks."""
    if cu_seqlens is None:
        each = -(-tokens // CHUNK)
        return None, each, batch * each
    table = chunk_table(cu_seqlens, tokens)
    return table, table.shape[0], table.shape[0]


def cumulate(g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum of a scalar decay g [B, T, G] since each chunk's start, [B, G, T]."""
    batch, tokens, groups = g.shape
    table, each, count = _chunks(batch, tokens, cu_seqlens)
    cum = torch.empty(batch, groups, tokens, dtype=torch.float32, device=g.device)
    width = min(32, power_of_2(groups))
    launch(
        cumulate_kernel,
        count * -(-groups // width),
        (g, cum, table),
        (tokens, each, groups, g.stride(0), g.stride(1), g.stride(2)),
        (CHUNK, width, cu_seqlens is not None),
        4,
        1,
    )
    return cum


class Prepared(NamedTuple):
    """q and k weighted to the chunk's edges, the pairs inside it [B, T, H, 64], its whole decay [slots, G, K] and the
    strongest channel's [slots, G]."""

    q_in: Tensor
    k_out: Tensor
    scores: Tensor
    whole: Tensor
    least: Tensor


def prepare(q: Tensor, k: Tensor, g: Tensor, cu_seqlens: Tensor | None, wide: bool, precision: str) -> Prepared:
    """Weighs the inputs of a sweep by a vector decay g [B, T, G, K]."""
    batch, tokens, heads, channels = q.shape
    groups = k.shape[2]
    table, each, count = _chunks(batch, tokens, cu_seqlens)
    dtype = torch.float32 if wide else torch.bfloat16
    made = Prepared(
        torch.empty_like(q, dtype=dtype),
        torch.empty_like(k, dtype=dtype),
        torch.empty(batch, tokens, heads, CHUNK, dtype=dtype, device=q.device),
        torch.empty(count, groups, channels, dtype=torch.float32, device=q.device),
        torch.empty(count, groups, dtype=torch.float32, device=q.device),
    )
    numbers = (tokens, each)
    constants = (heads, groups, channels, PREPARE[0], CHUNK, cu_seqlens is not None, wide, precision)
    items = count * heads
    launch(
        prepare_kernel,
        items,
        (q, k, g, made.q_in, made.k_out, made.scores, made.whole, made.least, table),
        numbers,
        constants,
        PREPARE[1],
        1,
    )
    tensors = (q, k, g, made.scores, made.least, table)
    launch(pairs_kernel, min(items, FEW), tensors, (*numbers, items), constants, 8, 1)
    return made


def complete(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dz: Tensor | None,
    g: Tensor,
    prepared: Prepared,
    dq: Tensor,
    dk: Tensor,
    cu_seqlens: Tensor | None,
    wide: bool,
    precision: str,
    edges: Tensor | None,
) -> Tensor | None:
    """Adds the pairs inside the chunks to dq and dk [B, T, H, K], in place; the gradient of g where `edges` is given,
    [slots, H, K], what a dk sweep leaves at its marks."""
    batch, tokens, heads, channels = q.shape
    groups, columns = v.shape[2:]
    table, each, count = _chunks(batch, tokens, cu_seqlens)
    local = sums = None
    if edges is not None:
        local = torch.empty_like(q, dtype=dq.dtype)
        sums = torch.empty(count, heads, channels, dtype=torch.float32, device=q.device)
    packed = cu_seqlens is not None
    for steep in (False, True):
        launch(
            gradient_kernel,
            min(count * heads, FEW) if steep else count * heads,
            (q, k, v, do, dz, g, prepared.least, dq, dk, local, sums, table),
            (tokens, each, count * heads),
            (
                heads,
                groups,
                channels,
                columns,
                GRADIENT[0],
                power_of_2(columns),
                CHUNK,
                dz is not None,
                edges is not None,
                steep,
                packed,
                wide,
                precision,
            ),
            GRADIENT[1],
            1,
        )
    if edges is None:
        return None
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    launch(
        finish_kernel,
        count * groups,
        (local, sums, edges, dg, table),
        (tokens, each),
        (heads, groups, channels, power_of_2(channels), CHUNK, packed),
        4,
        1,
    )
    return dg
