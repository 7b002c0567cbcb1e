"""Which chunks packed documents have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_chunks(bounds: Tensor, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers the chunks of `size` tokens of all documents `bounds` [N + 1], of `tokens` tokens together.

    Returns:
        The first chunk of each document and their number, [N + 1]; the document of each chunk and the chunk's place in
        it, [tokens // size + N]: the most chunks there could be, as values would stall the device. Chunks past the last
        are of the last document, at places that it does not have.
    """
    documents = bounds.numel() - 1
    first = F.pad(((bounds.diff() + size - 1) // size).cumsum(0), (1, 0))
    chunk = torch.arange(tokens // size + documents, device=bounds.device)
    document = torch.searchsorted(first[1:], chunk, right=True).clamp(max=documents - 1)
    return first, document, chunk - first[document]
