"""`evaluate`: a student beside its teacher, on text that neither was trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import read_tokens
from ..errors import UsageError, UserError
from ..room import check_room, room_of
from .agreement import NEW_TOKENS, PROMPT_TOKENS, agreement, continuations, prompts_of
from .costs import costs
from .positions import by_position
from .report import Copies, figures, report
from .retrieval import parse_contexts, retrieval
from .scoring import Sums, add_batch
from .task_files import Task, read_tasks
from .tasks import run_tasks
from .text import Dataset, datasets, passages_of, sequences_of
from .variants import LINEAR_OFF, STUDENT, TEACHER, VARIANTS, Models


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
    branches: bool | Sequence[str] = (LINEAR_OFF,),
    retrieval_contexts: str | Sequence[int] = (),
    retrieval_items: int = 32,
    agreement_prompts: int = 0,
    tasks: str | Sequence[str | Task] = (),
    task_items: int = 300,
    device: str | torch.device | None = None,
    progress: bool = False,
    teacher_figures: dict[Any, Any] | None = None,
) -> dict[str, Any]:
    """How near a student is to its teacher, as plain data for `--json`.

    Perplexity: the first `sequences` x `context` tokens of each data set, documents joined by the end token,
    all tokens of a sequence but its first being predicted. KL: KL(teacher || student), nats a token, over all
    of these positions. `by_position`: the mean loss, nats a token, by how many tokens came before. Recall: the
    first `recall_passages` passages of `recall_length` tokens of the first data set, each fed twice back to
    back; the mean loss, nats a token, on the second copy. With several data sets (or files) perplexities and
    ratios are geometric means, the others means over tokens.

    `linear_off`, `window_off` and `window_alone` are the same for the student with one branch off and for the
    teacher under the student's window alone (see variants.py), None where there is no such thing.

    `retrieval`: the share of facts found again, by context length (see retrieval.py). `agreement`: greedy
    continuations beside the teacher's, None without one. `tasks`: by name (see tasks.py).

    `kv_bytes_per_token`, `kv_share` of the teacher's, and `state_bytes` are what a sequence costs.

    The models keep their dtypes; log-softmax is fp32, sums are fp64.

    Args:
        dataset: a DATASET, several, or a mapping from names to DATASETs or rows; by default the demo's
            held-out text.
        branches: the student's variants to evaluate, too, each at the price of one more pass; True for all three.
        retrieval_contexts: lengths in tokens; `retrieval_items` questions at each.
        agreement_prompts: passages whose first 64 tokens are continued by 32.
        tasks: files or names, see task_files.py; at most `task_items` of each.
        device: the models are moved there; by default they stay, each where it is.
        teacher_figures: given again with the same teacher and options, saves what it holds of the teacher.

    Raises:
        UserError: vocabularies that differ, too little text for one sequence, losses that are not finite, and
            what `data.load_rows` and `read_tasks` raise.
        UsageError: a number out of range, or more tokens than a model has learned positions for.
    """
    _check(context, sequences, batch_size, recall_passages, recall_length, retrieval_items, agreement_prompts)
    _check_vocabularies(student, teacher)
    prompts = 0 if teacher is None else agreement_prompts
    _check_room(room_of(student, teacher), context, recall_passages, recall_length, prompts)
    lengths = parse_contexts(retrieval_contexts)
    wanted_tasks = read_tasks(tasks, task_items)
    started = time.monotonic()
    wanted = max(sequences * context, recall_passages * recall_length)
    texts = [
        (name, read_tokens(data, tokenizer, tokens=wanted, text_field=text_field)) for name, data in datasets(dataset)
    ]
    rows = [sequences_of(name, ids, context, sequences, student.config.vocab_size) for name, ids in texts]
    passages = passages_of(texts[0][1], recall_passages, recall_length)
    pair = {STUDENT: student} | ({} if teacher is None else {TEACHER: teacher})
    held = {} if teacher_figures is None else teacher_figures

    def known(key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in held:
            held[key] = compute()
        return held[key]

    with _evaluating(student, teacher):
        if device is not None:
            for model in pair.values():
                model.to(device)
        models = Models.of(student, teacher, branches=branches)
        batch_size = 1 if models.whole_logits else batch_size
        sums, copies = _losses(models, rows, passages, batch_size, progress)
        found = retrieval(
            pair, models.scorers, tokenizer, texts[0][1], lengths, retrieval_items,
            tokens=batch_size * context, known=known, progress=progress,
        )  # fmt: skip
        agreed = _agreement(pair, prompts_of(texts[0][1], agreement_prompts), batch_size, known)
        scores = run_tasks(
            pair, models.scorers, tokenizer, wanted_tasks,
            items=task_items, batch_size=batch_size, known=known, progress=progress,
        )  # fmt: skip
    facts = [
        {"name": name, "tokens": part.numel(), "sequences": len(part)}
        for (name, _), part in zip(texts, rows, strict=True)
    ]
    present = models.variants
    return {
        **report(STUDENT, models.teacher, sums, copies),
        **{name: report(name, models.teacher, sums, copies) if name in present else None for name in VARIANTS},
        **costs(student).to_dict(),
        "by_position": by_position(sums, context, teacher=teacher is not None),
        "retrieval": found,
        "agreement": agreed,
        "tasks": scores,
        "tokens": sum(fact["tokens"] for fact in facts),
        "context": context,
        "sequences": sum(fact["sequences"] for fact in facts),
        "recall_passages": len(passages),
        "recall_length": recall_length,
        "datasets": [
            {**fact, **figures(STUDENT, models.teacher, [part])}
            | {name: figures(name, models.teacher, [part]) if name in present else None for name in VARIANTS}
            for fact, part in zip(facts, sums, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }


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


def _check(context: int, sequences: int, batch_size: int, passages: int, length: int, items: int, prompts: int) -> None:
    for flag, value, least in (
        ("--context", context, 2),
        ("--sequences", sequences, 1),
        ("--batch-size", batch_size, 1),
        ("--recall-passages", passages, 0),
        ("--recall-length", length, 2),
        ("--retrieval-items", items, 1),
        ("--agreement-prompts", prompts, 0),
    ):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")


def _check_room(room: int | None, context: int, passages: int, length: int, prompts: int) -> None:
    """What the model cannot read is said, not shortened: figures on other lengths are other figures."""
    if room is None:
        return
    check_room(room, f"--context {context}", context, f"give at most {room}")
    if passages:
        check_room(room, f"--recall-length {length}, shown twice,", 2 * length, f"give at most {room // 2}")
    if prompts:  # the last of the new tokens is not read
        check_room(room, f"--agreement-prompts {prompts}", PROMPT_TOKENS + NEW_TOKENS - 1, "give 0")


def _check_vocabularies(student: Any, teacher: Any) -> None:
    if teacher is not None and student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"the vocabularies differ: the student's has {student.config.vocab_size} tokens, the teacher's "
            f"{teacher.config.vocab_size}; give the --teacher that the student was converted from"
        )


def _losses(
    models: Models, rows: Sequence[Tensor], passages: Tensor, batch_size: int, progress: bool
) -> tuple[list[Sums], Copies | None]:
    """Sums over each data set's rows [N, T]; and, where there are passages [N, L], over the first copies and all tokens
    of the second."""
    batches = [part.split(batch_size) for part in rows]
    repeated = passages.repeat(1, 2).split(batch_size) if len(passages) else ()
    length = passages.shape[1]
    first, second = Sums(), Sums()
    with tqdm(total=sum(map(len, batches)) + len(repeated), desc="evaluating", disable=not progress) as bar:
        sums = [Sums() for _ in batches]
        for part, batch in zip(sums, batches, strict=True):
            for ids in batch:
                add_batch(part, ids, models.states(ids), teacher=models.teacher)
                bar.update()
        for ids in repeated:
            states = models.states(ids)
            add_batch(first, ids, states, first=1, last=length)
            add_batch(second, ids, states, first=length, last=2 * length)
            bar.update()
    return sums, (first, second) if len(repeated) else None


def _agreement(
    pair: dict[str, Any], prompts: Tensor, batch_size: int, known: Callable[..., Any]
) -> dict[str, Any] | None:
    if TEACHER not in pair or not len(prompts):
        return None

    def greedy(role: str) -> Tensor:
        return continuations(pair[role], prompts, NEW_TOKENS, batch_size)

    return agreement(greedy(STUDENT), known(("agreement",), lambda: greedy(TEACHER)))
