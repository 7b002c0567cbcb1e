"""From what a person calls a data set to batches of equal sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..errors import UserError
from .options import TrainOptions

Item = dict[str, Tensor]


def packed(
    dataset: str | Dataset[Item],
    tokenizer: Any,
    options: TrainOptions,
    *,
    isolate: bool,
    text_field: str,
) -> Dataset[Item]:
    """A map-style data set of `{"input_ids", "labels"(, "position_ids")}`, [L] each, from a spec's text.

    With `skip_tokens` it begins that many tokens later, in the same order: what a stage before has had is not repeated
    while there is other text. Raises UserError where nothing is left.
    """
    if not isinstance(dataset, str):
        return _after(dataset, options)
    from ..data import pack

    if tokenizer is None:
        raise UserError(f"packing {dataset} needs a tokenizer: pass tokenizer=, or a data set that is packed already")
    skipped = -(-options.skip_tokens // options.max_length) * options.max_length
    whole = pack(
        dataset,
        tokenizer,
        length=options.max_length,
        tokens=None if options.tokens is None else options.tokens + skipped,
        seed=options.seed,
        isolate=isolate,
        text_field=text_field,
    )
    return _after(whole, options)


def _after(dataset: Dataset[Item], options: TrainOptions) -> Dataset[Item]:
    if not options.skip_tokens:
        return dataset
    count = length_of(dataset)
    first = -(-options.skip_tokens // dataset[0]["input_ids"].numel())
    if first >= count:
        raise UserError(f"--skip-tokens {options.skip_tokens} leaves nothing of the data set: give more text")
    return Subset(dataset, range(first, count))


class Repeated(Dataset[Item]):
    """`dataset` with a share of its sequences, drawn from the seed, made of one passage twice.

    The second half of such a sequence is its first half again, as part of one document: what follows can be told from
    what was read. A token that is left over at an odd length stays.
    """

    def __init__(self, dataset: Dataset[Item], share: float, seed: int) -> None:
        self.dataset = dataset
        count = length_of(dataset)
        # A stream of its own: drawn as the sampler draws its order, they would be the first sequences of the run.
        self.chosen = set(random.Random(f"repeats {seed}").sample(range(count), round(share * count)))

    def __len__(self) -> int:
        return length_of(self.dataset)

    def __getitem__(self, index: int) -> Item:
        item = self.dataset[index]
        if index not in self.chosen:
            return item
        item = {name: value.clone() for name, value in item.items()}
        half = item["input_ids"].numel() // 2
        for name in ("input_ids", "labels"):
            item[name][half : 2 * half] = item[name][:half]
        if "position_ids" in item:
            item["position_ids"] = torch.arange(item["input_ids"].numel())
        return item


def with_repeats(dataset: Dataset[Item], options: TrainOptions) -> Dataset[Item]:
    """`dataset` as `options.repeats` has it."""
    return Repeated(dataset, options.repeats, options.seed) if options.repeats else dataset


def length_of(dataset: Dataset[Item]) -> int:
    """Number of sequences. Raises UserError for none."""
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise UserError("the data set is empty: there is not one sequence to train on")
    return count


def split(dataset: Dataset[Item], share: float) -> tuple[Dataset[Item], Dataset[Item]]:
    """The first `share` of the sequences, and the rest; both at least one."""
    count = length_of(dataset)
    if count < 2:
        raise UserError("the data set holds one sequence: two stages need at least two; give more text")
    first = min(max(round(count * share), 1), count - 1)
    return Subset(dataset, range(first)), Subset(dataset, range(first, count))


def steps_for(dataset: Dataset[Item], options: TrainOptions) -> int:
    """Optimizer steps that use `options.tokens`, or the data set once. UserError for less than a batch."""
    count = length_of(dataset)
    length = dataset[0]["input_ids"].numel()
    if count < options.batch_size:
        raise UserError(
            f"the data set holds {count} sequences of {length} tokens, fewer than one batch of "
            f"{options.batch_size}: lower --batch-size or --max-length, raise --tokens, or give more text"
        )
    if options.tokens is None:
        return max(count // options.batch_size // options.gradient_accumulation, 1)
    return max(options.tokens // (options.batch_size * options.gradient_accumulation * length), 1)


class Stack:
    """Collates by stacking: sequences have one length. Refuses token ids that the model does not have."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, items: Sequence[Item]) -> Item:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        largest = int(batch["input_ids"].max())
        if largest >= self.vocab_size:
            raise UserError(
                f"the data has token {largest}, the model's vocabulary ends at {self.vocab_size - 1}: "
                "pack it with the student's own tokenizer"
            )
        return batch
