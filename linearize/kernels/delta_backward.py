"""Gradients of the gated delta rule; names and layout as in delta.py, d marks a gradient.

With D the gradient of the state after a chunk, S the state before it and G the chunk's log decay, summed over the query
heads of a key head,

    dX = P^T dO + e^(G - g) K D,   P = Q K^T . e^(g_i - g_j), j <= i      its first term and Z in local_kernel,
    D <- e^G D + Z + N^T dX,   Z = (e^g Q)^T dO                           the recurrence in reverse_kernel
    dQ = e^g dO S^T + dP K,   dP = dO X^T . e^(g_i - g_j), j <= i         query_kernel, and the first term of
    dK = dP^T Q + e^(G - g) X D^T - diag(beta e^g) Y + (B + B^T) K        the others in key_kernel
    dV = diag(beta) Y',   Y = T^T dN, dN = dX S^T,   Y' = T^T dX
    B = diag(beta) (dA . e^(g_i - g_j)),   dA = -(Y N^T + Y' U^T) below the diagonal

dA needs no product with T on both sides: what T would be multiplied with gave N and U. The decay enters e^g and e^-g as
the rows of Q and K do, so its gradient through them is q . dq - k . dk.

    z, d_states [tile, V, K]   dx like x   dg [tile, C]
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot, dot_add, on_device, opaque
from .delta_chunks import chunk_span, chunks_of, document_span, start_kernel, within
from .delta_forward import kept, prepare, sweep


@triton.jit(do_not_specialize=["tokens", "each"])
def local_kernel(
    q,
    k,
    do,
    g,
    z,
    dx,
    spans,
    tokens,
    each,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one chunk adds to dX and to the gradient of the state before it, for a tile of value channels."""
    pid = tl.program_id(0)
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = pid // tiles % G
    chunk = pid // tiles // G
    start, left = chunk_span(chunk, spans, tokens, each, C)
    if left <= 0:
        return
    tile = chunk.to(tl.int64) * G + head
    i, kk, value = tl.arange(0, C), tl.arange(0, BK), pid % tiles * BV + tl.arange(0, BV)
    live, inside_k, inside_v = i < left, within(kk, K, BK), within(value, V, BV)
    operand = k.dtype.element_ty
    keys_t = tl.load(
        k + (start * G + head) * K + (i[None, :] * (G * K) + kk[:, None]),
        mask=live[None, :] & inside_k[:, None],
        other=0,
    )
    decay = tl.load(g + tile * C + i)
    weight = tl.exp2(tl.where(i[:, None] >= i[None, :], decay[:, None] - decay[None, :], float("-inf")))
    faded = tl.exp2(decay)
    dx_t = tl.zeros([BV, C], tl.float32)
    z_own = tl.zeros([BV, BK], tl.float32)
    for r in range(H // G):
        own = start * H + head * (H // G) + r
        offset_q, offset_o = i[:, None] * (H * K) + kk[None, :], i[None, :] * (H * V) + value[:, None]
        queries = tl.load(q + own * K + offset_q, mask=live[:, None] & inside_k[None, :], other=0)
        do_t = tl.load(do + own * V + offset_o, mask=live[None, :] & inside_v[:, None], other=0)
        scores = (dot(queries, keys_t, PRECISION) * weight).to(operand)
        dx_t = dot_add(do_t, scores, dx_t, PRECISION)
        z_own = dot_add((do_t * faded[None, :]).to(operand), queries, z_own, PRECISION)
    tl.store(dx + tile * C * V + (value[:, None] * C + i[None, :]), dx_t.to(operand), mask=inside_v[:, None])
    place = z + tile * V * K + (value[:, None] * K + kk[None, :])
    tl.store(place, z_own.to(operand), mask=inside_v[:, None] & inside_k[None, :])


@triton.jit(do_not_specialize=["tokens", "each"])
def reverse_kernel(
    k,
    n,
    g,
    z,
    dx,
    d_final,
    d_initial,
    first,
    bounds,
    tokens,
    each,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the states, last chunk first: `z` becomes D, `dx` becomes whole, both in place."""
    pid = tl.program_id(0)
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = pid // tiles % G
    document = pid // tiles // G
    start, length, chunk, count = document_span(document, first, bounds, tokens, each)
    i, kk, value = tl.arange(0, C), tl.arange(0, BK), pid % tiles * BV + tl.arange(0, BV)
    inside_k, inside_v = within(kk, K, BK), within(value, V, BV)
    inside = inside_v[:, None] & inside_k[None, :]
    operand = k.dtype.element_ty
    own = (document.to(tl.int64) * G + head) * K * V + (kk[None, :] * V + value[:, None])
    state = tl.zeros([BV, BK], tl.float32)
    if d_final is not None:
        state = tl.load(d_final + own, mask=inside, other=0).to(tl.float32)
    offset_k = i[None, :] * (G * K) + kk[:, None]
    offset_n = i[:, None] * K + kk[None, :]
    offset_x = value[:, None] * C + i[None, :]
    offset_s = value[:, None] * K + kk[None, :]
    step = count - 1
    base = (start + step * C) * G + head
    tile = (chunk + step) * G + head
    for _ in range(count):
        live = i < length - step * C
        keys_t = tl.load(k + base * K + offset_k, mask=live[None, :] & inside_k[:, None], other=0)
        removal = tl.load(n + tile * C * K + offset_n, mask=inside_k[None, :], other=0)
        dx_t = tl.load(dx + tile * C * V + offset_x, mask=inside_v[:, None], other=0).to(tl.float32)
        z_own = tl.load(z + tile * V * K + offset_s, mask=inside, other=0).to(tl.float32)
        decay = tl.load(g + tile * C + i)
        total = tl.load(g + tile * C + C - 1)
        held = state.to(operand)
        dx_t += dot(held, keys_t, PRECISION) * tl.exp2(total - decay)[None, :]
        tl.store(z + tile * V * K + offset_s, held, mask=inside)
        tl.store(dx + tile * C * V + offset_x, dx_t.to(operand), mask=inside_v[:, None])
        state = dot_add(dx_t.to(operand), removal, state * tl.exp2(total) + z_own, PRECISION)
        step -= 1
        base -= C * G
        tile -= G
    if d_initial is not None:
        tl.store(d_initial + own, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "each"])
def query_kernel(
    q,
    k,
    do,
    x,
    states,
    g,
    dq,
    dk,
    dg,
    spans,
    tokens,
    each,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of the query heads of one chunk and key head, and what the scores Q K^T give to dk and dg."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % G
    start, left = chunk_span(tl.program_id(0) // G, spans, tokens, each, C)
    if left <= 0:
        return
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    live, inside = i < left, within(kk, K, BK)
    there = live[:, None] & inside[None, :]
    operand = k.dtype.element_ty
    decay = tl.load(g + tile * C + i)
    weight = tl.exp2(tl.where(i[:, None] >= i[None, :], decay[:, None] - decay[None, :], float("-inf")))
    weight_t = tl.exp2(tl.where(i[:, None] <= i[None, :], decay[None, :] - decay[:, None], float("-inf")))
    dg_own = tl.zeros([C], tl.float32)
    dk_own = tl.zeros([C, BK], tl.float32)
    offset_k = i[:, None] * (G * K) + kk[None, :]
    for r in range(H // G):
        own = start * H + head * (H // G) + r
        dq_own = tl.zeros([C, BK], tl.float32)
        dp = tl.zeros([C, C], tl.float32)
        dp_t = tl.zeros([C, C], tl.float32)  # [key, query]
        for first_value in range(0, V, BV):
            value = first_value + tl.arange(0, BV)
            inside_v = within(value, V, BV)
            place = do + own * V + (i[:, None] * (H * V) + value[None, :])
            do_own = tl.load(place, mask=live[:, None] & inside_v[None, :], other=0)
            place_t = do + own * V + (i[None, :] * (H * V) + value[:, None])
            do_t = tl.load(place_t, mask=live[None, :] & inside_v[:, None], other=0)
            place_x = x + tile * C * V + (value[None, :] * C + i[:, None])
            x_own = tl.load(place_x, mask=inside_v[None, :], other=0)
            place_t = x + tile * C * V + (value[:, None] * C + i[None, :])
            x_t = tl.load(place_t, mask=inside_v[:, None], other=0)
            place_s = states + tile * V * K + (value[:, None] * K + kk[None, :])
            state = tl.load(place_s, mask=inside_v[:, None] & inside[None, :], other=0)
            dq_own = dot_add(do_own, state, dq_own, PRECISION)
            dp = dot_add(do_own, x_t, dp, PRECISION)
            dp_t = dot_add(x_own, do_t, dp_t, PRECISION)
        offset_q = i[:, None] * (H * K) + kk[None, :]
        queries = tl.load(q + own * K + offset_q, mask=there, other=0)
        dk_own = dot_add((dp_t * weight_t).to(operand), queries, dk_own, PRECISION)
        keys = tl.load(k + (start * G + head) * K + offset_k, mask=there, other=0)
        dq_own = dot_add((dp * weight).to(operand), keys, dq_own * tl.exp2(decay)[:, None], PRECISION)
        dg_own += tl.sum(dq_own * queries, 1)
        tl.store(dq + own * K + offset_q, dq_own.to(operand), mask=there)
    keys = tl.load(k + (start * G + head) * K + offset_k, mask=there, other=0)
    tl.store(dg + tile * C + i, dg_own - tl.sum(dk_own * keys, 1))
    tl.store(dk + (start * G + head) * K + offset_k, dk_own.to(operand), mask=there)


@triton.jit(do_not_specialize=["tokens", "each"])
def key_kernel(
    k,
    v,
    beta,
    n,
    u,
    g,
    inverse,
    states,
    d_states,
    x,
    dx,
    dg,
    dk,
    dv,
    d_beta,
    d_decay,
    spans,
    tokens,
    each,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv, the gradients of the gates and the rest of dk of one chunk and key head; overwrites T."""
    tile = tl.program_id(0).to(tl.int64)
    start, left = chunk_span(tl.program_id(0) // G, spans, tokens, each, C)
    if left <= 0:
        return
    base = start * G + tl.program_id(0) % G
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    live, inside = i < left, within(kk, K, BK)
    there = live[:, None] & inside[None, :]
    operand = k.dtype.element_ty
    decay = tl.load(g + tile * C + i)
    total = tl.load(g + tile * C + C - 1)
    gate = tl.load(beta + base + i * G, mask=live, other=0).to(tl.float32)
    faded = tl.exp2(decay)
    offset_k = i[:, None] * (G * K) + kk[None, :]
    offset_t = i[None, :] * C + i[:, None]

    # Through the states on both sides of the chunk.
    dn = tl.zeros([C, BK], tl.float32)
    dk_own = tl.zeros([C, BK], tl.float32)
    shared = tl.zeros([BK], tl.float32)
    for first_value in range(0, V, BV):
        value = first_value + tl.arange(0, BV)
        inside_v = within(value, V, BV)
        offset_x, offset_s = value[None, :] * C + i[:, None], value[:, None] * K + kk[None, :]
        x_own = tl.load(x + tile * C * V + offset_x, mask=inside_v[None, :], other=0)
        dx_own = tl.load(dx + tile * C * V + offset_x, mask=inside_v[None, :], other=0)
        state = tl.load(states + tile * V * K + offset_s, mask=inside_v[:, None] & inside[None, :], other=0)
        d_state = tl.load(d_states + tile * V * K + offset_s, mask=inside_v[:, None] & inside[None, :], other=0)
        dn = dot_add(dx_own, state, dn, PRECISION)
        dk_own = dot_add(x_own, d_state, dk_own, PRECISION)
        shared += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    keys = tl.load(k + base * K + offset_k, mask=there, other=0)
    dk_own *= tl.exp2(total - decay)[:, None]
    left_over = tl.sum(dk_own * keys, 1)
    dg_total = tl.sum(shared) * tl.exp2(total) + tl.sum(left_over)
    dg_own = tl.load(dg + tile * C + i) - left_over
    dk_own += tl.load(dk + base * K + offset_k, mask=there, other=0)

    # Through N and U to keys, values and the system A.
    inverse_t = tl.load(inverse + tile * C * C + offset_t).to(operand)
    y = dot(inverse_t, dn.to(operand), PRECISION)
    n_t = tl.load(n + tile * C * K + (i[None, :] * K + kk[:, None]), mask=inside[:, None], other=0)
    da = dot(y.to(operand), n_t, PRECISION)
    d_gate = -tl.sum(y * keys, 1) * faded
    dg_own += d_gate * gate
    dk_own -= y * (gate * faded)[:, None]
    for first_value in range(0, V, BV):
        value = first_value + tl.arange(0, BV)
        inside_v = within(value, V, BV)
        dx_own = tl.load(dx + tile * C * V + (value[None, :] * C + i[:, None]), mask=inside_v[None, :], other=0)
        u_own = tl.load(u + tile * C * V + (value[:, None] * C + i[None, :]), mask=inside_v[:, None], other=0)
        y_v = dot(inverse_t, dx_own, PRECISION)
        da = dot_add(y_v.to(operand), u_own, da, PRECISION)
        offset_v = i[:, None] * (G * V) + value[None, :]
        values = tl.load(v + base * V + offset_v, mask=live[:, None] & inside_v[None, :], other=0)
        d_gate += tl.sum(y_v * values, 1)
        place_v = dv + base * V + offset_v
        tl.store(place_v, (y_v * gate[:, None]).to(operand), mask=live[:, None] & inside_v[None, :])

    # Through A to the keys on both of its sides.
    keys_t = tl.load(k + base * K + (i[None, :] * (G * K) + kk[:, None]), mask=live[None, :] & inside[:, None], other=0)
    da *= -tl.exp2(tl.where(i[:, None] > i[None, :], decay[:, None] - decay[None, :], float("-inf")))
    product = da * dot(keys, keys_t, PRECISION)
    d_gate += tl.sum(product, 1)
    product *= gate[:, None]
    dg_own += tl.sum(product, 1) - tl.sum(product, 0)
    b = (da * gate[:, None]).to(operand)
    dk_own = dot_add(b, keys, dk_own, PRECISION)
    # Its transpose through memory: no compiler has to turn the result of a product.
    tl.debug_barrier()
    tl.store(inverse + tile * C * C + (i[:, None] * C + i[None, :]), b.to(tl.float32))
    tl.debug_barrier()
    b_t = tl.load(inverse + tile * C * C + offset_t).to(operand)
    dk_own = dot_add(b_t, keys, dk_own, PRECISION)
    tl.store(dk + base * K + offset_k, dk_own.to(operand), mask=there)
    tl.store(d_beta + base + i * G, d_gate, mask=live)
    tl.store(d_decay + base + i * G, tl.cumsum(dg_own, 0, reverse=True) + dg_total, mask=live)


def _backward_outputs(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = torch.empty(k.shape[:3], dtype=torch.float32, device=q.device)
    d_initial: Any = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), gate, torch.empty_like(gate), d_initial


@opaque("delta_rule_backward", _backward_outputs)
def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state (None without one)."""
    made = _backward_outputs(do, d_final, q, k, v, beta, log_decay, initial, cu_seqlens)
    dq, dk, dv, d_beta, d_decay, d_initial = made
    heads, groups, channels = q.shape[2], k.shape[2], v.shape[3]
    with on_device(q):
        chunks = chunks_of(k, cu_seqlens)
        size = chunks.total * groups
        n, u, g, inverse = prepare(k, v, beta, log_decay, chunks)
        states, x = kept(k, channels, chunks)
        sweep(k, n, u, g, initial, chunks, states=states, x=x)
        z, dx = kept(k, channels, chunks)
        tensors: tuple[Tensor | None, ...] = (q, k, do, g, z, dx, chunks.spans)
        start_kernel(local_kernel, "local", size, tensors, chunks, k, channels, heads)
        tensors = (k, n, g, z, dx, d_final, d_initial, chunks.first, chunks.bounds)
        start_kernel(reverse_kernel, "reverse", chunks.documents * groups, tensors, chunks, k, channels)
        dg = torch.empty_like(g)
        tensors = (q, k, do, x, states, g, dq, dk, dg, chunks.spans)
        start_kernel(query_kernel, "query", size, tensors, chunks, k, channels, heads)
        tensors = (k, v, beta, n, u, g, inverse, states, z, x, dx, dg, dk, dv, d_beta, d_decay, chunks.spans)
        start_kernel(key_kernel, "key", size, tensors, chunks, k, channels)
    return made
