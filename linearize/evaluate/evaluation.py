"""`evaluate`: a student beside its teacher, on text that neither was trained on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import TextSource, read_tokens
from ..errors import UsageError, UserError
from .scoring import Scorer, Sums, add_batch

STUDENT, TEACHER, OFF = "student", "teacher", "linear_off"
HELD_OUT = Path(__file__).parents[1] / "demo" / "text" / "heldout.jsonl.gz"

Dataset = str | Sequence[Any] | Mapping[str, Any] | None


@torch.no_grad()
def evaluate(
    student: Any,
    teacher: Any = None,
    *,
    tokenizer: Any,
    dataset: Dataset = None,
    text_field: str = "text",
    context: int = 1024,
    sequences: int = 32,
    batch_size: int = 8,
    recall_passages: int = 64,
    recall_length: int = 256,
    branches: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity, divergence from the teacher, and recall, as plain data for `--json`.

    Perplexity: the first `sequences` x `context` tokens of each data set, documents joined by the end token,
    all tokens of a sequence but its first being predicted. KL: KL(teacher || student), nats a token, over all
    of these positions. Recall: the first `recall_passages` passages of `recall_length` tokens of the first
    data set, each fed twice back to back; the mean loss, nats a token, on the second copy. With several data
    sets (or files) perplexities and ratios are geometric means, KL is the mean over tokens. `linear_off` is
    the same for the student with its window and sinks alone, None where it has no window.

    The models keep their dtypes; log-softmax is fp32, sums are fp64.

    Args:
        dataset: a DATASET, several, or a mapping from names to DATASETs or rows; by default the demo's
            held-out text.
        branches: whether to evaluate with the linear branch off, too.
        device: the models are moved there; by default they stay, each where it is.

    Raises:
        UserError: vocabularies that differ, too little text for one sequence, losses that are not finite, and
            what `data.load_rows` raises.
        UsageError: a number out of range.
    """
    _check(student, teacher, context, sequences, batch_size, recall_passages, recall_length)
    started = time.monotonic()
    wanted = max(sequences * context, recall_passages * recall_length)
    texts = [
        (name, read_tokens(data, tokenizer, tokens=wanted, text_field=text_field)) for name, data in _datasets(dataset)
    ]
    rows = [_rows(name, ids, context, sequences, student.config.vocab_size) for name, ids in texts]
    passages = _passages(texts[0][1], recall_passages, recall_length)
    with _evaluating(student, teacher):
        for model in (student, teacher):
            if model is not None and device is not None:
                model.to(device)
        models = _Models.of(student, teacher, branches)
        batch_size = 1 if models.whole_logits else batch_size
        batches = [part.split(batch_size) for part in rows]
        repeated = passages.repeat(1, 2).split(batch_size) if len(passages) else ()
        with tqdm(total=sum(map(len, batches)) + len(repeated), desc="evaluating", disable=not progress) as bar:
            sums = [_perplexity(models, part, bar) for part in batches]
            copies = _recall(models, repeated, recall_length, bar)
    facts = [
        {"name": name, "tokens": part.numel(), "sequences": len(part)}
        for (name, _), part in zip(texts, rows, strict=True)
    ]
    return {
        **_report(models, STUDENT, sums, copies),
        "linear_off": _report(models, OFF, sums, copies) if models.off is not None else None,
        "tokens": sum(fact["tokens"] for fact in facts),
        "context": context,
        "sequences": sum(fact["sequences"] for fact in facts),
        "recall_passages": len(passages),
        "recall_length": recall_length,
        "datasets": [
            {**fact, **_figures(models, STUDENT, [part])}
            | {"linear_off": _figures(models, OFF, [part]) if models.off is not None else None}
            for fact, part in zip(facts, sums, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclass(frozen=True)
class _Models:
    scorers: dict[str, Scorer]
    off: Callable[[], AbstractContextManager[None]] | None

    @classmethod
    def of(cls, student: Any, teacher: Any, branches: bool) -> _Models:
        scorers = {STUDENT: Scorer.of(student)}
        if teacher is not None:
            scorers[TEACHER] = Scorer.of(teacher)
        return cls(scorers, _linear_off(student) if branches else None)

    @property
    def teacher(self) -> str | None:
        return TEACHER if TEACHER in self.scorers else None

    @property
    def whole_logits(self) -> bool:
        return any(scorer.whole_logits for scorer in self.scorers.values())

    def states(self, ids: Tensor) -> dict[str, tuple[Scorer, Tensor]]:
        """Each model run once on ids [B, T], the student with its linear branch off too: hidden states [B, T,
        X]."""
        found = {name: (scorer, scorer.run(ids)) for name, scorer in self.scorers.items()}
        if self.off is not None:
            with self.off():
                found[OFF] = (self.scorers[STUDENT], self.scorers[STUDENT].run(ids))
        return found


def _linear_off(student: Any) -> Callable[[], AbstractContextManager[None]] | None:
    """Turns the linear branch off; None for a model that has none, or of which nothing would be left."""
    if not getattr(student, "mixer_layers", list)():
        return None
    from ..modeling.mixer import branch_off

    try:
        with branch_off(student, "linear"):
            pass
    except ValueError:  # a mixer without a window
        return None
    return lambda: branch_off(student, "linear")


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Models in eval mode inside, and as they were after."""
    modes = [(model, model.training) for model in models if model is not None]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, mode in modes:
            model.train(mode)


def _check(student: Any, teacher: Any, context: int, sequences: int, batch_size: int, *recall: int) -> None:
    for flag, value, least in (
        ("--context", context, 2),
        ("--sequences", sequences, 1),
        ("--batch-size", batch_size, 1),
        ("--recall-passages", recall[0], 0),
        ("--recall-length", recall[1], 2),
    ):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")
    if teacher is not None and student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"the vocabularies differ: the student's has {student.config.vocab_size} tokens, the teacher's "
            f"{teacher.config.vocab_size}; give the --teacher that the student was converted from"
        )


def _datasets(dataset: Dataset) -> list[tuple[str, Any]]:
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
        return [pair for entry in dataset for pair in _datasets(entry)]
    return [("rows", dataset)]


def _rows(name: str, ids: Tensor, context: int, sequences: int, vocab_size: int) -> Tensor:
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


def _passages(ids: Tensor, passages: int, length: int) -> Tensor:
    count = min(len(ids) // length, passages)
    return ids[: count * length].reshape(count, length)


def _perplexity(models: _Models, batches: Sequence[Tensor], bar: Any) -> Sums:
    sums = Sums()
    for ids in batches:
        add_batch(sums, ids, models.states(ids), teacher=models.teacher)
        bar.update()
    return sums


def _recall(models: _Models, batches: Sequence[Tensor], length: int, bar: Any) -> tuple[Sums, Sums] | None:
    """Losses on the first copies, and on all tokens of the second."""
    first, second = Sums(), Sums()
    for ids in batches:
        states = models.states(ids)
        add_batch(first, ids, states, first=1, last=length)
        add_batch(second, ids, states, first=length, last=2 * length)
        bar.update()
    return (first, second) if batches else None


def _report(models: _Models, name: str, sums: Sequence[Sums], copies: tuple[Sums, Sums] | None) -> dict[str, Any]:
    """Perplexity, KL and recall of the student, its linear branch on or off, beside the teacher's."""
    recall = [
        {
            role: copy.mean_nll(key) if copy is not None and key is not None else None
            for role, key in ((STUDENT, name), (TEACHER, models.teacher))
        }
        for copy in (copies or (None, None))
    ]
    return {**_figures(models, name, sums), "recall": {**recall[1], "first_copy": recall[0]}}


def _figures(models: _Models, name: str, sums: Sequence[Sums]) -> dict[str, Any]:
    """Perplexities (their geometric means over data sets) and KL (the mean over tokens)."""
    logs = {key: _mean_log(sums, key) for key in (name, models.teacher) if key is not None}
    for key, log in logs.items():
        if not math.isfinite(log):
            raise UserError(
                f"the loss of the {'teacher' if key == TEACHER else 'student'} is {log}: its weights are "
                "broken, "
                "or its dtype overflows; try --dtype float32"
            )
    teacher = logs.get(TEACHER)
    return {
        "perplexity": {
            "student": math.exp(logs[name]),
            "teacher": None if teacher is None else math.exp(teacher),
            "ratio": None if teacher is None else math.exp(logs[name] - teacher),
        },
        "kl": None if teacher is None else sum(part.kl[name] for part in sums) / sum(p.positions for p in sums),
    }


def _mean_log(sums: Sequence[Sums], name: str) -> float:
    return sum(part.mean_nll(name) for part in sums) / len(sums)
