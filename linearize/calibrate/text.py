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
    data: str | Tensor | None,
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int = 0,
    text_field: str = "text",
    vocab_size: int | None = None,
) -> Tensor:
    """At most `count` rows of `length` ids from a DATASET, from rows [N, T] of ids, or from the embedded text.

    Raises:
        UsageError: text without a tokenizer, ids that are none of `vocab_size`. UserError: too little text for one row,
            the tokenizer of another model.
    """
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.is_floating_point():
            raise UsageError(f"--calibrate: rows of ids must be whole numbers [N, T], got {tuple(data.shape)}")
        rows = data[:, :length] if data.shape[1] >= length else data
        if strange := _strange(rows[:count], vocab_size):
            raise UsageError(f"--calibrate: rows of ids hold {strange}; give rows of the model's own tokens")
        return rows[:count].long()
    if tokenizer is None:
        raise UsageError("--calibrate: pass the tokenizer of the model, or rows of token ids")
    source = TextSource(str(EMBEDDED), (EMBEDDED,)) if data is None else data
    packed = pack(source, tokenizer, length=length, tokens=count * length, seed=seed, text_field=text_field)
    if not len(packed):
        raise UserError(f"--calibrate: there is less text than one row of {length} tokens")
    rows = torch.stack([packed[i]["input_ids"] for i in range(min(count, len(packed)))])
    if strange := _strange(rows, vocab_size):
        raise UserError(f"--calibrate: the tokenizer gives {strange}: it belongs to another model")
    return rows


def _strange(rows: Tensor, vocab_size: int | None) -> str | None:
    """An id of rows [N, T] that the vocabulary has not, and where that ends, for messages."""
    if vocab_size is None or not rows.numel():
        return None
    least, most = int(rows.min()), int(rows.max())
    if least >= 0 and most < vocab_size:
        return None
    return f"token {least if least < 0 else most}, and the model's vocabulary is 0 to {vocab_size - 1}"
