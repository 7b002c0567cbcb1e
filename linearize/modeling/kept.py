"""Causal softmax of the heads that a swapped layer keeps, and their keys and values in its cache.

Heads that see everything have a cache that grows, or in a static cache room for all that it was made for. Heads that
see a window, the teacher's own or `--keep-window`, carry that window and the sinks (window.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .bend import STRAIGHT, Bend, bend_logits, softmax_of
from .cache import MixerCacheLayer, append
from .layout import Layout
from .reference import document_positions, widen
from .window import attend, carry_sinks, carry_window, locate

# Where a mask is needed, queries attend in blocks, so that it takes memory linear in length.
QUERY_BLOCK = 1024


def kept_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    sinks: int,
    layout: Layout,
    cache: MixerCacheLayer | None,
    bend: Bend = STRAIGHT,
) -> Tensor:
    """Softmax attention of kept heads over the last `window` keys and the document's first `sinks`; else as
    `kept_softmax`.

    `cache` gets "softmax_window_k" and "softmax_window_v" [B, W, G, D], "softmax_sink_k" and "softmax_sink_v"
    [B, S, G, D], and "softmax_length" [B].
    """
    shape = q.shape
    if layout.cu_seqlens is not None:
        q, k, v = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (q, k, v))
    piece = locate(layout, cache, "softmax_length", q)
    out, _ = attend(
        q,
        carry_window(cache, "softmax_window_k", k, piece, window),
        carry_window(cache, "softmax_window_v", v, piece, window),
        bend,
        window=window,
        sinks=sinks,
        scale=scale,
        position=piece.start,
        sink_k=carry_sinks(cache, "softmax_sink_k", k, piece, sinks),
        sink_v=carry_sinks(cache, "softmax_sink_v", v, piece, sinks),
        cu_seqlens=layout.cu_seqlens,
    )
    return out.reshape(shape)


def kept_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    layout: Layout,
    cache: MixerCacheLayer | None,
    bend: Bend = STRAIGHT,
) -> Tensor:
    """Causal softmax attention of kept heads over all keys.

    Args:
        q, k, v: [B, T, H, D], [B, T, G, D], [B, T, G, D].
        layout: pads and documents of the new tokens.
        cache: grows by "softmax_k" and "softmax_v", [B, G, keys, D], and has "softmax_pads", [B]; a static one has
            them whole, and the count "softmax_length", [B].
        bend: of their logits.

    Returns:
        [B, T, H, D].
    """
    if cache is not None and cache.is_static:
        return _static(q, k, v, scale, layout, cache, bend)
    batch, tokens = q.shape[:2]
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    pads = layout.pads()
    if cache is not None:
        k = append(cache, "softmax_k", k, 2)
        v = append(cache, "softmax_v", v, 2)
        old_pads = cache.get("softmax_pads")
        if old_pads is not None:
            # Pads of a later piece count only for a row that has had nothing but pads.
            old_pads = old_pads.to(q.device)
            pads = old_pads if pads is None else torch.where(old_pads == cache.seen, old_pads + pads, old_pads)
        if pads is not None:
            cache.tensors["softmax_pads"] = pads
        elif cache.seen == 0:
            cache.tensors["softmax_pads"] = torch.zeros(batch, dtype=torch.long, device=q.device)
    if not bend.straight:
        return _bent(q, k, v, scale, layout, pads, bend)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    keys = k.shape[2]
    offset = keys - tokens
    if cache is not None:
        cache.padded |= layout.real is not None
    unpadded = pads is None or (cache is not None and not cache.padded)
    if unpadded and layout.cu_seqlens is None and (tokens == 1 or offset == 0):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=tokens > 1)
        return out.transpose(1, 2)
    column = torch.arange(keys, device=q.device)
    document = None
    if layout.cu_seqlens is not None:
        document = document_positions(layout.cu_seqlens, batch * tokens)[0].view(batch, tokens)
    pieces = []
    for start in range(0, tokens, QUERY_BLOCK):
        row = torch.arange(start, min(start + QUERY_BLOCK, tokens), device=q.device)
        distance = (row + offset).unsqueeze(1) - column
        mask = (distance >= 0)[None, None].expand(batch, 1, -1, -1)
        if pads is not None:
            mask = mask & (column >= pads.unsqueeze(1))[:, None, None]
        if document is not None:
            mask = mask & (document[:, row].unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)
        # A pad's own row sees nothing; itself alone keeps it finite.
        mask = mask | ((distance == 0)[None, None] & ~mask.any(-1, keepdim=True))
        pieces.append(F.scaled_dot_product_attention(q[:, :, row], k, v, attn_mask=mask, scale=scale))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _bent(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout, pads: Tensor | None, bend: Bend) -> Tensor:
    """`kept_softmax` of q [B, H, T, D] over k and v [B, G, keys, D]: a window as long as the text, because torch's own
    attention knows no such logits."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shape = q.shape
    if layout.cu_seqlens is not None:
        q, k, v = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (q, k, v))
    place = None if pads is None else k.shape[1] - q.shape[1] - pads
    out, _ = attend(q, k, v, bend, window=k.shape[1], scale=scale, position=place, cu_seqlens=layout.cu_seqlens)
    return out.reshape(shape).to(v.dtype)


