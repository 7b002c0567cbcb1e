"""Next-token losses and the divergence between two models, without the logits of a whole batch over the
vocabulary.

Shapes: B sequences, T tokens in each, D channels, V entries in the vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Elements of one C x V block of fp32 logits: 64 MiB, of which some copies live at the same time.
_BLOCK = 1 << 24
_PROBE = 8  # tokens on which the head path is compared with the model's own logits


@dataclass(frozen=True)
class Scorer:
    """A causal language model as hidden states and the head that turns some of them into logits.

    `hidden(ids[B, T]) -> [B, T, X]` and `head([C, X]) -> logits [C, V]`; X is D, or V for a model whose
    logits are more than its output embeddings applied to the last hidden state.
    """

    hidden: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    device: torch.device
    whole_logits: bool

    def run(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, X] of ids [B, T], which may lie on another device."""
        return self.hidden(ids.to(self.device))

    @classmethod
    def of(cls, model: Any) -> Scorer:
        """Takes the short way (base model, then output embeddings) where it gives the model's own logits."""
        device = next(model.parameters()).device
        vocab_size = model.config.vocab_size

        def logits(ids: Tensor) -> Tensor:
            return model(input_ids=ids, use_cache=False).logits

        def states(ids: Tensor) -> Tensor:
            return decoder(input_ids=ids, use_cache=False).last_hidden_state

        decoder, head = _parts(model)
        probe = torch.arange(_PROBE, device=device).remainder(vocab_size).unsqueeze(0)
        if decoder is not None and head is not None and _same(lambda: head(states(probe)), logits(probe)):
            return cls(states, head, vocab_size, device, whole_logits=False)
        return cls(logits, lambda chunk: chunk, vocab_size, device, whole_logits=True)


def _parts(model: Any) -> tuple[Any, nn.Module | None]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return (None if decoder is model else decoder), head


def _same(short: Callable[[], Tensor], logits: Tensor) -> bool:
    try:
        found = short()
    except (AttributeError, TypeError, RuntimeError):  # a base model of another shape than ours
        return False
    return found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-3)


@dataclass
class Sums:
    """Losses and divergences added up, in nats; `places` has the losses by their target's position, fp64 [T]."""

    nll: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    targets: int = 0
    positions: int = 0

    def mean_nll(self, name: str) -> float:
        return self.nll[name] / self.targets


def add_batch(
    sums: Sums,
    ids: Tensor,
    scored: dict[str, tuple[Scorer, Tensor]],
    *,
    teacher: str | None = None,
    first: int = 1,
    last: int | None = None,
) -> None:
    """Adds one batch: for each model its loss on the targets, and its KL from `teacher` at every position.

    Args:
        ids: the batch's tokens, [B, T].
        scored: by name, a scorer and its hidden states of `ids`, [B, T, X].
        teacher: the name whose distribution the others' divergence is taken from: KL(teacher || other).
        first, last: the targets are ids[:, first:last].
    """
    length = ids.shape[1]
    last = length if last is None else last
    sums.rows += ids.shape[0]
    sums.targets += ids.shape[0] * (last - first)
    sums.positions += ids.numel() if teacher is not None else 0
    # Position t predicts token t + 1; without a teacher nothing is asked of the others.
    begin, end = (0, length) if teacher is not None else (first - 1, last - 1)
    size = max(_BLOCK // max(scorer.vocab_size for scorer, _ in scored.values()), 1)
    ids_on = {scorer.device: ids.to(scorer.device) for scorer, _ in scored.values()}
    losses: dict[str, list[Tensor]] = {name: [] for name in scored}
    divergences: dict[str, list[Tensor]] = {name: [] for name in scored}
    for row in range(ids.shape[0]):
        for start, stop in _chunks(begin, end, size):
            target_start, target_stop = max(start, first - 1), min(stop, last - 1)
            logs = {}
            for name in sorted(scored, key=lambda name: name != teacher):
                scorer, hidden = scored[name]
                log = torch.log_softmax(scorer.head(hidden[row, start:stop]).float(), dim=-1)  # [C, V]
                if target_start < target_stop:
                    targets = ids_on[scorer.device][row, target_start + 1 : target_stop + 1].to(log.device)
                    picked = log[target_start - start : target_stop - start].gather(1, targets[:, None])
                    losses[name].append(-picked[:, 0])
                if name == teacher:
                    logs[name] = log
                elif teacher is not None:
                    source = logs[teacher].to(log.device)
                    divergences[name].append((source.exp() * (source - log)).sum(-1))
    # One wait for the device a batch: a value asked for in each chunk would be hundreds.
    for name in scored:
        if losses[name]:
            by_row = torch.cat(losses[name]).double().view(ids.shape[0], -1).cpu()  # [B, last - first]
            sums.nll[name] = sums.nll.get(name, 0.0) + float(by_row.sum())
            places = sums.places.setdefault(name, torch.zeros(length, dtype=torch.float64))
            places[first:last] += by_row.sum(0)
        if divergences[name]:
            sums.kl[name] = sums.kl.get(name, 0.0) + float(torch.cat(divergences[name]).double().sum())


def _chunks(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, size):
        yield start, min(start + size, end)
