"""Where documents and pads lie in a batch, read from what transformers passes to an attention module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the T tokens of each of the B rows belong together.

    `real` [B, T] is False at pads, None where there is none. `cu_seqlens` [N + 1] bounds the documents of the batch
    flattened to one row of B * T tokens, None where each row is one document. At most one of the two is set.
    """

    real: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def pads(self) -> Tensor | None:
        """Pads on the left of each row, [B]."""
        return None if self.real is None else (self.real.long().cumsum(1) == 0).sum(1)


def _real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """[B, T] True where a token is no pad, from the 2D mask or from the 4D one that sdpa and eager layers get."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -tokens:].bool()
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, 0, :, -tokens:]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible.any(1)  # a pad is seen by no query


# The layers of one forward share one mask and one position tensor, and reading them costs a device sync: the last
# answer is kept. `_version` tells a tensor that was written to in place since.
_last: tuple[tuple, Layout] | None = None


def read_layout(attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int) -> Layout:
    """Layout of the B x T new tokens of a forward.

    Pads are on the left (or, without a cache, on the right). Without pads, `position_ids` that do not rise by one
    start a new document.
    """
    global _last
    key = (
        attention_mask,
        getattr(attention_mask, "_version", None) if attention_mask is None or not attention_mask.is_inference() else 0,
        position_ids,
        position_ids._version if position_ids is not None and not position_ids.is_inference() else 0,
        batch,
        tokens,
    )
    if _last is not None and all(a is b or (isinstance(a, int) and a == b) for a, b in zip(_last[0], key, strict=True)):
        return _last[1]
    layout = _read(attention_mask, position_ids, batch, tokens)
    _last = (key, layout)
    return layout


def _read(attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int) -> Layout:
    real = _real_tokens(attention_mask, tokens)
    if tokens == 1:
        return Layout(real=real)
    if real is not None:
        if real.shape[0] != batch:
            real = real.expand(batch, -1)
        if not bool(real.all()):
            return Layout(real=real)
    if position_ids is None or position_ids.dim() != 2:
        return Layout()
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return Layout()
    first = torch.ones(batch, 1, dtype=torch.bool, device=starts.device)
    flat = torch.cat([first, starts.expand(batch, -1)], dim=1).flatten().nonzero().flatten()
    return Layout(cu_seqlens=torch.cat([flat, flat.new_tensor([batch * tokens])]))
