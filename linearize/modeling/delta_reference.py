"""The gated delta rule in plain torch, chunk by chunk; shapes as in reference.py.

The state holds a value for each key and is corrected, not only added to:

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = q_t^T S_t,   a_t = exp(log_decay_t)

which is S_t = a_t S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - a_t S_{t-1}^T k_t). In a chunk that starts from S, with
g_t the log decay since its start, the u solve a triangular system (the WY form):

    (I + A) U = diag(beta) V - diag(beta e^g) K S,   A_tj = beta_t e^(g_t - g_j) k_t.k_j for j < t

Sources: Yang et al. 2024 (2406.06484), Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet, 2412.06464).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .reference import LinearState, _Chunks, widen


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
    """The gated delta rule; stable where beta_t |k_t|^2 is at most 2, so keys come L2-normalised.

    Args:
        q, k, v: [B, T, H, K], [B, T, G, K], [B, T, G, V], after any norm and scale.
        beta: [B, T, G], how much of what a key held is replaced; 0 leaves the key out.
        log_decay: [B, T, G], at most 0; None: nothing decays.
        initial_state: fp32, N = B, or the number of documents with `cu_seqlens`.
        cu_seqlens: [N + 1] bounds of documents in a flattened batch of 1; nothing passes between documents.
        chunk_size: tokens of a chunk, 64.

    Returns:
        Output [B, T, H, V] in the accumulation dtype, and the final state or None.

    Raises:
        ValueError: names the argument whose shape is wrong.
    """
    tokens, heads = q.shape[1:3]
    groups = k.shape[2]
    if heads % groups:
        raise ValueError(f"q has {heads} heads, which do not divide into the {groups} heads of k")
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None and gate.shape != k.shape[:3]:
            raise ValueError(f"{name} must be {tuple(k.shape[:3])}, got {tuple(gate.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        q = widen(q)
        dtype = q.dtype
        k, v, beta = k.to(dtype), v.to(dtype), beta.to(dtype)
        decay = torch.zeros_like(beta) if log_decay is None else log_decay.to(dtype)
        initial = None if initial_state is None else initial_state.kv.to(dtype)
        if tokens == 1 and cu_seqlens is None:
            return _step(q, k, v, beta, decay, initial, output_final_state)
        chunks = _Chunks(q, chunk_size or 64, cu_seqlens)
        qc = chunks.split(q).unflatten(3, (groups, heads // groups))  # [B, n, C, G, R, K]
        kc, vc = chunks.split(k).transpose(2, 3), chunks.split(v).transpose(2, 3)  # [B, n, G, C, K or V]
        bc = chunks.split(beta).transpose(2, 3).unsqueeze(-1)  # [B, n, G, C, 1]
        g = chunks.split(decay).cumsum(2).transpose(2, 3)  # [B, n, G, C]
        total = g[..., -1:]

        causal = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
        # Masked before the exponential: above the diagonal the differences grow without bound.
        weight = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
        system = (bc * (kc @ kc.mT) * weight).tril(-1)
        right = torch.cat([bc * g.exp().unsqueeze(-1) * kc, bc * vc], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        w, u = solved.split([k.shape[-1], v.shape[-1]], dim=-1)
        k_out = kc * (total - g).exp().unsqueeze(-1)

        # One chunk after another: what the state already holds is taken from the values before they enter it.
        starts = [0, chunks.count] if chunks.first_chunks is None else [*chunks.first_chunks, chunks.count]
        before, corrected, final = [], [], []
        for document, (start, end) in enumerate(pairwise(starts)):
            if initial is None:
                state = q.new_zeros(q.shape[0], groups, k.shape[-1], v.shape[-1])
            else:
                state = initial if chunks.first_chunks is None else initial[document : document + 1]
            for n in range(start, end):
                before.append(state)
                corrected.append(u[:, n] - w[:, n] @ state)
                state = total[:, n].exp().unsqueeze(-1) * state + k_out[:, n].mT @ corrected[-1]
            final.append(state)
        scores = torch.einsum("bnigrk,bngjk->bngrij", qc, kc) * weight.unsqueeze(3)
        out = torch.einsum("bngrij,bngjv->bnigrv", scores, torch.stack(corrected, dim=1))
        q_in = qc * g.exp().transpose(2, 3)[..., None, None]
        out = out + torch.einsum("bnigrk,bngkv->bnigrv", q_in, torch.stack(before, dim=1))
        return chunks.join(out).flatten(2, 3), LinearState(torch.cat(final)) if output_final_state else None


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, LinearState | None]:
    """One token of the recurrence; shapes as in `delta_rule` with T = 1."""
    q1 = q[:, 0].unflatten(1, (k.shape[2], -1))  # [B, G, R, K]
    k1, v1, b1 = k[:, 0], v[:, 0], beta[:, 0].unsqueeze(-1)
    if state is None:
        kv = k1.unsqueeze(-1) * (b1 * v1).unsqueeze(-2)
    else:
        faded = state * decay[:, 0].exp()[..., None, None]
        held = torch.einsum("bgk,bgkv->bgv", k1, faded)
        kv = faded + k1.unsqueeze(-1) * (b1 * (v1 - held)).unsqueeze(-2)
    out = torch.einsum("bgrk,bgkv->bgrv", q1, kv).flatten(1, 2).unsqueeze(1)
    return out, LinearState(kv) if output_final_state else None
