"""`linear_attention` on the sweep engine: decay none, a scalar or a vector a token; shapes as in the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.modeling.reference import LinearState

from .common import INTERPRETED, check_bounds, check_heads, check_shape, on_device, opaque, refuse_second_derivative
from .decay_gradient import edges, room
from .sweep import NONE, ROWS, SCALAR
from .sweeps import Own, forward, gradients, key_tiles, plan_of, segment_states
from .vector_decay import CHUNK, complete, cumulate, prepare

Pair = tuple[Tensor | None, Tensor | None]


def _gate(g: Tensor | None) -> int:
    return NONE if g is None else SCALAR if g.dim() == 3 else ROWS


def _wide(v: Tensor) -> bool:
    """Whether the dots take fp32. bf16 goes as it is; fp16's range does not hold states and weighted keys, so it goes
    as tf32, which holds it to the bit. The interpreter truncates where the device rounds: there everything is fp32."""
    return v.dtype != torch.bfloat16 or INTERPRETED


def _precision(v: Tensor) -> str:
    return "tf32x3" if v.dtype == torch.float32 else "tf32"


def _out_dtype(v: Tensor, normalizer: bool) -> torch.dtype:
    """v's, but fp32 for fp16 values before their normaliser: the sum outgrows 65504."""
    return torch.float32 if normalizer and v.dtype == torch.float16 else v.dtype


def _forward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    initial_n: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: bool,
    output_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, its normaliser, the segments' first states, the final ones and the summed decays."""
    batch, tokens, heads, rows = q.shape
    groups, columns = v.shape[2:]
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = plan_of(documents, heads, tokens, columns, _gate(g), cu_seqlens is not None)
    out = torch.empty(batch, tokens, heads, columns, dtype=_out_dtype(v, normalizer), device=q.device)
    z = starts = starts_n = end = end_n = cum = None
    if normalizer:
        z = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if keep and plan.segments > 1:
        starts = torch.empty(documents, groups, plan.segments, rows, columns, dtype=torch.float32, device=q.device)
        starts_n = torch.empty_like(starts[..., 0]) if normalizer else None
    if output_state:
        end = torch.empty(documents, groups, rows, columns, dtype=torch.float32, device=q.device)
        end_n = torch.empty_like(end[..., 0]) if normalizer else None
    if g is not None and g.dim() == 3:
        cum = torch.empty(batch, groups, tokens, dtype=torch.float32, device=q.device)
    return out, z, starts, starts_n, end, end_n, cum  # type: ignore[return-value]


@opaque("linear_attention_forward", _forward_outputs)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    initial_n: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: bool,
    output_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _forward_outputs(q, k, v, g, initial, initial_n, cu_seqlens, normalizer, output_state, keep)
    out, z, starts, starts_n, end, end_n, _ = made
    batch, tokens, heads, _ = q.shape
    groups, columns = v.shape[2:]
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gate, wide = _gate(g), _wide(v)
    plan = plan_of(documents, heads, tokens, columns, gate, cu_seqlens is not None)
    with on_device(q):
        scores = None
        cum = None
        if g is not None and gate == SCALAR:
            cum = cumulate(g, cu_seqlens)
        elif g is not None:
            q, k, scores, cum, _ = prepare(q, k, g, cu_seqlens, wide, _precision(v))
        own: Own = (None, None, None)
        if plan.segments > 1:
            own = segment_states(k, v, cum, None, groups, plan, gate, normalizer, False, wide, _precision(v))
        forward(
            q,
            k,
            v,
            out,
            plan,
            gate,
            wide,
            _precision(v),
            cu_seqlens,
            cum=cum,
            scores=scores,
            z=z,
            initial=(initial, initial_n),
            own=own,
            starts=(starts, starts_n),
            end=(end, end_n),
        )
    return out, z, starts, starts_n, end, end_n, cum if gate == SCALAR else None  # type: ignore[return-value]


