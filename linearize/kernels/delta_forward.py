"""The gated delta rule: the WY form of every chunk at once, then one sweep over the chunks with the state in registers.

With g the log decay since the chunk's start and G its total, a chunk of C tokens that starts from the state S has

    T = (I + A)^-1, A_ij = beta_i e^(g_i - g_j) k_i.k_j below the diagonal       (prepare_kernel)
    N = -T diag(beta e^g) K, U = T diag(beta) V
    X = U + N S,  S <- e^G S + (e^(G - g) K)^T X                                  (sweep_kernel)
    O = e^g Q S + (Q K^T . e^(g_i - g_j), j <= i) X                               (output_kernel)

    q [rows, H, K]   k [rows, G, K]   v [rows, G, V]   beta, log_decay [rows, G]   out [rows, H, V]   (rows B * T)
    tile = chunk * G + key head:   n [tile, C, K]   u, x [tile, V, C]   g [tile, C]   T [tile, C, C]   S [tile, V, K]

Documents start chunks, so that what is kept a chunk needs no masks: what stands past a document's end is zero. The
sweep takes its products transposed (X^T = U^T + S^T N^T), because then the state and X are left operands straight from
registers, and no result of a product is ever transposed, which some compilers get wrong on Hopper. g is in base 2.

Sources: Yang et al. 2024 (2406.06484, 2412.06464).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    dot,
    dot_add,
    on_device,
    opaque,
)
from .delta_chunks import CHUNK, Chunks, chunk_span, chunks_of, document_span, start_kernel, within

LOG2_E = tl.constexpr(1.4426950408889634)


# Kernels -----------------------------------------------------------------------------------------------------------
# A base pointer, moved by 64-bit numbers, and 32-bit offsets in a chunk: a sweep's time is that of its instructions.


@triton.jit
def _invert(place, C: tl.constexpr, PRECISION: tl.constexpr):
    """Turns A [C, C] (fp32, zero on and above the diagonal) into (I + A)^-1, in memory; C is 64.

    With D the inverse of the diagonal blocks and M the blocks that join two of them, the inverse at twice the size is
    D - D M D: as stable as substitution, and made of products. Up to 16 all blocks at once, then block by block.
    """
    s = tl.arange(0, 16)
    row, column = s[None, :, None], s[None, None, :]
    block = place + (tl.arange(0, C // 16)[:, None, None] * (16 * C + 16) + row * C + column)
    a = tl.load(block)
    apart = row ^ column  # its highest bit is the level at which the blocks of row and column join
    d = tl.where(apart == 0, 1.0, tl.where(apart == 1, -a, 0.0))
    for level in tl.static_range(1, 4):
        d -= dot(dot(d, tl.where(apart >> level == 1, a, 0.0), PRECISION), d, PRECISION)
    tl.debug_barrier()  # before what is overwritten, too: two warps may have read the same
    tl.store(block, d)
    tl.debug_barrier()
    block = place + (tl.arange(0, C // 32)[:, None, None] * (32 * C + 32) + row * C + column)
    d = dot(tl.load(block + 16 * C + 16), tl.load(block + 16 * C), PRECISION)
    d = -dot(d, tl.load(block), PRECISION)
    tl.debug_barrier()
    tl.store(block + 16 * C, d)
    tl.debug_barrier()
    s = tl.arange(0, 32)
    block = place + (s[:, None] * C + s[None, :])
    d = dot(tl.load(block + 32 * C + 32), tl.load(block + 32 * C), PRECISION)
    d = -dot(d, tl.load(block), PRECISION)
    tl.debug_barrier()
    tl.store(block + 32 * C, d)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "each"])
def prepare_kernel(
    k,
    v,
    beta,
    log_decay,
    n,
    u,
    g,
    inverse,
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
    """g, T, N and U of one chunk and key head."""
    tile = tl.program_id(0).to(tl.int64)
    start, left = chunk_span(tl.program_id(0) // G, spans, tokens, each, C)
    if left <= 0:
        return
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    live, inside = i < left, within(kk, K, BK)
    operand = k.dtype.element_ty
    base = start * G + tl.program_id(0) % G
    decay = tl.cumsum(tl.load(log_decay + base + i * G, mask=live, other=0).to(tl.float32) * LOG2_E, 0)
    tl.store(g + tile * C + i, decay)
    gate = tl.load(beta + base + i * G, mask=live, other=0).to(tl.float32)
    offset = i[:, None] * (G * K) + kk[None, :]
    keys = tl.load(k + base * K + offset, mask=live[:, None] & inside[None, :], other=0)
    between = tl.where(i[:, None] > i[None, :], decay[:, None] - decay[None, :], float("-inf"))
    a = dot(keys, tl.trans(keys), PRECISION) * tl.exp2(between) * gate[:, None]
    square = i[:, None] * C + i[None, :]
    tl.store(inverse + tile * C * C + square, a)
    tl.debug_barrier()
    _invert(inverse + tile * C * C, C, PRECISION)
    whole = tl.load(inverse + tile * C * C + square)

    scaled = (whole * (-gate * tl.exp2(decay))[None, :]).to(operand)
    place = n + tile * C * K + (i[:, None] * K + kk[None, :])
    tl.store(place, dot(scaled, keys, PRECISION).to(operand), mask=inside[None, :])
    whole_t = tl.load(inverse + tile * C * C + (i[None, :] * C + i[:, None]))
    scaled = (whole_t * gate[:, None]).to(operand)
    for first_value in range(0, V, BV):
        value = first_value + tl.arange(0, BV)
        there = within(value, V, BV)[:, None]
        values_t = tl.load(v + base * V + (i[None, :] * (G * V) + value[:, None]), mask=live[None, :] & there, other=0)
        place_u = u + tile * C * V + (value[:, None] * C + i[None, :])
        tl.store(place_u, dot(values_t, scaled, PRECISION).to(operand), mask=there)


@triton.jit(do_not_specialize=["tokens", "each"])
def sweep_kernel(
    k,
    n,
    u,
    g,
    initial,
    states,
    x,
    final,
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
    """The chunks of one document, key head and tile of value channels, one after another.

    Writes the state before each chunk `states`, `x`, and where asked for the state after the last chunk `final`
    [N, G, K, V].
    """
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
    if initial is not None:
        state = tl.load(initial + own, mask=inside, other=0).to(tl.float32)
    base = start * G + head
    tile = chunk * G + head
    offset_k = i[:, None] * (G * K) + kk[None, :]
    offset_n = i[None, :] * K + kk[:, None]
    offset_u = value[:, None] * C + i[None, :]
    offset_s = value[:, None] * K + kk[None, :]
    for step in range(count):
        live = i < length - step * C
        n_t = tl.load(n + tile * C * K + offset_n, mask=inside_k[:, None], other=0)
        u_t = tl.load(u + tile * C * V + offset_u, mask=inside_v[:, None], other=0)
        keys = tl.load(k + base * K + offset_k, mask=live[:, None] & inside_k[None, :], other=0)
        decay = tl.load(g + tile * C + i)
        total = tl.load(g + tile * C + C - 1)
        held = state.to(operand)
        x_t = dot_add(held, n_t, u_t.to(tl.float32), PRECISION)
        tl.store(states + tile * V * K + offset_s, held, mask=inside)
        tl.store(x + tile * C * V + offset_u, x_t.to(operand), mask=inside_v[:, None])
        x_t *= tl.exp2(total - decay)[None, :]
        state = dot_add(x_t.to(operand), keys, state * tl.exp2(total), PRECISION)
        base += C * G
        tile += G
    if final is not None:
        tl.store(final + own, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "each"])
def output_kernel(
    q,
    k,
    g,
    states,
    x,
    out,
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
    """The output of one chunk and query head."""
    h = tl.program_id(0) % H
    head = h // (H // G)
    chunk = tl.program_id(0) // H
    start, left = chunk_span(chunk, spans, tokens, each, C)
    if left <= 0:
        return
    tile = chunk.to(tl.int64) * G + head
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    live, inside = i < left, within(kk, K, BK)
    operand = k.dtype.element_ty
    own = start * H + h
    offset = i[:, None] * (H * K) + kk[None, :]
    queries = tl.load(q + own * K + offset, mask=live[:, None] & inside[None, :], other=0)
    offset = i[None, :] * (G * K) + kk[:, None]
    keys_t = tl.load(k + (start * G + head) * K + offset, mask=live[None, :] & inside[:, None], other=0)
    decay = tl.load(g + tile * C + i)
    between = tl.where(i[:, None] >= i[None, :], decay[:, None] - decay[None, :], float("-inf"))
    scores = (dot(queries, keys_t, PRECISION) * tl.exp2(between)).to(operand)
    for first_value in range(0, V, BV):
        value = first_value + tl.arange(0, BV)
        there = within(value, V, BV)[None, :]
        place = states + tile * V * K + (value[None, :] * K + kk[:, None])
        state = tl.load(place, mask=there & inside[:, None], other=0)
        corrected = tl.load(x + tile * C * V + (value[None, :] * C + i[:, None]), mask=there, other=0)
        o = dot(queries, state, PRECISION) * tl.exp2(decay)[:, None]
        o = dot_add(scores, corrected, o, PRECISION)
        place = out + own * V + (i[:, None] * (H * V) + value[None, :])
        tl.store(place, o.to(operand), mask=live[:, None] & there)


# Launches ----------------------------------------------------------------------------------------------------------


def prepare(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, chunks: Chunks) -> tuple[Tensor, ...]:
    """n, u, g and T of every chunk."""
    size, rows, columns = chunks.total * k.shape[2], k.shape[3], v.shape[3]
    n, u = k.new_empty(size, CHUNK, rows), k.new_empty(size, columns, CHUNK)
    g = torch.empty(size, CHUNK, dtype=torch.float32, device=k.device)
    inverse = g.new_empty(size, CHUNK, CHUNK)
    tensors = (k, v, beta, log_decay, n, u, g, inverse, chunks.spans)
    start_kernel(prepare_kernel, "prepare", size, tensors, chunks, k, columns)
    return n, u, g, inverse


def sweep(
    k: Tensor,
    n: Tensor,
    u: Tensor,
    g: Tensor,
    initial: Tensor | None,
    chunks: Chunks,
    *,
    states: Tensor,
    x: Tensor,
    final: Tensor | None = None,
) -> None:
    """Fills `states` and `x` (see `kept`), and `final` where it is given."""
    tensors = (k, n, u, g, initial, states, x, final, chunks.first, chunks.bounds)
    start_kernel(sweep_kernel, "sweep", chunks.documents * k.shape[2], tensors, chunks, k, u.shape[1])


def kept(k: Tensor, channels: int, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Room for the state before every chunk and for x."""
    size = chunks.total * k.shape[2]
    return k.new_empty(size, channels, k.shape[3]), k.new_empty(size, channels, CHUNK)


def _forward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
) -> tuple[Tensor, Tensor]:
    documents = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final: Any = None
    if output_state:
        final = torch.empty(documents, *k.shape[2:], v.shape[3], dtype=torch.float32, device=q.device)
    return q.new_empty(*q.shape[:3], v.shape[3]), final


@opaque("delta_rule_forward", _forward_outputs)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the final state or None."""
    out, final = _forward_outputs(q, k, v, beta, log_decay, initial, cu_seqlens, output_state)
    heads, channels = q.shape[2], v.shape[3]
    with on_device(q):
        chunks = chunks_of(k, cu_seqlens)
        n, u, g, _ = prepare(k, v, beta, log_decay, chunks)
        states, x = kept(k, channels, chunks)
        sweep(k, n, u, g, initial, chunks, states=states, x=x, final=final)
        tensors = (q, k, g, states, x, out, chunks.spans)
        start_kernel(output_kernel, "output", chunks.total * heads, tensors, chunks, k, channels, heads)
    return out, final
