"""Where documents and pads lie in a batch, read from what transformers passes to an attention module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def refuse(condition: Tensor, message: str) -> None:
    """Raises where `condition` (of one element) holds: a ValueError, or in compiled code an assertion on the device,
    because a compiled forward cannot wait for a value."""
    if torch.compiler.is_compiling():
        torch._assert_async(~condition, message)
    elif bool(condition):
        raise ValueError(message)


def _real_tokens(attention_mask: Tensor | None, tokens: int, past: Tensor | int | None) -> Tensor | None:
    """[B, T] True where a token is no pad, from the 2D mask or from the 4D one that sdpa and eager layers get.

    `past` is the tokens before these in a static cache, whose 4D masks have a column for each token it has room for;
    one with a sliding window that is full has these tokens last.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -tokens:].bool()
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(attention_mask.shape)}")
    if past is None:
        mask = attention_mask[:, 0, :, -tokens:]
    elif tokens == 1:
        return None  # `generate` alone decodes with such masks, and what it adds is never a pad
    else:
        room = attention_mask.shape[-1] - tokens
        before = torch.as_tensor(past, device=attention_mask.device).clamp(max=room)
        mask = attention_mask[:, 0].index_select(2, torch.arange(tokens, device=attention_mask.device) + before)
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible.any(1)  # a pad is seen by no query


# The layers of one forward share one mask and one position tensor, and reading them costs a device sync: the last
# answer is kept. `_version` tells a tensor that was written to in place since; inference tensors have none.
_last: tuple[tuple, Layout] | None = None


def forget_layout() -> None:
    """Lets go of the last forward's mask."""
    global _last
    _last = None


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, every row is one document without pads, and nothing is read."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


_whole = False


def read_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    tokens: int,
    past: Tensor | int | None = None,
) -> Layout:
    """Layout of the B x T new tokens of a forward; `past` as in `_real_tokens`.

    Pads are on the left (or, without a cache, on the right). Without pads, `position_ids` that do not rise by one
    start a new document. Compiled code cannot look at them: there `cu_seq_lens_q` tells documents, and positions that
    restart are refused.

    Raises:
        ValueError: pads and packed documents in one batch, or a mask that is neither 2D nor 4D.
    """
    global _last
    if tokens == 1 and attention_mask is None:
        return Layout()
    if torch.compiler.is_compiling():
        return _trace(attention_mask, position_ids, tokens, past)
    if _whole:
        return Layout()
    tensors = [tensor for tensor in (attention_mask, position_ids) if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return _read(attention_mask, position_ids, batch, tokens, past)
    key = (attention_mask, position_ids, batch, tokens, past, *(tensor._version for tensor in tensors))
    last = _last
    if last is not None and len(last[0]) == len(key) and all(map(_same, last[0], key)):
        return last[1]
    layout = _read(attention_mask, position_ids, batch, tokens, past)
    _last = (key, layout)
    return layout


def _same(a: Tensor | int | None, b: Tensor | int | None) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _starts(position_ids: Tensor | None) -> Tensor | None:
    """[1 or B, T - 1] True where the next token starts a document."""
    if position_ids is None or position_ids.dim() != 2:
        return None
    return position_ids[:, 1:] != position_ids[:, :-1] + 1


def restarts(position_ids: Tensor | None) -> bool:
    """Whether positions show packed documents; compiled code cannot look."""
    starts = None if torch.compiler.is_compiling() else _starts(position_ids)
    return starts is not None and bool(starts.any())


def _trace(
    attention_mask: Tensor | None, position_ids: Tensor | None, tokens: int, past: Tensor | int | None
) -> Layout:
    """The layout in compiled code: a mask's pads, and no packed documents."""
    real = _real_tokens(attention_mask, tokens, past)
    starts = _starts(position_ids)
    if tokens > 1 and starts is not None:
        if real is not None:
            starts = starts & real[:, 1:] & real[:, :-1]
        refuse(starts.any(), "position_ids restart: a compiled forward is told packed documents by cu_seq_lens_q")
    return Layout(real=real)


def _read(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    tokens: int,
    past: Tensor | int | None,
) -> Layout:
    real = _real_tokens(attention_mask, tokens, past)
    if tokens == 1:
        return Layout(real=real)
    if real is not None and real.shape[0] != batch:
        real = real.expand(batch, -1)
    padded = real is not None and not bool(real.all())
    starts = _starts(position_ids)
    if padded:
        assert real is not None
        if starts is not None and bool((starts & real[:, 1:] & real[:, :-1]).any()):
            raise ValueError("pads and packed documents in one batch: pack without pads, or give each document a row")
        return Layout(real=real)
    if starts is None or not bool(starts.any()):
        return Layout()
    first = torch.ones(batch, 1, dtype=torch.bool, device=starts.device)
    flat = torch.cat([first, starts.expand(batch, -1)], dim=1).flatten().nonzero().flatten()
    return Layout(cu_seqlens=torch.cat([flat, flat.new_tensor([batch * tokens])]))
