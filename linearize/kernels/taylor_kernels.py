"""The kernels of `taylor_attention`: the sweep that gives out and dv, and the sweep that gives dq and dk.

For every token i of `x` and the tokens j of `y` it may see (j <= i, or j >= i in a reverse sweep),

    sweep      out_i = sum_j w_j f(x_i . y_j) c_j                             f(s) = 1 + s + s^2 / 2
    gradient   dx_i = sum_j w_j (a_i . c_j + e) f'(x_i . y_j) y_j             e the gradient of the normaliser

    out = sweep(q, k, v)                dv = sweep(k, q, do), reverse
    dq = gradient(q, k; do, v)          dk = gradient(k, q; v, do), reverse

Inside a chunk f is applied to the scores. Before it lies the state sum_j w_j phi(y_j) c_j^T, which stays in registers.
Features are made a block at a time, on the tensor cores, as the product of two selections (x E1) * (x E2) with one-hot
E1, E2. They go along the cyclic diagonals x_i x_((i + n) mod D), n = 0 .. D / 2, each pair once, then come the channels
and the constant: 153 for D = 16. Gradients go back through both factors: dx = (dphi * x E2) E1^T + (dphi * x E1) E2^T.
No operand is the transpose of a dot's result, so the gradient sweep keeps its state as [V, F].

    x [., H, D]   y [., G * SIDES, D]   c [., G * SIDES, V]   states a head of G   C tokens of a chunk   S segments
    (in reverse H = G and the SIDES query heads of a key head are summed over)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, dot_add


@triton.jit
def nothing():
    """A tuple to add blocks to."""
    return ()


@triton.jit
def selected(f, channel, D: tl.constexpr, HALVE: tl.constexpr):
    """One-hot factors of feature f: whether `channel` is its first and its second. HALVE: squares count half.

    phi(x) . phi(y) = f(x . y) if the squares of one of the two are halved: always those that states sum up.
    """
    PAIRS: tl.constexpr = D * (D + 1) // 2
    first = tl.where(f < PAIRS, f % D, f - PAIRS)
    second = tl.where(f < PAIRS, (f % D + f // D) % D, -1)
    e1, e2 = tl.where(first == channel, 1.0, 0.0), tl.where(second == channel, 1.0, 0.0)
    if HALVE:
        e1 = tl.where(f < D, 0.5 * e1, e1)
    return e1, e2


@triton.jit
def gathered(x, f, AXIS: tl.constexpr, D: tl.constexpr):
    """The same factors for fp32, without dots: those would be three each, with the one-hot operands in registers."""
    PAIRS: tl.constexpr = D * (D + 1) // 2
    first = tl.where(f < PAIRS, f % D, tl.minimum(f - PAIRS, D - 1))
    index = tl.zeros([x.shape[0], 1] if AXIS == 1 else [1, x.shape[1]], tl.int32)
    a, b = tl.gather(x, index + first, AXIS), tl.gather(x, index + (f % D + f // D) % D, AXIS)
    a = tl.where(f < PAIRS + D, a, tl.where(f == PAIRS + D, 1.0, 0.0))
    return a, tl.where(f < PAIRS, b, tl.where(f <= PAIRS + D, 1.0, 0.0))


@triton.jit
def factors(x, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, HALVE: tl.constexpr, PRECISION: tl.constexpr):
    """x [C, DP] to the two factors [C, SIZE] of the features START, START + 1, ..."""
    PAIRS: tl.constexpr = D * (D + 1) // 2
    f = START + tl.arange(0, SIZE)[None, :]
    if PRECISION == "tf32x3":
        a, b = gathered(x, f, 1, D)
        if HALVE:
            a *= tl.where(f < D, 0.5, 1.0)
        return a, b
    else:
        e1, e2 = selected(f, tl.arange(0, x.shape[1])[:, None], D, HALVE)
        a, b = dot(x, e1.to(x.dtype), PRECISION), dot(x, e2.to(x.dtype), PRECISION)
        if START + SIZE > PAIRS:  # the constant is 1 * 1, a channel x * 1
            a += tl.where(f == PAIRS + D, 1.0, 0.0)
            b += tl.where((f >= PAIRS) & (f <= PAIRS + D), 1.0, 0.0)
        return a, b


@triton.jit
def features_t(xt, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """xt [DP, C] to the features, squares halved, [SIZE, C]."""
    PAIRS: tl.constexpr = D * (D + 1) // 2
    f = START + tl.arange(0, SIZE)[:, None]
    if PRECISION == "tf32x3":
        a, b = gathered(xt, f, 0, D)
        return a * b * tl.where(f < D, 0.5, 1.0)
    else:
        e1, e2 = selected(f, tl.arange(0, xt.shape[0])[None, :], D, True)
        a, b = dot(e1.to(xt.dtype), xt, PRECISION), dot(e2.to(xt.dtype), xt, PRECISION)
        if START + SIZE > PAIRS:
            a += tl.where(f == PAIRS + D, 1.0, 0.0)
            b += tl.where((f >= PAIRS) & (f <= PAIRS + D), 1.0, 0.0)
        return a * b


@triton.jit
def state_place(f, D: tl.constexpr):
    """Feature f's place in `taylor_features`, our state there in units of that one, and whether f exists."""
    PAIRS: tl.constexpr = D * (D + 1) // 2
    one, other = f % D, (f % D + f // D) % D
    low, high = tl.minimum(one, other), tl.maximum(one, other)
    place = 2 * D + low * (2 * D - low - 1) // 2 + high - low
    place = tl.where(f < D, 1 + D + f, place)
    place = tl.where(f < PAIRS, place, tl.where(f < PAIRS + D, 1 + f - PAIRS, 0))
    return place, tl.where(f < D, 0.7071067811865476, 1.0), f <= PAIRS + D


@triton.jit
def span(bounds, n, segment, segments, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Document n's first token in memory, its length, its chunks [first, last) of this segment, and the number of the
    chunk before its first among all chunks (with documents packed, at most one number a document stays unused)."""
    if VARLEN:
        base = tl.load(bounds + n).to(tl.int64)
        length = (tl.load(bounds + n + 1).to(tl.int64) - base).to(tl.int32)
        number = base // C + n
    else:
        base = n.to(tl.int64) * T
        length = T
        number = n.to(tl.int64) * tl.cdiv(T, C)
    chunks = tl.cdiv(length, C)
    each = tl.cdiv(chunks, segments)
    return base, length, tl.minimum(segment * each, chunks), tl.minimum(segment * each + each, chunks), number


@triton.jit
def rows_at(tensor, token, step, heads, h, start, N: tl.constexpr, W: tl.constexpr):
    """Pointers [C, N] to the tokens token + step of head h of [., heads, W], channels from `start` on."""
    channel = start + tl.arange(0, N)
    return tensor + (token * heads + h) * W + step[:, None] * (heads * W) + channel[None, :]


@triton.jit
def rows_mask(valid, start, N: tl.constexpr, W: tl.constexpr):
    """Which of them are there: tokens that are `valid` [C], channels below W."""
    mask = valid[:, None]
    if W % N != 0:
        mask = mask & (start + tl.arange(0, N) < W)[None, :]
    return mask


@triton.jit
def rows(tensor, token, step, heads, h, start, valid, N: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr):
    """Those tokens, zeros where there are none."""
    at, mask = rows_at(tensor, token, step, heads, h, start, N, W), rows_mask(valid, start, N, W)
    return tl.load(at, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def rows_t(tensor, token, step, heads, h, start, valid, N: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr):
    """The same, transposed: [N, C]."""
    channel = start + tl.arange(0, N)
    mask = valid[None, :]
    if W % N != 0:
        mask = mask & (channel < W)[:, None]
    at = tensor + (token * heads + h) * W + step[None, :] * (heads * W) + channel[:, None]
    return tl.load(at, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def few(at, mask, COPIES: tl.constexpr):
    """Loads a short vector as fp32, zeros where not `mask`.

    With fewer numbers than threads the compiler has every thread load all those it will need, one at a time and late.
    As many copies as make up a number a thread are loaded ahead like any tile.
    """
    if COPIES <= 1:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        copies = at[None, :] + tl.zeros([COPIES, 1], tl.int32)
        return tl.max(tl.load(copies, mask=mask[None, :], other=0.0).to(tl.float32), 0)


@triton.jit
def _read(x, state, total, out, z, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """out + phi(x) state and z + phi(x) total for one block of features."""
    a, b = factors(x, START, SIZE, D, False, PRECISION)
    phi = a * b
    z += tl.sum(phi * total[None, :], 1)
    return dot_add(phi.to(x.dtype), state.to(x.dtype), out, PRECISION), z


@triton.jit
def _load(at, at_k, state, total, column, V: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Adds one block of a stored state, [F, V] and [F]."""
    f = START + tl.arange(0, SIZE)
    place, unit, real = state_place(f, D)
    mask = real[:, None] & (column < V)[None, :]
    state += tl.load(at + place[:, None] * V + column[None, :], mask=mask, other=0.0) * unit[:, None]
    return state, total + tl.load(at_k + place, mask=real, other=0.0) * unit


@triton.jit
def _store(at, at_k, state, total, pads, column, first, V: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr,
           D: tl.constexpr):  # fmt: skip
    """Stores one block of a state, and where `first` of the totals, less the constants of `pads` missing tokens."""
    f = START + tl.arange(0, SIZE)
    total -= tl.where(f == D * (D + 1) // 2 + D, pads, 0.0)
    place, unit, real = state_place(f, D)
    mask = real[:, None] & (column < V)[None, :]
    tl.store(at + place[:, None] * V + column[None, :], state / unit[:, None], mask=mask)
    tl.store(at_k + place, total / unit, mask=f < tl.where(first, 1 + D + D * (D + 1) // 2, 0))


# fmt: off
@triton.jit(do_not_specialize=["T", "segments", "H", "G"])
def sweep_kernel(
    x, y, c, weight, extra, partner, out, z, totals, parts, parts_k, end, end_k, bounds,
    T, segments, H, G,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, SIDES: tl.constexpr, THREADS: tl.constexpr, OUTPUT: tl.constexpr,
    REVERSE: tl.constexpr, WEIGHTED: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, KEEP: tl.constexpr,
    VARLEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """One sweep over a segment: x [., H, D], y [., G * SIDES, D], c [., G * SIDES, V], states a head of G.

    Forward: `weight` [., G] weighs the tokens of y; out [., H, V], z [., H].
    REVERSE: the totals are of `extra` [., G * SIDES] (dz) in place of 1; `weight` [., H] weighs the rows of `out`, and
    z [tiles, ., H] is its gradient, from `partner` [., H, V] (the values).
    KEEP: writes the totals sum_j phi(y_j) before each chunk to `totals` [chunks, G, F]. END: writes the last state.
    `parts` [S, N, G, F, V] and `parts_k` are the states that add up to a segment's first: the given one with BEGIN 1,
    then each segment's own. Without OUTPUT only these are written, and H is G.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    F: tl.constexpr = 1 + D + D * (D + 1) // 2
    pid = tl.program_id(0)
    tile = pid % TILES
    pid = pid // TILES
    h = pid % H
    g = h // (H // G)
    pid = pid // H
    running = segments if OUTPUT else segments - 1
    segment = pid % running
    n = pid // running
    base, length, first, last, number = span(bounds, n, segment, segments, T, C, VARLEN)
    own = n.to(tl.int64) * G + g
    documents = tl.num_programs(0) // (TILES * H * running)
    layer = documents.to(tl.int64) * G  # states of a segment

    leads = h == g * (H // G)  # of the programs that share a state, the one that writes it

    step = tl.arange(0, C)
    here = -step if REVERSE else step
    start = tile * BV
    column = start + tl.arange(0, BV)

    states, sums = nothing(), nothing()
    for b in tl.static_range(BLOCKS):
        states += (tl.zeros([BLOCK if b < BLOCKS - 1 else LAST, BV], tl.float32),)
        sums += (tl.zeros([BLOCK if b < BLOCKS - 1 else LAST], tl.float32),)
    if OUTPUT and parts is not None:
        for i in range(segment + BEGIN):
            at, at_k = parts + (i * layer + own) * F * V, parts_k + (i * layer + own) * F
            more, more_k = nothing(), nothing()
            for b in tl.static_range(BLOCKS):
                state, total = _load(at, at_k, states[b], sums[b], column, V, b * BLOCK,
                                     BLOCK if b < BLOCKS - 1 else LAST, D)  # fmt: skip
                more += (state,)
                more_k += (total,)
            states, sums = more, more_k

    for i in range(first, last):
        valid = i * C + step < length
        token = base + (length - 1 - i * C if REVERSE else i * C)
        if OUTPUT:
            xs = rows(x, token, here, H, h, 0, valid, DP, D, OPERAND)
            result = tl.zeros([C, BV], tl.float32)
            norm = tl.zeros([C], tl.float32)
            for b in tl.static_range(BLOCKS):
                if KEEP:
                    kept = tl.where((tile == 0) & leads, F, 0)
                    f = b * BLOCK + tl.arange(0, BLOCK if b < BLOCKS - 1 else LAST)
                    tl.store(totals + ((number + i) * G + g) * F + f, sums[b], mask=f < kept)
                result, norm = _read(xs, states[b], sums[b], result, norm, b * BLOCK,
                                     BLOCK if b < BLOCKS - 1 else LAST, D, PRECISION)  # fmt: skip
            if REVERSE and WEIGHTED:  # used last, asked for in time
                own_weight = few(weight + token * H + h + here * H, valid, 1)
                mates = rows(partner, token, here, H, h, start, valid, BV, V, OPERAND)
        for r in range(SIDES):
            side = g * SIDES + r
            yt = rows_t(y, token, here, G * SIDES, side, 0, valid, DP, D, OPERAND)
            values = rows(c, token, here, G * SIDES, side, start, valid, BV, V, OPERAND)
            if REVERSE:
                factor = few(extra + token * (G * SIDES) + side + here * (G * SIDES), valid, THREADS // C)
            elif WEIGHTED:
                factor = few(weight + token * G + g + here * G, valid, THREADS // C)
            if OUTPUT:
                s = dot(xs, yt, PRECISION)
                s = tl.where((i + step)[:, None] >= (i + step)[None, :], (0.5 * s + 1.0) * s + 1.0, 0.0)
                if REVERSE:
                    norm += tl.sum(s * factor[None, :], 1)
                else:
                    if WEIGHTED:
                        s *= factor[None, :]
                    norm += tl.sum(s, 1)
                result = dot_add(s.to(OPERAND), values, result, PRECISION)
            more, more_k = nothing(), nothing()
            for b in tl.static_range(BLOCKS):
                phi = features_t(yt, b * BLOCK, BLOCK if b < BLOCKS - 1 else LAST, D, PRECISION)
                if REVERSE:
                    more_k += (sums[b] + tl.sum(phi * factor[None, :], 1),)
                else:
                    if WEIGHTED:
                        phi *= factor[None, :]
                    more_k += (sums[b] + tl.sum(phi, 1),)
                more += (dot_add(phi.to(OPERAND), values, states[b], PRECISION),)
            states, sums = more, more_k
        if OUTPUT:
            if not REVERSE:
                alone = tl.where(tile == 0, C, 0)  # tiles would write the same
                tl.store(z + token * H + h + here * H, norm, mask=valid & (step < alone))
            elif WEIGHTED:
                norm = tl.where(tile == 0, norm, 0.0) + tl.sum(mates.to(tl.float32) * result, 1)
                plane = T.to(tl.int64) * H * (1 if VARLEN else documents)
                tl.store(z + plane * tile + token * H + h + here * H, norm, mask=valid)
                result *= own_weight[:, None]
            at = rows_at(out, token, here, H, h, start, BV, V)
            tl.store(at, result.to(out.dtype.element_ty), mask=rows_mask(valid, start, BV, V))

    pads = tl.maximum(last * C - length, 0) * 1.0
    if REVERSE or WEIGHTED or last == first:
        pads = 0.0
    if not OUTPUT:
        own += (segment + BEGIN) * layer
        at, at_k = parts + own * F * V, parts_k + own * F
        for b in tl.static_range(BLOCKS):
            _store(at, at_k, states[b], sums[b], pads, column, tile == 0, V, b * BLOCK,
                   BLOCK if b < BLOCKS - 1 else LAST, D)  # fmt: skip
    elif END:  # noqa: SIM102 (known when compiling, the rest is not)
        if (segment == segments - 1) & leads:
            at, at_k = end + own * F * V, end_k + own * F
            for b in tl.static_range(BLOCKS):
                _store(at, at_k, states[b], sums[b], pads, column, tile == 0, V, b * BLOCK,
                       BLOCK if b < BLOCKS - 1 else LAST, D)  # fmt: skip


@triton.jit
def _load_t(at, state, column, V: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Adds one block of a stored state [F, V] to [BV, SIZE]."""
    place, unit, real = state_place(START + tl.arange(0, SIZE), D)
    mask = (column < V)[:, None] & real[None, :]
    return state + tl.load(at + column[:, None] + place[None, :] * V, mask=mask, other=0.0) * unit[None, :]


@triton.jit
def _through_features(
    x, dphi, dx, zero, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """dx [C, DP] + the gradient dphi [C, SIZE] of one block of the features of x [C, DP]."""
    a, b = factors(x, START, SIZE, D, False, PRECISION)
    e1, e2 = selected(START + zero + tl.arange(0, SIZE)[:, None], tl.arange(0, x.shape[1])[None, :], D, False)
    dx = dot_add((dphi * b).to(x.dtype), e1.to(x.dtype), dx, PRECISION)
    return dot_add((dphi * a).to(x.dtype), e2.to(x.dtype), dx, PRECISION)


# fmt: off
@triton.jit(do_not_specialize=["T", "segments", "H", "G"])
def gradient_kernel(
    x, y, a, c, weight, extra, totals, parts, bounds, out,
    T, segments, H, G,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, SIDES: tl.constexpr, THREADS: tl.constexpr, REVERSE: tl.constexpr,
    WEIGHTED: tl.constexpr, BEGIN: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """The gradient `out` [tiles, ., H, D] of x [., H, D] over y [., G * SIDES, D], a [., H, V] and c [., G * SIDES, V].

    Forward (dq): `weight` [., G] weighs the tokens of y, `extra` (dz) is [., H].
    REVERSE (dk): `weight` [., H] weighs the rows, `extra` is [., G * SIDES].
    `totals` and `parts` are those of the sweep in the same direction.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    F: tl.constexpr = 1 + D + D * (D + 1) // 2
    pid = tl.program_id(0)
    tile = pid % TILES
    pid = pid // TILES
    h = pid % H
    g = h // (H // G)
    pid = pid // H
    segment = pid % segments
    n = pid // segments
    base, length, first, last, number = span(bounds, n, segment, segments, T, C, VARLEN)
    documents = (tl.num_programs(0) // (TILES * H * segments)).to(tl.int64)
    own = n.to(tl.int64) * G + g

    step = tl.arange(0, C)
    here = -step if REVERSE else step
    start = tile * BV
    column = start + tl.arange(0, BV)
    once = tl.where(tile == 0, 1.0, 0.0)  # the normaliser's share is in one tile only

    states = nothing()
    for b in tl.static_range(BLOCKS):
        states += (tl.zeros([BV, BLOCK if b < BLOCKS - 1 else LAST], tl.float32),)
    if parts is not None:
        for i in range(segment + BEGIN):
            part = parts + (i * documents * G + own) * F * V
            more = nothing()
            for b in tl.static_range(BLOCKS):
                more += (_load_t(part, states[b], column, V, b * BLOCK, BLOCK if b < BLOCKS - 1 else LAST, D),)
            states = more

    for i in range(first, last):
        valid = i * C + step < length
        token = base + (length - 1 - i * C if REVERSE else i * C)
        xs = rows(x, token, here, H, h, 0, valid, DP, D, OPERAND)
        mates = rows(a, token, here, H, h, start, valid, BV, V, OPERAND)
        share = tl.zeros([C], tl.float32) + once
        if not REVERSE:
            share *= few(extra + token * H + h + here * H, valid, 1)
        elif WEIGHTED:
            own_weight = few(weight + token * H + h + here * H, valid, 1)
        dx = tl.zeros([C, DP], tl.float32)
        zero = 0
        if PRECISION == "tf32x3":  # hides from the compiler that fp32's one-hot operands could wait in registers
            zero = tl.minimum(i, 0)
        for b in tl.static_range(BLOCKS):
            f = b * BLOCK + tl.arange(0, BLOCK if b < BLOCKS - 1 else LAST)
            total = few(totals + ((number + i) * G + g) * F + f, f < F, THREADS // (BLOCK if b < BLOCKS - 1 else LAST))
            dphi = dot_add(mates, states[b].to(OPERAND), share[:, None] * total[None, :], PRECISION)
            dx = _through_features(xs, dphi, dx, zero, b * BLOCK, BLOCK if b < BLOCKS - 1 else LAST, D, PRECISION)
        for r in range(SIDES):
            side = g * SIDES + r
            ys = rows(y, token, here, G * SIDES, side, 0, valid, DP, D, OPERAND)
            yt = rows_t(y, token, here, G * SIDES, side, 0, valid, DP, D, OPERAND)
            values_t = rows_t(c, token, here, G * SIDES, side, start, valid, BV, V, OPERAND)
            ds = dot(mates, values_t, PRECISION)
            if REVERSE:
                at = extra + token * (G * SIDES) + side + here * (G * SIDES)
                ds += once * few(at, valid, THREADS // C)[None, :]
            else:
                ds += share[:, None]
            ds *= 1.0 + dot(xs, yt, PRECISION)
            ds = tl.where((i + step)[:, None] >= (i + step)[None, :], ds, 0.0)
            if WEIGHTED and not REVERSE:
                factor = few(weight + token * G + g + here * G, valid, THREADS // C)
                ds *= factor[None, :]
            dx = dot_add(ds.to(OPERAND), ys, dx, PRECISION)
            more = nothing()
            for b in tl.static_range(BLOCKS):
                one, two = factors(ys, b * BLOCK, BLOCK if b < BLOCKS - 1 else LAST, D, True, PRECISION)
                phi = one * two
                if WEIGHTED and not REVERSE:
                    phi *= factor[:, None]
                more += (dot_add(values_t, phi.to(OPERAND), states[b], PRECISION),)
            states = more
        if WEIGHTED and REVERSE:
            dx *= own_weight[:, None]
        plane = T.to(tl.int64) * H * D * (1 if VARLEN else documents)
        at_dx = rows_at(out + plane * tile, token, here, H, h, 0, DP, D)
        tl.store(at_dx, dx.to(out.dtype.element_ty), mask=rows_mask(valid, 0, DP, D))