def _backward_outputs(
    do: Tensor,
    dz: Tensor | None,
    d_end: Tensor | None,
    d_end_n: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    initial_n: Tensor | None,
    starts: Tensor | None,
    starts_n: Tensor | None,
    end: Tensor | None,
    end_n: Tensor | None,
    cum: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of the gradients of q, k, v, the decay and the initial state."""
    return (  # type: ignore[return-value]
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        torch.empty(g.shape, dtype=g.dtype, device=q.device) if g is not None and decay_gradient else None,
        None if initial is None else torch.empty_like(initial),
        None if initial_n is None else torch.empty_like(initial_n),
    )


@opaque("linear_attention_backward", _backward_outputs)
def _backward(
    do: Tensor,
    dz: Tensor | None,
    d_end: Tensor | None,
    d_end_n: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    initial_n: Tensor | None,
    starts: Tensor | None,
    starts_n: Tensor | None,
    end: Tensor | None,
    end_n: Tensor | None,
    cum: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, rows = q.shape
    groups, columns = v.shape[2:]
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gate, wide = _gate(g), _wide(v)
    vector, precision = gate == ROWS, _precision(v)
    plan = plan_of(documents, heads, tokens, columns, gate, cu_seqlens is not None)
    cum = cum if gate == SCALAR else None  # under the compiler an empty tensor stands for None
    # Gradients of keys and values are a query head's each until the end.
    dq, dk = torch.empty_like(q), torch.empty_like(q, dtype=k.dtype)
    dv = torch.empty(batch, tokens, heads, columns, dtype=v.dtype, device=q.device)
    d_initial = d_initial_n = None
    if initial is not None:
        d_initial = torch.empty(documents, heads, rows, columns, dtype=torch.float32, device=q.device)
        d_initial_n = None if initial_n is None else torch.empty_like(d_initial[..., 0])
    lines = dg = None
    marks: Pair = (None, None)
    d_marks: Pair = (None, None)
    if g is not None and decay_gradient:
        (marks_kv, d_marks_kv), (marks_n, d_marks_n) = room(q, k, v, cu_seqlens, wide, vector, dz is not None)
        marks, d_marks = (marks_kv, marks_n), (d_marks_kv, d_marks_n)
        if vector:
            count = -(-tokens // CHUNK) * batch if cu_seqlens is None else tokens // CHUNK + documents
            dg = torch.empty(count, heads, rows, dtype=torch.float32, device=q.device)
        else:
            tiles = key_tiles(rows, columns)
            lines = torch.empty(batch, heads, 2 * tiles, tokens, dtype=torch.float32, device=q.device)
            dg = torch.empty(g.shape, dtype=g.dtype, device=q.device)
    with on_device(q):
        q_in, k_out, scores = q, k, None
        if vector and g is not None:
            prepared = prepare(q, k, g, cu_seqlens, wide, precision)
            q_in, k_out, scores, cum, _ = prepared
        own: Own = (None, None, None)
        if plan.segments > 1:
            own = segment_states(q_in, do, cum, dz, heads, plan, gate, dz is not None, True, wide, precision)
        gradients(
            q_in,
            k_out,
            v,
            do,
            dq,
            dk,
            dv,
            plan,
            gate,
            wide,
            precision,
            cu_seqlens,
            cum=cum,
            scores=scores,
            dz=dz,
            initial=(initial, initial_n),
            starts=(starts, starts_n),
            d_end=(d_end, d_end_n),
            own=own,
            d_initial=(d_initial, d_initial_n),
            lines=lines,
            marks=marks,
            d_marks=d_marks,
        )
        if dg is not None:
            edges(marks, d_marks, (end, end_n), (d_end, d_end_n), lines, dg, batch, tokens, cu_seqlens)
        if vector and g is not None:
            dg = complete(q, k, v, do, dz, g, prepared, dq, dk, cu_seqlens, wide, precision, dg)
    return (  # type: ignore[return-value]
        dq,
        _per_key_head(dk, groups),
        _per_key_head(dv, groups),
        dg,
        None if d_initial is None else d_initial.unflatten(1, (groups, -1)).sum(2),
        None if d_initial_n is None else d_initial_n.unflatten(1, (groups, -1)).sum(2),
    )


def _per_key_head(x: Tensor, groups: int) -> Tensor:
    """Sums [B, T, H, ...] over the query heads of each key head."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial, initial_n, cu_seqlens, normalizer, output_state):
        ctx.set_materialize_grads(False)
        out, z, starts, starts_n, end, end_n, cum = _forward(
            q, k, v, g, initial, initial_n, cu_seqlens, normalizer, output_state, True
        )
        ctx.save_for_backward(q, k, v, g, initial, initial_n, cu_seqlens, starts, starts_n, end, end_n, cum)
        ctx.normalizer, ctx.output_state = normalizer, output_state
        return out, z, end, end_n

    @staticmethod
    def backward(ctx, do, dz, d_end, d_end_n):
        refuse_second_derivative()
        q, k, v, g, initial, initial_n, cu_seqlens, starts, starts_n, end, end_n, cum = ctx.saved_tensors
        if do is None:
            do = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        if not ctx.normalizer:
            dz = None
        elif dz is None:
            dz = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        else:
            dz = dz.float().contiguous()  # [B, H, T], as z came out
        if not ctx.output_state or (d_end is None and d_end_n is None):
            d_end = d_end_n = None
        else:
            d_end = torch.zeros_like(end) if d_end is None else d_end.float().contiguous()
            if ctx.normalizer:
                d_end_n = torch.zeros_like(end_n) if d_end_n is None else d_end_n.float().contiguous()
            else:
                d_end_n = None
        dq, dk, dv, dg, d_initial, d_initial_n = _backward(
            do.contiguous(),
            dz,
            d_end,
            d_end_n,
            q,
            k,
            v,
            g,
            initial,
            initial_n,
            starts,
            starts_n,
            end if ctx.output_state else None,
            end_n if ctx.output_state and ctx.normalizer else None,
            cum,
            cu_seqlens,
            g is not None and ctx.needs_input_grad[3],
        )
        return (
            dq,
            dk,
            dv,
            dg if ctx.needs_input_grad[3] else None,
            None if initial is None else d_initial,
            None if initial_n is None else d_initial_n,
            None,
            None,
            None,
        )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    normalizer: bool = False,
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None, LinearState | None]:
    """Causal linear attention o_t = sum_{j<=t} (q_t . D_{j+1..t} k_j) v_j; arguments as in `modeling.reference`.

    A log decay below -50 a token is taken as -50 (a weight of 2e-22). `chunk_size` is the reference's alone.

    Returns:
        Output [B, T, H, V] in v's dtype (fp32 for fp16 with a normaliser), the normaliser [B, T, H] in fp32 or None,
        and the final state in fp32 or None.

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument.
    """
    check_heads(q, k, v)
    cu_seqlens = check_bounds(cu_seqlens, q)
    batch, tokens, groups, channels = k.shape
    if tokens == 0:
        raise ValueError("q, k and v have no tokens")
    if log_decay is not None:
        shape = (batch, tokens, groups) if log_decay.dim() == 3 else (batch, tokens, groups, channels)
        check_shape("log_decay", log_decay, shape, q)
        if log_decay.dim() == 4:
            log_decay = log_decay.contiguous()
    kv = n = None
    if initial_state is not None:
        kv, n = initial_state.kv, initial_state.k
        documents = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check_shape("initial_state.kv", kv, (documents, groups, channels, v.shape[3]), q)
        check_shape("initial_state.k", n, (documents, groups, channels), q)
        kv = kv.float().contiguous()
        n = None if not normalizer else torch.zeros_like(kv[..., 0]) if n is None else n.float().contiguous()
    if q.dtype != v.dtype:
        q = q.to(v.dtype)
    if k.dtype != v.dtype:
        k = k.to(v.dtype)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    leaves = (q, k, v, log_decay, kv, n)
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        out, z, end, end_n = _LinearAttention.apply(*leaves, cu_seqlens, normalizer, output_final_state)
    else:
        out, z, _, _, end, end_n, _ = _forward(*leaves, cu_seqlens, normalizer, output_final_state, False)
    state = LinearState(end, end_n if normalizer else None) if output_final_state else None
    return out, z.transpose(1, 2) if normalizer else None, state