def _static(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout, cache: MixerCacheLayer, bend: Bend
) -> Tensor:
    """`kept_softmax` with a static cache, whose slot j holds column j."""
    assert cache.max_cache_len is not None
    batch, tokens, heads, dim = q.shape
    groups = k.shape[2]
    if tokens > cache.max_cache_len:
        raise ValueError(f"the cache was made for {cache.max_cache_len} tokens, and {tokens} came: pass a longer one")
    fresh = cache.get("softmax_k") is None
    if fresh:
        for name in ("softmax_k", "softmax_v"):
            cache.put(name, k.new_zeros(batch, groups, cache.max_cache_len, dim))
        for name in ("softmax_length", "softmax_pads"):
            cache.put(name, torch.zeros(batch, dtype=torch.long, device=q.device))
    keys, values = cache.tensors["softmax_k"], cache.tensors["softmax_v"]
    past, pads = cache.tensors["softmax_length"].clone(), cache.tensors["softmax_pads"]
    new_pads = layout.pads()
    if new_pads is not None:
        pads = cache.put("softmax_pads", torch.where(pads == past, pads + new_pads, pads))
    cache.put("softmax_length", past + tokens)

    columns = past.unsqueeze(1) + torch.arange(tokens, device=q.device)  # of the new tokens, [B, T]
    index = columns[:, None, :, None].expand(-1, groups, -1, dim)
    keys.scatter_(2, index, k.transpose(1, 2).to(keys.dtype))
    values.scatter_(2, index, v.transpose(1, 2).to(values.dtype))
    if fresh and tokens > 1:
        return kept_softmax(q, k, v, scale=scale, layout=layout, cache=None, bend=bend)
    slots = torch.arange(cache.max_cache_len, device=q.device)
    hidden = slots < pads.unsqueeze(1)
    if tokens == 1 or not bend.straight:
        pieces = [
            _eager(row, keys, values, scale, some.unsqueeze(2) - slots, hidden.unsqueeze(1), bend)
            for some, row in zip(columns.split(QUERY_BLOCK, 1), q.split(QUERY_BLOCK, 1), strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    all_keys, all_values = (x.to(q).repeat_interleave(heads // groups, dim=1) for x in (keys, values))
    pieces = []
    for some, row in zip(columns.split(QUERY_BLOCK, 1), q.split(QUERY_BLOCK, 1), strict=True):
        distance = some.unsqueeze(2) - slots
        seen = ((distance >= 0) & ~hidden.unsqueeze(1) | (distance == 0)).unsqueeze(1)
        rows = row.transpose(1, 2)
        pieces.append(F.scaled_dot_product_attention(rows, all_keys, all_values, attn_mask=seen, scale=scale))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _eager(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, distance: Tensor, hidden: Tensor, bend: Bend
) -> Tensor:
    """q [B, T, H, D] over keys and values [B, G, S, D] at `distance` [B, T, S], those that are not `hidden`; a pad sees
    itself, to stay finite."""
    groups, tokens = keys.shape[1], q.shape[1]
    rows = q.transpose(1, 2).unflatten(1, (groups, -1))  # [B, G, R, T, D]
    scores = widen(torch.matmul(rows.flatten(2, 3), keys.to(q.dtype).mT)) * scale
    scores = scores.unflatten(2, (-1, tokens))
    slopes, null = (None if each is None else each.view(groups, -1, 1, 1) for each in bend[1:])
    scores = bend_logits(scores, bend.cap, slopes, distance[:, None, None])
    seen = (distance >= 0) & ~hidden | (distance == 0)
    weights = softmax_of(scores.masked_fill(~seen[:, None, None], float("-inf")), null)
    out = torch.matmul(weights.to(values.dtype).flatten(2, 3), values)
    return out.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2)
