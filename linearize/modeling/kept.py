"""Causal softmax of the heads that a swapped layer keeps, and their keys and values in its cache.

In a cache that grows they grow, up to the window of the kept heads where they have one. A static cache has room for all
of them, or for that window, in which a token takes the slot of the one that has left it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import MixerCacheLayer, append, roll
from .layout import Layout
from .reference import document_positions, widen

# Where a mask is needed, queries attend in blocks, so that it takes memory linear in length.
QUERY_BLOCK = 1024


def kept_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    layout: Layout,
    cache: MixerCacheLayer | None,
) -> Tensor:
    """Causal softmax attention of the kept heads.

    Args:
        q, k, v: [B, T, H, D], [B, T, G, D], [B, T, G, D].
        window: keys that a query sees, itself included: the teacher's sliding window or `--keep-window`; None for all.
        layout: pads and documents of the new tokens.
        cache: grows by "softmax_k" and "softmax_v", [B, G, keys, D], to at most window - 1 keys, and "softmax_pads",
            [B]; a static one has them whole, and the count "softmax_length", [B].

    Returns:
        [B, T, H, D].
    """
    if cache is not None and cache.is_static:
        return _static(q, k, v, scale, window, layout, cache)
    batch, tokens = q.shape[:2]
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    pads = layout.pads()
    if cache is not None:
        k = append(cache, "softmax_k", k, 2, window)
        v = append(cache, "softmax_v", v, 2, window)
        old_pads = cache.get("softmax_pads")
        if old_pads is not None:
            # Pads of a later piece count only for a row that has had nothing but pads.
            old_pads = old_pads.to(q.device)
            pads = old_pads if pads is None else torch.where(old_pads == cache.seen, old_pads + pads, old_pads)
        if pads is not None:
            cache.tensors["softmax_pads"] = pads
        elif cache.seen == 0:
            cache.tensors["softmax_pads"] = torch.zeros(batch, dtype=torch.long, device=q.device)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    keys = k.shape[2]
    offset = keys - tokens
    if cache is not None:
        cache.padded |= layout.real is not None
    unpadded = pads is None or (cache is not None and not cache.padded)
    whole_rows = unpadded and layout.cu_seqlens is None and (window is None or keys <= window)
    if whole_rows and (tokens == 1 or offset == 0):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=tokens > 1)
        return out.transpose(1, 2)
    column = torch.arange(keys, device=q.device)
    if cache is not None and pads is not None:
        pads = pads - (cache.seen + tokens - keys)  # keys that have left the cache take the oldest pads along
    document = None
    if layout.cu_seqlens is not None:
        document = document_positions(layout.cu_seqlens, batch * tokens)[0].view(batch, tokens)
    pieces = []
    for start in range(0, tokens, QUERY_BLOCK):
        row = torch.arange(start, min(start + QUERY_BLOCK, tokens), device=q.device)
        distance = (row + offset).unsqueeze(1) - column
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = visible[None, None].expand(batch, 1, -1, -1)
        if pads is not None:
            mask = mask & (column >= pads.unsqueeze(1))[:, None, None]
        if document is not None:
            mask = mask & (document[:, row].unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)
        # A pad's own row sees nothing; itself alone keeps it finite.
        mask = mask | ((distance == 0)[None, None] & ~mask.any(-1, keepdim=True))
        pieces.append(F.scaled_dot_product_attention(q[:, :, row], k, v, attn_mask=mask, scale=scale))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _static(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, layout: Layout, cache: MixerCacheLayer
) -> Tensor:
    """`kept_softmax` with a static cache, whose slot j holds the newest token at a column j modulo its size."""
    assert cache.max_cache_len is not None
    batch, tokens, _, dim = q.shape
    groups = k.shape[2]
    size = cache.max_cache_len if window is None else min(window, cache.max_cache_len)
    fresh = cache.get("softmax_k") is None
    if fresh:
        for name in ("softmax_k", "softmax_v"):
            cache.put(name, k.new_zeros(batch, groups, size, dim))
        for name in ("softmax_length", "softmax_pads"):
            cache.put(name, torch.zeros(batch, dtype=torch.long, device=q.device))
    keys, values = cache.tensors["softmax_k"], cache.tensors["softmax_v"]
    past, pads = cache.tensors["softmax_length"].clone(), cache.tensors["softmax_pads"]
    new_pads = layout.pads()
    if new_pads is not None:
        pads = cache.put("softmax_pads", torch.where(pads == past, pads + new_pads, pads))
    cache.put("softmax_length", past + tokens)

    slots = torch.arange(size, device=q.device)
    if tokens == 1:
        slot = past if window is None else past.remainder(size)  # a text that is too long must not start over
        index = slot.view(-1, 1, 1, 1).expand(-1, groups, 1, dim)
        keys.scatter_(2, index, k.transpose(1, 2).to(keys.dtype))
        values.scatter_(2, index, v.transpose(1, 2).to(values.dtype))
        behind = (past.unsqueeze(1) - slots).remainder(size)  # [B, size]
        visible = behind <= (past - pads).unsqueeze(1)
        if window is not None:
            visible = visible & (behind < window)
        visible = visible | (behind == 0)  # a pad sees itself, to stay finite
        scores = widen(torch.matmul(q[:, 0].unflatten(1, (groups, -1)), keys.mT)) * scale
        weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
        return torch.matmul(weights.to(values.dtype), values).flatten(1, 2).unsqueeze(1)

    if fresh:
        out = kept_softmax(q, k, v, scale=scale, window=window, layout=layout, cache=None)
    else:
        last = (past - 1).unsqueeze(1)
        column = torch.cat(
            [last - (last - slots).remainder(size), past.unsqueeze(1) + slots.new_ones(tokens).cumsum(0) - 1], 1
        )
        all_keys = torch.cat([keys.to(k), k.transpose(1, 2)], dim=2)
        all_values = torch.cat([values.to(v), v.transpose(1, 2)], dim=2)
        repeat = q.shape[2] // groups
        all_keys, all_values = (x.repeat_interleave(repeat, dim=1) for x in (all_keys, all_values))
        pieces = []
        for start in range(0, tokens, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, tokens)
            distance = column[:, size + start : size + end].unsqueeze(2) - column.unsqueeze(1)
            seen = (distance >= 0) & (column >= pads.unsqueeze(1)).unsqueeze(1)
            if window is not None:
                seen = seen & (distance < window)
            seen = (seen | (distance == 0)).unsqueeze(1)
            rows = q[:, start:end].transpose(1, 2)
            pieces.append(F.scaled_dot_product_attention(rows, all_keys, all_values, attn_mask=seen, scale=scale))
        out = torch.cat(pieces, dim=2).transpose(1, 2)
    for held, new in ((keys, k), (values, v)):
        held.copy_(roll(held.transpose(1, 2), new, past, size).transpose(1, 2))
    return out
