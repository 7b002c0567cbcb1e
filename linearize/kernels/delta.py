"""The gated delta rule: `delta_forward` and `delta_backward` as one differentiable operation."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.modeling.delta_reference import delta_rule as reference_delta_rule
from linearize.modeling.reference import LinearState

from .common import INTERPRETED, check_bounds, check_heads, check_shape, refuse_second_derivative
from .delta_backward import backward
from .delta_forward import forward


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        output_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, beta, log_decay, initial, cu_seqlens)
        ctx.output_state = output_state
        ctx.set_materialize_grads(False)
        return forward(q, k, v, beta, log_decay, initial, cu_seqlens, output_state)

    @staticmethod
    def backward(ctx, do, d_final):
        refuse_second_derivative()

        q, k, v, beta, log_decay, initial, cu_seqlens = ctx.saved_tensors
        do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.contiguous()
        d_final = None if d_final is None or not ctx.output_state else d_final.float().contiguous()
        made = backward(do, d_final, q, k, v, beta, log_decay, initial, cu_seqlens)
        dq, dk, dv, d_beta, d_decay, d_initial = made
        d_initial = None if initial is None else d_initial.to(initial.dtype)
        return dq, dk, dv, d_beta.to(beta.dtype), d_decay.to(log_decay.dtype), d_initial, None, None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, LinearState | None]:
    """`modeling.delta_reference.delta_rule` on the device; the output comes in v's dtype, the state in fp32.

    `chunk_size` is the reference's alone: here chunks have 64 tokens. The reference runs in fp32 above 128 key
    channels, where a chunk's tiles do not fit a multiprocessor's memory.

    Raises:
        ValueError: an argument's shape, dtype or device is wrong; names it.
    """
    check_heads(q, k, v)
    cu_seqlens = check_bounds(cu_seqlens, q)
    check_shape("beta", beta, tuple(k.shape[:3]), q)
    check_shape("log_decay", log_decay, tuple(k.shape[:3]), q)
    documents = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    initial = None if initial_state is None else initial_state.kv
    check_shape("initial_state.kv", initial, (documents, *k.shape[2:], v.shape[3]), q)
    if v.dtype == torch.float32 and k.shape[3] > 128 and not INTERPRETED:
        out, state = reference_delta_rule(
            q, k, v, beta=beta, log_decay=log_decay, initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return out.to(v.dtype), state
    # fp16's range does not hold states and their gradients; the interpreter truncates to 16 bits and does not round.
    work = torch.float32 if INTERPRETED or v.dtype == torch.float32 else torch.bfloat16
    dtype = v.dtype
    decay = beta.new_zeros(beta.shape, dtype=torch.float32) if log_decay is None else log_decay.contiguous()
    q, k, v = (tensor.to(work).contiguous() for tensor in (q, k, v))
    initial = None if initial is None else initial.contiguous()
    out, final = _DeltaRule.apply(q, k, v, beta.contiguous(), decay, initial, cu_seqlens, output_final_state)
    return out.to(dtype), LinearState(final) if output_final_state else None
