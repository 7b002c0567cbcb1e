"""The gradient of a decay, from the states that the sweeps of dq and dk leave every MARK tokens.

    dg_i = sum over j >= i of q_j . dq_j - k_j . dk_j

The sum cancels and its error grows with its length, so it begins anew at every mark with <state, gradient of the
state>, which is the same number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, power_of_2
from .sweep import MARKED_SCALAR, MARKED_VECTOR
from .vector_decay import CHUNK, chunk_table

# Rows of a state at a time.
BLOCK = 32


@triton.jit(do_not_specialize=["T", "each"])
def edges_kernel(
    marks,
    marks_n,
    d_marks,
    d_marks_n,
    final,
    final_n,
    d_end,
    d_end_n,
    lines,
    dg,
    table,
    T,
    each,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LINES: tl.constexpr,
    NORM: tl.constexpr,
    D_END: tl.constexpr,
    PACKED: tl.constexpr,
    MARKED: tl.constexpr,
):
    """What the decays between two marks owe to later tokens; grid marks x G, or chunks x G of packed documents.

    marks [.., G, V, K], d_marks [.., H, V, K], final and d_end [N, G, K, V]. A scalar decay's gradient dg [B, T, G] is
    finished here, from `lines` [B, H, LINES, T], the shares of q . dq - k . dk. For a vector one (LINES 0) dg
    [chunks, H, K] gets the debt of each mark's last chunk.
    """
    g = tl.program_id(0) % G
    item = tl.program_id(0) // G
    if PACKED:
        chunk = item
        place = tl.load(table + chunk * 5 + 3).to(tl.int32)
        count = tl.load(table + chunk * 5 + 4).to(tl.int32)
        start = tl.load(table + chunk * 5)
        slot = tl.load(table + chunk * 5 + 2)
        n = slot - start // C
        base = start - place * C
        length = tl.load(table + chunk * 5 + 1) - base  # of the document up to here, which is all that is asked for
        mark = base // (C * MARKED) + n
        line = base
        batch = base * 0
    else:
        marked = tl.cdiv(each, MARKED)
        n = (item // marked).to(tl.int64)
        place = tl.minimum((item % marked + 1) * MARKED, each) - 1
        count = each
        slot = n * each + place
        length = tl.minimum((place + 1) * C, T).to(tl.int64)
        mark = n * marked
        line = n * 0
        batch = n
    is_end = place == count - 1
    mine = (place < count) & (is_end | ((place + 1) % MARKED == 0))
    if mine:
        channel, rows = tl.arange(0, BK), tl.arange(0, BV)
        in_k = channel < K
        carry = 0.0
        at_mark = mark + (place + 1) // MARKED
        for r in range(H // G):
            h = g * (H // G) + r
            debt = tl.zeros([BK], tl.float32)
            if is_end:
                if D_END:  # noqa: SIM102
                    if r == 0:  # a gradient of the final state is a key head's
                        for block in range((V + BV - 1) // BV):
                            at = (block * BV + rows)[:, None] + channel[None, :] * V
                            there = ((block * BV + rows) < V)[:, None] & in_k[None, :]
                            at += (n * G + g) * K * V
                            after = tl.load(final + at, mask=there, other=0)
                            grad = tl.load(d_end + at, mask=there, other=0)
                            debt += tl.sum(after * grad, 0)
                        if NORM:
                            at = (n * G + g) * K + channel
                            after = tl.load(final_n + at, mask=in_k, other=0)
                            grad = tl.load(d_end_n + at, mask=in_k, other=0)
                            debt += after * grad
            else:
                for block in range((V + BV - 1) // BV):
                    at = (block * BV + rows)[:, None] * K + channel[None, :]
                    there = ((block * BV + rows) < V)[:, None] & in_k[None, :]
                    after = tl.load(marks + (at_mark * G + g) * K * V + at, mask=there, other=0).to(tl.float32)
                    grad = tl.load(d_marks + (at_mark * H + h) * K * V + at, mask=there, other=0).to(tl.float32)
                    debt += tl.sum(after * grad, 0)
                if NORM:
                    after = tl.load(marks_n + (at_mark * G + g) * K + channel, mask=in_k, other=0)
                    debt += after * tl.load(d_marks_n + (at_mark * H + h) * K + channel, mask=in_k, other=0)
            if LINES == 0:
                tl.store(dg + (slot * H + h) * K + channel, debt, mask=in_k)
            else:
                carry += tl.sum(debt, 0)
        if LINES != 0:
            first = (place // MARKED) * (C * MARKED)
            token = first + tl.arange(0, C * MARKED)
            there = token < length
            gain = tl.zeros([C * MARKED], tl.float32)
            for r in range(H // G):
                for i in range(LINES):
                    at = ((batch * H + g * (H // G) + r) * LINES + i) * T + line + token
                    gain += tl.load(lines + at, mask=there, other=0)
            gain = tl.cumsum(gain, 0, reverse=True) + carry
            tl.store(dg + ((batch * T + line + token) * G + g), gain.to(dg.dtype.element_ty), mask=there)


def edges(
    marks: tuple[Tensor | None, Tensor | None],
    d_marks: tuple[Tensor | None, Tensor | None],
    final: tuple[Tensor | None, Tensor | None],
    d_end: tuple[Tensor | None, Tensor | None],
    lines: Tensor | None,
    dg: Tensor,
    batch: int,
    tokens: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Fills `dg`: the gradient of a scalar decay, or a vector one's debts; see `edges_kernel`."""
    assert marks[0] is not None and d_marks[0] is not None
    groups, columns, rows = marks[0].shape[1:]
    heads = d_marks[0].shape[1]
    marked = _marked(lines is None)
    if cu_seqlens is None:
        table, each = None, -(-tokens // CHUNK)
        items = batch * -(-each // marked)
    else:
        table, each = chunk_table(cu_seqlens, tokens), 0
        items = table.shape[0]
    if d_end[0] is None:
        final = (None, None)
    launch(
        edges_kernel,
        items * groups,
        (*marks, *d_marks, *final, *d_end, lines, dg, table),
        (tokens, each),
        (
            heads,
            groups,
            rows,
            columns,
            power_of_2(rows),
            BLOCK,
            CHUNK,
            0 if lines is None else lines.shape[2],
            marks[1] is not None,
            d_end[0] is not None,
            cu_seqlens is not None,
            marked,
        ),
        4,
        1,
    )


def _marked(vector: bool) -> int:
    return (MARKED_VECTOR if vector else MARKED_SCALAR).value


def room(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, wide: bool, vector: bool, normalizer: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Room for the marks of the states and of their gradients, and for those of their normalisers."""
    batch, tokens, heads, rows = q.shape
    groups, columns = v.shape[2:]
    mark = CHUNK * _marked(vector)
    count = -(-tokens // mark) * batch if cu_seqlens is None else tokens // mark + cu_seqlens.shape[0] - 1
    dtype = torch.float32 if wide else torch.bfloat16
    states = (
        q.new_empty(count, groups, columns, rows, dtype=dtype),
        q.new_empty(count, heads, columns, rows, dtype=dtype),
    )
    if not normalizer:
        return states, (None, None)
    return states, (
        q.new_empty(count, groups, rows, dtype=torch.float32),
        q.new_empty(count, heads, rows, dtype=torch.float32),
    )
