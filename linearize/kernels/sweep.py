"""The engine: one sweep over the chunks of a sequence with the state in registers, and the states of its segments.

`sweep_kernels.py` makes the output and its gradients of it.

A sweep computes, for every token i and the tokens j it may see (j <= i, or j >= i in a reverse sweep),

    out_i = sum_j w_ij (a_i . b_j) c_j        w_ij the decay between i and j

and the forward pass and all three gradients of linear attention are sweeps (d marks a gradient):

    out = sweep(q, k, v)    dq = sweep(do, v, k)    dk = sweep(v, do, q), reverse    dv = sweep(k, q, do), reverse

A scalar decay comes as `cum` [B, heads, T], its sum since the chunk's start, a vector one as the sums of whole chunks,
[slots, heads, K]. A vector decay lies on the contracted channels of the first and last (GATE ROWS) and on the output's
in the others (GATE COLUMNS); there `vector_decay.py` has weighted the inputs and the pairs inside a chunk beforehand,
and the sweep carries the state alone. Where heads alone are too few programs, time is split into segments:
`states_kernel` adds up each segment's own state, and each program of the sweep joins those before its own.

    a, b [rows, heads, A]   c [rows, heads, W]   out [rows, H, W]   state [A, W]   C tokens of a chunk
    (rows B * T; the heads of a, b, c divide H; N documents, S segments; a chunk's slot is its place among all chunks of
    the batch, and its first row // 64 + its document's index where documents are packed)

Sources: Sun et al. 2023 (RetNet), Yang et al. 2023 (GLA), Dao and Gu 2024 (SSD); the segments are those of sequence
parallelism (LASP-2, 2502.07563) on one device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, dot_add

NONE, SCALAR, ROWS, COLUMNS = 0, 1, 2, 3
# Chunks between two states that the gradient of a decay begins from, by its kind. In bf16 a scalar's error is 0.35 % at
# 2, 0.6 % at 8 and 0.9 % at 32; a vector's sums have fewer terms to average. Each state is written and read.
MARKED_SCALAR, MARKED_VECTOR = tl.constexpr(8), tl.constexpr(2)
_SCALAR, _ROWS, _COLUMNS = tl.constexpr(SCALAR), tl.constexpr(ROWS), tl.constexpr(COLUMNS)


@triton.jit(do_not_specialize=["T", "span", "segments", "skip"])
def states_kernel(
    b,
    c,
    cum,
    weight,
    update,
    update_n,
    total,
    T,
    span,
    segments,
    skip,
    H: tl.constexpr,
    HB: tl.constexpr,
    HC: tl.constexpr,
    HG: tl.constexpr,
    A: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BW: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHED: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A segment's own state `update` [N, H, S, A, W], its normaliser [N, H, S, A] and log decay [N, H, S(, A)].

    The segment `skip` (the last of a forward sweep, the first of a reverse one) is left out: nobody reads it.
    """
    OPERAND: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    pid = tl.program_id(0)
    tiles: tl.constexpr = (W + BW - 1) // BW
    tile = pid % tiles
    pid = pid // tiles
    slot = pid % (segments - 1)
    pid = pid // (segments - 1)
    h = pid % H
    n = pid // H
    segment = slot + tl.where(slot >= skip, 1, 0)
    base = n.to(tl.int64) * T
    first = segment * span
    last = tl.minimum(first + span, T)
    at = (n.to(tl.int64) * H + h) * segments + segment

    rows = tl.arange(0, C)
    channel, column = tl.arange(0, BA), tile * BW + tl.arange(0, BW)
    in_a, in_w = channel < A, column < W
    b += (base * HB + h // (H // HB)) * A
    c += (base * HC + h // (H // HC)) * W
    if GATE == _SCALAR:
        cum += (n.to(tl.int64) * HG + h // (H // HG)) * T
    elif GATE == _ROWS:
        cum += ((n.to(tl.int64) * tl.cdiv(T, C) + first // C) * HG + h // (H // HG)) * A
    if WEIGHED:
        weight += (n.to(tl.int64) * HB + h // (H // HB)) * T
    state = tl.zeros([BA, BW], tl.float32)
    norm = tl.zeros([BA], tl.float32)
    decayed = tl.zeros([BA], tl.float32) if GATE == _ROWS else 0.0
    count = tl.cdiv(last - first, C)
    ahead = count - 1 if REVERSE else 0
    if GATE == _SCALAR:
        inside = tl.load(cum + tl.minimum(first + ahead * C + rows, last - 1))
        whole = tl.load(cum + tl.minimum(first + ahead * C + C, last) - 1)
    elif GATE == _ROWS:
        whole = tl.load(cum + ahead * HG * A + channel, mask=in_a, other=0)
    for i in range(count):
        t0 = (first + (count - 1 - i if REVERSE else i) * C).to(tl.int64)
        live = rows < last - t0
        bT = tl.load(
            b + t0 * HB * A + rows[None, :] * (HB * A) + channel[:, None],
            mask=in_a[:, None] & live[None, :],
            other=0,
        ).to(OPERAND)
        ct = tl.load(
            c + t0 * HC * W + rows[:, None] * (HC * W) + column[None, :], mask=live[:, None] & in_w[None, :], other=0
        ).to(OPERAND)
        share = live.to(tl.float32)
        if WEIGHED:
            share = tl.load(weight + t0 + rows, mask=live, other=0)
        if GATE == _SCALAR:
            fade = tl.exp(inside if REVERSE else whole - inside)
            ct = (ct * fade[:, None]).to(OPERAND)
            share *= fade
            state = state * tl.exp(whole)
            norm = norm * tl.exp(whole)
            decayed += whole
        elif GATE == _ROWS:
            state = state * tl.exp(whole)[:, None]
            norm = norm * tl.exp(whole)
            decayed += whole
        if NORM:
            norm += tl.sum(bT.to(tl.float32) * share[None, :], 1)
        state = dot_add(bT, ct, state, PRECISION)
        ahead = tl.maximum(count - 2 - i, 0) if REVERSE else tl.minimum(i + 1, count - 1)
        if GATE == _SCALAR:
            inside = tl.load(cum + tl.minimum(first + ahead * C + rows, last - 1))
            whole = tl.load(cum + tl.minimum(first + ahead * C + C, last) - 1)
        elif GATE == _ROWS:
            whole = tl.load(cum + ahead * HG * A + channel, mask=in_a, other=0)
    place = channel[:, None] * W + column[None, :]
    tl.store(update + at * A * W + place, state, mask=in_a[:, None] & in_w[None, :])
    if tile == 0:
        if NORM:
            tl.store(update_n + at * A + channel, norm, mask=in_a)
        if GATE == _SCALAR:
            tl.store(total + at, decayed)
        elif GATE == _ROWS:
            tl.store(total + at * A + channel, decayed, mask=in_a)


@triton.jit
def sweep_tile(
    pid,
    tile,
    a,
    b,
    c,
    out,
    cum,
    bounds,
    T,
    span,
    segments,
    H: tl.constexpr,
    HA: tl.constexpr,
    HB: tl.constexpr,
    HC: tl.constexpr,
    HG: tl.constexpr,
    HS: tl.constexpr,
    HN: tl.constexpr,
    HO: tl.constexpr,
    state_row: tl.constexpr,
    state_column: tl.constexpr,
    A: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BW: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    BEGIN: tl.constexpr,
    JOIN: tl.constexpr,
    KEEP: tl.constexpr,
    END: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    scores=None,
    z=None,
    dz=None,
    begin=None,
    begin_n=None,
    update=None,
    update_n=None,
    total=None,
    starts=None,
    starts_n=None,
    end=None,
    end_n=None,
    other=None,
    lines=None,
    marks=None,
    marks_n=None,
    line: tl.constexpr = 0,
    LINES: tl.constexpr = 0,
):
    """One tile of a sweep: columns `tile` of W in the document, head and segment that `pid` says.

    States in memory are [N, HS, (S,) A, W] with strides `state_row` and `state_column`, so that the state of dq and dk
    is the other's, transposed. BEGIN: `begin` [N, HN, A, W] is the state before the first segment. JOIN: 0 for one
    segment, 1 to join `update` of the segments before, 2 to read `starts` [N, HS, S, A, W], which KEEP writes. END:
    writes the state after the last one. NORM: 1 also gives z_i = sum_j w_ij a_i . b_j; 2 adds z's gradient, `dz`, to
    a_i . b_j: that of i in dq, that of j in dk.
    DECAY_GRADIENT: leaves what `decay_gradient.py` makes the decay's gradient of, in dq's and dk's sweeps: the state
    every MARKED chunks, `marks` [.., HS, A, W] and `marks_n` [.., HS, W], and for a scalar decay q . dq or -k . dk in
    fp32, one tile's share, `lines` [B, H, LINES, T] at `line` + tile (`other` is q or k).
    """
    OPERAND: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    segment = pid % segments
    pid = pid // segments
    h = pid % H
    n = pid // H
    if PACKED:
        base = tl.load(bounds + n).to(tl.int64)
        length = (tl.load(bounds + n + 1) - base).to(tl.int32)
    else:
        base = n.to(tl.int64) * T
        length = T
    first = segment * span
    last = tl.minimum(first + span, length)
    hs = h // (H // HS)
    owner = h % (H // HS) == 0

    rows = tl.arange(0, C)
    channel, column = tl.arange(0, BA), tile * BW + tl.arange(0, BW)
    in_a, in_w = channel < A, column < W
    in_state = in_a[:, None] & in_w[None, :]
    place = channel[:, None] * state_row + column[None, :] * state_column
    at = n.to(tl.int64) * HS + hs
    norm_at = channel if NORM == 1 else column
    norm_in = in_a if NORM == 1 else in_w
    NS: tl.constexpr = A if NORM == 1 else W

    # The state before this segment.
    state = tl.zeros([BA, BW], tl.float32)
    norm = tl.zeros([BA if NORM == 1 else BW], tl.float32)
    if JOIN == 2:
        state += tl.load(starts + (at * segments + segment) * A * W + place, mask=in_state, other=0)
        if NORM != 0:
            norm += tl.load(starts_n + (at * segments + segment) * NS + norm_at, mask=norm_in, other=0)
    else:
        if BEGIN:
            # A gradient of the final state belongs to a key head: the first of its query heads takes it.
            from_n = n.to(tl.int64) * HN + h // (H // HN)
            if not REVERSE or h % (H // HN) == 0:
                state += tl.load(begin + from_n * A * W + place, mask=in_state, other=0)
                if NORM != 0:
                    norm += tl.load(begin_n + from_n * NS + norm_at, mask=norm_in, other=0)
        if JOIN == 1:
            for p in range(segments - 1 - segment if REVERSE else segment):
                s = at * segments + (segments - 1 - p if REVERSE else p)
                if GATE == _SCALAR:
                    fade = tl.exp(tl.load(total + s))
                    state = state * fade
                    norm = norm * fade
                elif GATE == _ROWS:
                    fade = tl.exp(tl.load(total + s * A + channel, mask=in_a, other=0))
                    state = state * fade[:, None]
                    if NORM == 1:
                        norm = norm * fade
                elif GATE == _COLUMNS:
                    fade = tl.exp(tl.load(total + s * W + column, mask=in_w, other=0))
                    state = state * fade[None, :]
                    if NORM == 2:
                        norm = norm * fade
                state += tl.load(update + s * A * W + place, mask=in_state, other=0)
                if NORM != 0:
                    norm += tl.load(update_n + s * NS + norm_at, mask=norm_in, other=0)
    if KEEP:  # noqa: SIM102
        if owner:
            tl.store(starts + (at * segments + segment) * A * W + place, state, mask=in_state)
            if NORM != 0:
                tl.store(starts_n + (at * segments + segment) * NS + norm_at, norm, mask=norm_in)

    a += (base * HA + h // (H // HA)) * A
    b += (base * HB + h // (H // HB)) * A
    c += (base * HC + h // (H // HC)) * W
    out += (base * H + h) * W
    # What is a number a token lies in memory as [B, heads, T]: neighbours in time are neighbours there.
    row = n.to(tl.int64)
    skipped = base * 0
    if PACKED:
        row = row * 0
        skipped = base
    if NORM == 1:
        z += (row * H + h) * T + skipped
    if NORM == 2:
        dz += (row * H + h) * T + skipped
    if GATE == _SCALAR:
        cum += (row * HG + h // (H // HG)) * T + skipped
    elif GATE != 0:
        slot = (base + first) // C + n if PACKED else n.to(tl.int64) * tl.cdiv(T, C) + first // C
        cum += (slot * HG + h // (H // HG)) * (A if GATE == _ROWS else W)
    if GATE == _ROWS:
        scores += (base * H + h) * C
    MARKED: tl.constexpr = MARKED_SCALAR if GATE == _SCALAR else MARKED_VECTOR
    if DECAY_GRADIENT:
        # This document's marks, one every MARKED chunks: a key head's states, a query head's gradients of them.
        mark = base // (C * MARKED) + n if PACKED else n.to(tl.int64) * tl.cdiv(T, C * MARKED)
        at_mark = channel[:, None] * W + column[None, :]
        if GATE == _SCALAR:
            other += (base * HO + h // (H // HO)) * W
            lines += ((row * H + h) * LINES + line + tile) * T + skipped
    seen = (rows[None, :] >= rows[:, None]) if REVERSE else (rows[:, None] >= rows[None, :])

    count = tl.maximum(tl.cdiv(last - first, C), 0)
    floor = tl.where(count > 0, last - 1, 0)
    if PACKED:
        floor = tl.minimum(floor.to(tl.int64), T - 1 - base)  # an empty document at the end reads its neighbour's
    # Decays are loaded a chunk ahead: the pipeliner leaves such small loads alone, and their latency shows.
    # A dead row repeats the last one, so that no difference is positive where it counts.
    ahead = tl.maximum(count - 1, 0) if REVERSE else 0
    if GATE == _SCALAR:
        at_row = tl.minimum(first + ahead * C + rows, floor)
        down = tl.load(cum + at_row[:, None])
        along = tl.load(cum + at_row[None, :])
        whole = tl.load(cum + tl.minimum(first + ahead * C + C - 1, floor))
    elif GATE == _ROWS:
        whole = tl.load(cum + ahead * HG * A + channel, mask=channel < tl.where(count > 0, A, 0), other=0)
    elif GATE == _COLUMNS:
        whole = tl.load(cum + ahead * HG * W + column, mask=column < tl.where(count > 0, W, 0), other=0)
    for i in range(count):
        t0 = (first + (count - 1 - i if REVERSE else i) * C).to(tl.int64)
        live = rows < last - t0
        at_w = live[:, None] & in_w[None, :]
        a_t = tl.load(
            a + t0 * HA * A + rows[:, None] * (HA * A) + channel[None, :],
            mask=live[:, None] & in_a[None, :],
            other=0,
        ).to(OPERAND)
        b_T = tl.load(
            b + t0 * HB * A + rows[None, :] * (HB * A) + channel[:, None],
            mask=in_a[:, None] & live[None, :],
            other=0,
        ).to(OPERAND)
        c_t = tl.load(c + t0 * HC * W + rows[:, None] * (HC * W) + column[None, :], mask=at_w, other=0).to(OPERAND)
        if DECAY_GRADIENT and GATE == _SCALAR:
            x_t = tl.load(other + t0 * HO * W + rows[:, None] * (HO * W) + column[None, :], mask=at_w, other=0).to(
                OPERAND
            )
        if NORM == 2:
            slope = tl.load(dz + t0 + rows, mask=live, other=0)
            left = live.to(tl.float32) if REVERSE else slope
            right = slope if REVERSE else live.to(tl.float32)

        operand = state.to(OPERAND)
        if DECAY_GRADIENT:
            # Between the chunks index - 1 and index; a document's ends have states of their own.
            index = first // C + (count - i if REVERSE else i)
            if (index % MARKED == 0) & owner & (index * C < length):
                to = (mark + index // MARKED) * HS + hs
                tl.store(marks + to * A * W + at_mark, operand, mask=in_state)
                if NORM == 2:
                    tl.store(marks_n + to * W + column, norm, mask=in_w)

        # Tokens before this chunk, then those in it.
        o = dot(a_t, operand, PRECISION)
        if NORM == 1:
            before = tl.sum(a_t.to(tl.float32) * norm[None, :], 1)
        elif NORM == 2:
            o += left[:, None] * norm[None, :]
        c_out = c_t
        if GATE == _SCALAR:
            edge = tl.exp(whole)
            weights = tl.exp(tl.where(seen, along - down if REVERSE else down - along, float("-inf")))
            fade_in = tl.exp(whole - down) if REVERSE else tl.exp(down)
            fade_out = tl.exp(down) if REVERSE else tl.exp(whole - down)
            c_out = (c_t * fade_out).to(OPERAND)
            o *= fade_in
            if NORM == 1:
                before *= tl.sum(fade_in, 1)
        if GATE == _ROWS:
            if REVERSE:
                at_pair = rows[None, :] * (H * C) + rows[:, None]
                pairs = tl.load(scores + t0 * H * C + at_pair, mask=live[None, :], other=0).to(OPERAND)
            else:
                at_pair = rows[:, None] * (H * C) + rows[None, :]
                pairs = tl.load(scores + t0 * H * C + at_pair, mask=live[:, None], other=0).to(OPERAND)
            o = dot_add(pairs, c_t, o, PRECISION)
            if NORM == 1:
                before += tl.sum(pairs.to(tl.float32), 1)
        elif GATE != _COLUMNS:
            inner = dot(a_t, b_T, PRECISION)
            if NORM == 2:
                inner += left[:, None] * right[None, :]
            inner = inner * weights if GATE == _SCALAR else tl.where(seen, inner, 0.0)
            o = dot_add(inner.to(OPERAND), c_t, o, PRECISION)
            if NORM == 1:
                before += tl.sum(inner, 1)
        tl.store(out + t0 * H * W + rows[:, None] * (H * W) + column[None, :], o.to(out.dtype.element_ty), mask=at_w)
        if NORM == 1:  # noqa: SIM102
            if tile == 0:
                tl.store(z + t0 + rows, before, mask=live)

        if DECAY_GRADIENT and GATE == _SCALAR:
            if WIDE:
                gain = tl.sum(x_t.to(tl.float32) * o, 1)
            else:
                # Times the identity, which is exact: only what enters a dot is loaded ahead through shared memory.
                gain = tl.sum(dot((rows[:, None] == rows[None, :]).to(OPERAND), x_t, PRECISION) * o, 1)
            tl.store(lines + t0 + rows, -gain if REVERSE else gain, mask=live)

        # The state after it.
        if GATE == _SCALAR:
            state = state * edge
            norm = norm * edge
        elif GATE == _ROWS:
            state = state * tl.exp(whole)[:, None]
            if NORM == 1:
                norm = norm * tl.exp(whole)
        elif GATE == _COLUMNS:
            state = state * tl.exp(whole)[None, :]
            if NORM == 2:
                norm = norm * tl.exp(whole)
        state = dot_add(b_T, c_out, state, PRECISION)
        if NORM == 1:
            if GATE == _SCALAR:
                late = tl.exp(along) if REVERSE else tl.exp(whole - along)
                norm += tl.sum(b_T.to(tl.float32) * tl.where(live[None, :], late, 0), 1)
            else:
                # The mask changes nothing. Triton 3.6 keeps a sum that goes straight into what the loop carries apart
                # by thread, and dies where nothing reads it after the loop.
                norm += tl.where(in_a, tl.sum(b_T.to(tl.float32), 1), 0.0)
        elif NORM == 2:
            norm += tl.sum(right[:, None] * c_out.to(tl.float32), 0)
        ahead = tl.maximum(count - 2 - i, 0) if REVERSE else tl.minimum(i + 1, count - 1)
        if GATE == _SCALAR:
            at_row = tl.minimum(first + ahead * C + rows, floor)
            down = tl.load(cum + at_row[:, None])
            along = tl.load(cum + at_row[None, :])
            whole = tl.load(cum + tl.minimum(first + ahead * C + C - 1, floor))
        elif GATE == _ROWS:
            whole = tl.load(cum + ahead * HG * A + channel, mask=in_a, other=0)
        elif GATE == _COLUMNS:
            whole = tl.load(cum + ahead * HG * W + column, mask=in_w, other=0)
    if END:  # noqa: SIM102
        if owner & (segment == (0 if REVERSE else segments - 1)):
            tl.store(end + at * A * W + place, state, mask=in_state)
            if NORM != 0:
                tl.store(end_n + at * NS + norm_at, norm, mask=norm_in)
