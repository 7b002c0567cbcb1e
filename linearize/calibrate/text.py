"""The rows of tokens that scores and calibration are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import TextSource, pack
from ..errors import UsageError, UserError

# Tokens of a passage that scores are measured on, shown twice, and how many: a minute on a GPU, minutes on a CPU.
PASSAGE = 256
PASSAGES = {"cpu": 4}
MOST_PASSAGES = 16
EMBEDDED = Path(__file__).parents[1] / "demo" / "text" / "train.jsonl.gz"


def passages_on(device: torch.device) -> int:
    """How many passages scores are measured on."""
    return PASSAGES.get(device.type, MOST_PASSAGES)


def sequences(
    data: str | Tensor | None, tokenizer: Any, *, count: int, length: int, seed: int = 0, text_field: str = "text"
) -> Tensor:
    """At most `count` rows of `length` ids from a DATASET, from rows [N, T] of ids, or from the embedded text.

    Raises:
        UsageError: text without a tokenizer. UserError: too little text for one row.
    """
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.is_floating_point():
            raise UsageError(f"--calibrate: rows of ids must be whole numbers [N, T], got {tuple(data.shape)}")
        rows = data[:, :length] if data.shape[1] >= length else data
        return rows[:count].long()
    if tokenizer is None:
        raise UsageError("--calibrate: pass the tokenizer of the model, or rows of token ids")
    source = TextSource(str(EMBEDDED), (EMBEDDED,)) if data is None else data
    packed = pack(source, tokenizer, length=length, tokens=count * length, seed=seed, text_field=text_field)
    if not len(packed):
        raise UserError(f"--calibrate: there is less text than one row of {length} tokens")
    return torch.stack([packed[i]["input_ids"] for i in range(min(count, len(packed)))])
