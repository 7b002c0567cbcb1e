"""Keys and values that a window and the first tokens of a document leave visible, carried from call to call.

The newest W tokens lie in a ring (cache.py), the first S in tensors of their own, so that what is carried is constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bend import Bend, add_null
from .cache import MixerCacheLayer, roll, unroll
from .dispatch import window_attention
from .layout import Layout
from .reference import document_positions


class Piece(NamedTuple):
    """Where the T new tokens of a call stand in their documents.

    `place` [1 or B, T], below 0 at pads; `start` [B], the first one's, None where documents are packed; `length` [B],
    the tokens that a cache holds of each row, None where it holds none.
    """

    place: Tensor
    start: Tensor | None
    length: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, bend: Bend, **options: Any) -> tuple[Tensor, Tensor]:
    """`window_attention` with bent logits; a null logit is added to what any kernel gives."""
    out, lse = window_attention(q, k, v, cap=bend.cap, slopes=bend.slopes, **options)
    return (out, lse) if bend.null is None else add_null(out, lse, bend.null)


def locate(layout: Layout, cache: MixerCacheLayer | None, name: str, like: Tensor) -> Piece:
    """The piece that `like` [B, T, ...] is; the cache's tensor `name` counts the real tokens so far, these from now on
    among them."""
    batch, tokens = like.shape[:2]
    if layout.cu_seqlens is not None:
        return Piece(document_positions(layout.cu_seqlens, tokens)[1].unsqueeze(0), None, None)
    length = None if cache is None else cache.get(name)
    length = None if length is None else length.to(like.device, copy=True)  # the cache's own is written below
    start = torch.zeros(batch, dtype=torch.long, device=like.device) if length is None else length
    pads = layout.pads()
    if pads is not None:
        start = start - pads
    if cache is not None:
        cache.put(name, (start + tokens).clamp(min=0))
    return Piece(start.unsqueeze(1) + torch.arange(tokens, device=like.device), start, length)


def carry_window(cache: MixerCacheLayer | None, name: str, new: Tensor, piece: Piece, window: int) -> Tensor:
    """`new` [B, T, ...] after the W tokens that came before it, or alone where none did; the ring `name` goes on."""
    if cache is None or piece.start is None:
        return new
    ring = cache.get(name)
    whole = new if ring is None or piece.length is None else torch.cat([unroll(ring.to(new), piece.length), new], dim=1)
    cache.put(name, roll(ring, new, piece.start, window))
    return whole


def carry_sinks(cache: MixerCacheLayer | None, name: str, new: Tensor, piece: Piece, sinks: int) -> Tensor | None:
    """The first keys of each document [B, S, G, D], filled in as they come; None where `new` has them itself."""
    if not sinks or cache is None or piece.start is None:
        return None
    old = cache.get(name)
    index = torch.arange(sinks, device=new.device) - piece.start.unsqueeze(1)  # where sink s stands in `new`
    found = (index >= 0) & (index < new.shape[1])
    picked = new.gather(1, index.clamp(0, new.shape[1] - 1)[..., None, None].expand(-1, -1, *new.shape[2:]))
    keep = torch.zeros_like(picked) if old is None else old.to(new)
    return cache.put(name, torch.where(found[..., None, None], picked, keep))
