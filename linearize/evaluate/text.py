"""The text of an evaluation: data sets to token rows and passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import TextSource
from ..errors import UsageError, UserError

HELD_OUT = Path(__file__).parents[1] / "demo" / "text" / "heldout.jsonl.gz"

Dataset = str | Sequence[Any] | Mapping[str, Any] | None


def datasets(dataset: Dataset) -> list[tuple[str, Any]]:
    """Names and what to read, one for each file."""
    if dataset is None:
        if not HELD_OUT.is_file():
            raise UsageError("--dataset is missing: name the text to evaluate on")
        return [("demo held-out text", TextSource(str(HELD_OUT), (HELD_OUT,)))]
    if isinstance(dataset, str):
        return [(source.spec, source) for source in TextSource.parse(dataset).each()]
    if isinstance(dataset, Mapping):
        return list(dataset.items())
    if all(isinstance(entry, str) for entry in dataset):
        return [pair for entry in dataset for pair in datasets(entry)]
    return [("rows", dataset)]


def sequences_of(name: str, ids: Tensor, context: int, sequences: int, vocab_size: int) -> Tensor:
    """The first sequences of `ids` [T] that there are, at most `sequences`: [N, context]."""
    count = min(len(ids) // context, sequences)
    if count == 0:
        raise UserError(
            f"--dataset: {name} holds {len(ids)} tokens, fewer than one sequence of --context {context}: "
            "lower --context, or give more text"
        )
    if int(ids.max()) >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {int(ids.max())}, the models' vocabulary ends at {vocab_size - 1}: "
            "it belongs to another model"
        )
    return ids[: count * context].reshape(count, context)


def passages_of(ids: Tensor, passages: int, length: int) -> Tensor:
    """The first passages of `ids` [T] that there are, at most `passages`: [N, length]."""
    count = min(len(ids) // length, passages)
    return ids[: count * length].reshape(count, length)
