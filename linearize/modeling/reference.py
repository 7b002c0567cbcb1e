"""The operations of the mixers in plain torch: chunked (memory linear in length) and one step of the recurrence.

Shapes, here and in every file beside this one:
    B batch   T tokens   H query heads   G key heads (H = G * R, query head h reads key head h // R)
    K key channels (features)   V value channels   N documents, or B without `cu_seqlens`   C tokens of a chunk
    q [B, T, H, K]   k [B, T, G, K]   v [B, T, G, V]   output [B, T, H, V]   state [N, G, K, V]

The recurrence is S_t = D_t S_{t-1} + k_t v_t^T, o_t = q_t^T S_t, with D_t nothing, a scalar or a diagonal. Everything
accumulates in fp32 (fp64 for fp64 inputs) whatever comes in, also under autocast.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bend import bend_logits


class LinearState(NamedTuple):
    """What a linear mixer carries: `kv` [N, G, K, V], and `k` [N, G, K], the sum of keys, where it normalises."""

    kv: Tensor
    k: Tensor | None = None


def widen(x: Tensor) -> Tensor:
    """x in the accumulation dtype: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


class _Chunks:
    """Cuts [B, T, ...] into whole chunks and back. Documents start on chunk boundaries, so no chunk holds two."""

    def __init__(self, x: Tensor, size: int, cu_seqlens: Tensor | None) -> None:
        self.batch, self.tokens = x.shape[:2]
        self.size = size
        self.index: Tensor | None = None
        if cu_seqlens is None:
            self.count = -(-self.tokens // size)
            self.first_chunks: list[int] | None = None
            return
        if self.batch != 1:
            raise ValueError(f"cu_seqlens needs a flattened batch of 1, got q of batch {self.batch}")
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != self.tokens or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to {self.tokens} tokens, got {bounds}")
        self.first_chunks, slots, start = [], [], 0
        for a, b in pairwise(bounds):
            self.first_chunks.append(start)
            slots.append(torch.arange(b - a) + start * size)
            start += -(-(b - a) // size)
        self.count = start
        self.index = torch.cat(slots).to(x.device)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [B, n, C, ...], missing tokens zero."""
        length = self.count * self.size
        if self.index is not None:
            padded = x.new_zeros(1, length, *x.shape[2:]).index_copy(1, self.index, x)
        elif length > self.tokens:
            padded = torch.cat([x, x.new_zeros(self.batch, length - self.tokens, *x.shape[2:])], dim=1)
        else:
            padded = x
        return padded.reshape(self.batch, self.count, self.size, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        """[B, n, C, ...] back to [B, T, ...]."""
        flat = x.reshape(self.batch, self.count * self.size, *x.shape[3:])
        return flat[:, : self.tokens] if self.index is None else flat.index_select(1, self.index)

    def scan(self, update: Tensor, decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """State before each chunk [B, n, ...] and the final ones [N, ...], from each chunk's `update` [B, n, ...]
        and `decay`, which broadcasts to it (None: nothing decays)."""
        if self.first_chunks is None:
            state = update.new_zeros(update[:, 0].shape) if initial is None else initial
            if decay is None:
                total = update.cumsum(1) + state.unsqueeze(1)
                return torch.cat([state.unsqueeze(1), total[:, :-1]], dim=1), total[:, -1]
            before = []
            for n in range(self.count):
                before.append(state)
                state = decay[:, n] * state + update[:, n]
            return torch.stack(before, dim=1), state
        before, final = [], []
        ends = [*self.first_chunks[1:], self.count]
        for document, (start, end) in enumerate(zip(self.first_chunks, ends, strict=True)):
            state = update.new_zeros(update[:, 0].shape) if initial is None else initial[document : document + 1]
            for n in range(start, end):
                before.append(state)
                state = update[:, n] + (state if decay is None else decay[:, n] * state)
            final.append(state)
        return torch.stack(before, dim=1), torch.cat(final)


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
    """Causal linear attention, chunk by chunk: o_t = sum_{j<=t} (q_t . D_{j+1..t} k_j) v_j.

    Args:
        q, k, v: [B, T, H, K], [B, T, G, K], [B, T, G, V], after any feature map and scale.
        log_decay: None (no decay), [B, T, G] (a scalar a token: retention, Mamba-2) or [B, T, G, K] (GLA); at most 0.
        normalizer: also return z_t = sum_{j<=t} q_t . D k_j, [B, T, H].
        initial_state: fp32, N = B, or the number of documents with `cu_seqlens`.
        cu_seqlens: [N + 1] bounds of documents in a flattened batch of 1; nothing passes between documents.
        chunk_size: tokens of a chunk; 64, and 16 for a vector decay, whose chunk costs C^2 K.

    Returns:
        Output [B, T, H, V] and normaliser [B, T, H] or None, both in the accumulation dtype, and the final state or
        None. Sources: Sun et al. 2023 (RetNet), Yang et al. 2023 (GLA), Dao and Gu 2024 (SSD).
    """
    tokens, heads = q.shape[1:3]
    groups = k.shape[2]
    if heads % groups:
        raise ValueError(f"q has {heads} heads, which do not divide into the {groups} heads of k")
    vector = log_decay is not None and log_decay.dim() == 4
    with torch.autocast(q.device.type, enabled=False):
        q = widen(q)
        dtype = q.dtype
        k, v = k.to(dtype), v.to(dtype)
        if tokens == 1 and cu_seqlens is None:
            return _step(q, k, v, log_decay, normalizer, initial_state, output_final_state)
        chunks = _Chunks(q, chunk_size or (16 if vector else 64), cu_seqlens)
        qc = chunks.split(q).unflatten(3, (groups, heads // groups))  # [B, n, C, G, R, K]
        kc, vc = chunks.split(k), chunks.split(v)
        causal = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()

        decay_kv: Tensor | None = None
        decay_k: Tensor | None = None
        if log_decay is None:
            scores = torch.einsum("bnigrk,bnjgk->bngrij", qc, kc).masked_fill(~causal, 0)
            q_in, k_out = qc, kc
        else:
            g = chunks.split(log_decay.to(dtype)).cumsum(2)  # [B, n, C, G(, K)], the log decay since the chunk's start
            total = g[:, :, -1]
            # Differences are masked before the exponential: above the diagonal they grow without bound.
            if vector:
                between = g.unsqueeze(3) - g.unsqueeze(2)  # [B, n, i, j, G, K]
                weight = between.masked_fill(~causal[:, :, None, None], float("-inf")).exp()
                scores = torch.einsum("bnigrk,bnijgk->bngrij", qc, weight * kc.unsqueeze(2))
                q_in, k_out = qc * g.exp().unsqueeze(4), kc * (total.unsqueeze(2) - g).exp()
                decay_kv, decay_k = total.exp().unsqueeze(-1), total.exp()
            else:
                gh = g.transpose(2, 3)  # [B, n, G, C]
                between = gh.unsqueeze(-1) - gh.unsqueeze(-2)
                weight = between.masked_fill(~causal, float("-inf")).exp()
                scores = torch.einsum("bnigrk,bnjgk->bngrij", qc, kc) * weight.unsqueeze(3)
                q_in = qc * g.exp()[..., None, None]
                k_out = kc * (total.unsqueeze(2) - g).exp().unsqueeze(-1)
                decay_kv, decay_k = total.exp()[..., None, None], total.exp().unsqueeze(-1)

        initial = initial_state or LinearState(None, None)  # type: ignore[arg-type]
        update = torch.einsum("bnjgk,bnjgv->bngkv", k_out, vc)
        before, final_kv = chunks.scan(update, decay_kv, initial.kv)
        out = torch.einsum("bngrij,bnjgv->bnigrv", scores, vc)
        out = out + torch.einsum("bnigrk,bngkv->bnigrv", q_in, before)
        z: Tensor | None = None
        final_k: Tensor | None = None
        if normalizer:
            before_k, final_k = chunks.scan(k_out.sum(2), decay_k, initial.k)
            z = scores.sum(-1).permute(0, 1, 4, 2, 3) + torch.einsum("bnigrk,bngk->bnigr", q_in, before_k)
            z = chunks.join(z).flatten(2)
        state = LinearState(final_kv, final_k) if output_final_state else None
        return chunks.join(out).flatten(2, 3), z, state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalizer: bool,
    state: LinearState | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None, LinearState | None]:
    """One token of the recurrence; shapes as in `linear_attention` with T = 1."""
    groups = k.shape[2]
    q1 = q[:, 0].unflatten(1, (groups, -1))  # [B, G, R, K]
    kv = k[:, 0].unsqueeze(-1) * v[:, 0].unsqueeze(-2)
    total_k = k[:, 0] if normalizer else None
    if state is not None:
        decay = None if log_decay is None else log_decay[:, 0].to(q.dtype).exp()
        if decay is not None and decay.dim() == 2:
            decay = decay.unsqueeze(-1)  # [B, G, 1], as a vector decay is [B, G, K]
        kv = kv + (state.kv if decay is None else decay.unsqueeze(-1) * state.kv)
        if total_k is not None and state.k is not None:
            total_k = total_k + (state.k if decay is None else decay * state.k)
    out = torch.einsum("bgrk,bgkv->bgrv", q1, kv).flatten(1, 2).unsqueeze(1)
    z = None if total_k is None else torch.einsum("bgrk,bgk->bgr", q1, total_k).flatten(1).unsqueeze(1)
    return out, z, LinearState(kv, total_k) if output_final_state else None


def taylor_features(x: Tensor) -> Tensor:
    """[..., d] to [..., 1 + d + d (d + 1) / 2] with phi(x) . phi(y) = 1 + x.y + (x.y)^2 / 2.

    The second-order part is the symmetric square: off-diagonal products once, so that they count twice in the product
    (153 features for d = 16 in place of 273). Source: Arora et al. 2024 (Based).
    """
    # Slices and not an index: the backward pass of an index is a scatter, several times slower.
    pairs = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * 2**-0.5, *pairs], dim=-1)


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_weight: Tensor | None = None,
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, LinearState | None]:
    """Linear attention with the weights w_j (1 + s + s^2 / 2), s = q_t . k_j, and its normaliser.

    Args:
        q, k, v: [B, T, H, d], [B, T, G, d], [B, T, G, V]; d is small (16), the state holds 1 + d + d (d + 1) / 2 keys.
        key_weight: [B, T, G], multiplies a key's weight; 0 leaves it out. None: all 1.

    Returns:
        As `linear_attention` with `normalizer=True`.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = widen(q)
        dtype = q.dtype
        k_features = taylor_features(k.to(dtype))
        if key_weight is not None:
            k_features = k_features * key_weight.to(dtype).unsqueeze(-1)
        return linear_attention(
            taylor_features(q),
            k_features,
            v,
            normalizer=True,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )


def document_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The document's index and the position inside it, [T] each, of every token of a flattened batch."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return document, index - cu_seqlens[document]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float = 1.0,
    position: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` keys (the token's own among them) and the document's first `sinks` keys.

    Args:
        q: [B, Tq, H, D].
        k, v: [B, Tk, G, D], Tk >= Tq; the last key belongs to the last query.
        position: [B], the place in its document of the first query; negative by the number of pads on the left. Keys
            at places below 0 do not exist. None: the first key starts the document.
        sink_k, sink_v: [B, S, G, D], for a piece whose document began before it; None takes them from k and v.
        cu_seqlens: [N + 1] bounds of documents in a flattened batch of 1 (then Tk = Tq and no `position`).
        cap, slopes: of `Bend`; constants, without a gradient.

    Returns:
        Output [B, Tq, H, D] and log-sum-exp of the logits [B, Tq, H], both in the accumulation dtype. A query
        without any key gives 0 and -inf.
    """
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    offset = keys - queries
    device = q.device
    with torch.autocast(device.type, enabled=False):
        q = widen(q) * scale
        dtype = q.dtype
        k, v = k.to(dtype), v.to(dtype)
        if cu_seqlens is not None:
            document, place = document_positions(cu_seqlens, keys)
            document, place = document.unsqueeze(0), place.unsqueeze(0)
        else:
            start = torch.zeros(1, dtype=torch.long, device=device) + offset if position is None else position
            place = start.unsqueeze(1) + torch.arange(-offset, queries, device=device)  # of every key, [1 or B, Tk]
            document = None

        # Blocks of queries, each against its own keys and the `back` blocks before them.
        size = 1 if queries == 1 else min(max(window, 16), 128)
        if queries == 1:
            key_blocks, value_blocks, key_place = k.unsqueeze(1), v.unsqueeze(1), place.unsqueeze(1)
            query_blocks, query_place = q.unsqueeze(1), place[:, -1:].unsqueeze(1)
            key_document = query_document = None
        else:
            back = -(-(window - 1) // size)
            count = -(-queries // size)
            left = back * size - offset
            right = count * size - queries

            def blocks(x: Tensor, fill: float) -> Tensor:  # [B, Tk, ...] to [B, n, (back + 1) size, ...]
                padded = F.pad(x[:, max(-left, 0) :], (0, 0) * (x.dim() - 2) + (max(left, 0), right), value=fill)
                padded = padded.unflatten(1, (back + count, size))
                # not `unfold`: inductor's gradient of it is wrong on the CPU (torch 2.13)
                return torch.cat([padded[:, i : i + count] for i in range(back + 1)], dim=2)

            key_blocks, value_blocks, key_place = blocks(k, 0), blocks(v, 0), blocks(place, -1)
            query_blocks = F.pad(q, (0, 0, 0, 0, 0, right)).unflatten(1, (count, size))
            query_place = F.pad(place[:, offset:], (0, right), value=-1).unflatten(1, (count, size))
            key_document = None if document is None else blocks(document, -1)
            query_document = (
                None if document is None else F.pad(document, (0, right), value=-2).unflatten(1, (-1, size))
            )

        distance = query_place.unsqueeze(-1) - key_place.unsqueeze(-2)
        visible = (distance >= 0) & (distance < window) & (key_place >= 0).unsqueeze(-2)
        if key_document is not None and query_document is not None:
            visible &= query_document.unsqueeze(-1) == key_document.unsqueeze(-2)
        query_blocks = query_blocks.unflatten(3, (groups, heads // groups))
        leaning = None if slopes is None else slopes.view(groups, -1, 1, 1)
        scores = torch.einsum("bnigrd,bnjgd->bngrij", query_blocks, key_blocks)
        scores = bend_logits(scores, cap, leaning, distance[:, :, None, None])
        scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))

        if sinks:
            sink_index = torch.arange(sinks, device=device)
            if sink_k is None or sink_v is None:
                # [1 or B, Tk, S] for packed documents, else [B, 1, S]: where each sink stands among the keys
                first = torch.arange(keys, device=device) - place if document is not None else -place[:, :1]
                where = (first.unsqueeze(-1) + sink_index).clamp(0, keys - 1).expand(batch, -1, -1)
                flat = where.flatten(1)[..., None, None]
                sink_k = k.gather(1, flat.expand(-1, -1, *k.shape[2:])).unflatten(1, where.shape[1:])
                sink_v = v.gather(1, flat.expand(-1, -1, *v.shape[2:])).unflatten(1, where.shape[1:])
            else:
                sink_k, sink_v = sink_k.to(dtype).unsqueeze(1), sink_v.to(dtype).unsqueeze(1)
            if sink_k.shape[1] == 1:
                sink_scores = torch.einsum("bnigrd,bsgd->bngris", query_blocks, sink_k[:, 0])
            else:
                per_query = F.pad(sink_k, (0, 0) * 3 + (0, right)).unflatten(1, (count, size))
                sink_scores = torch.einsum("bnigrd,bnisgd->bngris", query_blocks, per_query)
            distance = query_place.unsqueeze(-1) - sink_index
            sink_scores = bend_logits(sink_scores, cap, leaning, distance[:, :, None, None])
            beyond = distance >= window  # nearer ones are in the window already
            sink_scores = sink_scores.masked_fill(~beyond[:, :, None, None], float("-inf"))
            scores = torch.cat([scores, sink_scores], dim=-1)

        # A row without any key (a pad) would make the gradient of the log-sum-exp NaN, though nothing reads it.
        empty = (query_place < 0)[:, :, None, None, :, None]
        lse = scores.masked_fill(empty, 0).logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        spread_weights = weights[..., : key_blocks.shape[2]]
        out = torch.einsum("bngrij,bnjgv->bnigrv", spread_weights, value_blocks)
        if sinks and sink_v is not None:
            sink_weights = weights[..., key_blocks.shape[2] :]
            if sink_v.shape[1] == 1:
                out = out + torch.einsum("bngris,bsgv->bnigrv", sink_weights, sink_v[:, 0])
            else:
                per_query = F.pad(sink_v, (0, 0) * 3 + (0, right)).unflatten(1, (count, size))
                out = out + torch.einsum("bngris,bnisgv->bnigrv", sink_weights, per_query)
        out = out.flatten(3, 4).flatten(1, 2)[:, :queries]
        lse = lse.masked_fill(empty.squeeze(-1), float("-inf"))
        lse = lse.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)[:, :queries]
        return out, lse
