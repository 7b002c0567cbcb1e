"""Key-value retrieval by context length: facts hidden in prose, asked for at its end.

A context holds `PAIRS` facts `The password is NAME: 1234.`, each told `TELLINGS` times, evenly spread over prose of the
evaluation text, and ends with questions of the same form, `The password is NAME:`, for some of them, from all depths.
An answer is right when each of its tokens is the likeliest after those before it: what greedy decoding would give.
The form is one in which small teachers find anything at all: the key stands right before its value, and is met twice.
Each question is one item; a context answers several, with the right answers to those before in sight.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UsageError
from .scoring import Scorer
from .variants import STUDENT, TEACHER

PAIRS, TELLINGS, QUESTIONS = 8, 2, 4
KEY, END = " The password is {}:", "."
NAMES = [
    *("Adam", "Alice", "Anna", "Arthur", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack"),
    *("Julia", "Karl", "Laura", "Martin", "Nora", "Oliver", "Peter", "Rose", "Samuel", "Sarah", "Thomas", "Victor"),
]
_CLAUSE = re.compile(r"(?<=[.!?;:,])\s+")
TAIL = 64  # tokens of prose before the questions, so that no usual window reaches from a question to a fact
_LONGEST = 32  # tokens of a piece of prose, so that facts stand at even depths


@dataclass(frozen=True)
class Haystacks:
    """Contexts of one length, ids [N, T], and of each the spans (row, start, stop) of its answers."""

    ids: Tensor
    answers: list[tuple[int, int, int]]


def parse_contexts(text: str | Sequence[int]) -> tuple[int, ...]:
    """Lengths of `--retrieval-contexts`, in tokens; empty or 0 for none. Raises UsageError for what is no number."""
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        found = [int(part) for part in parts if str(part).strip()]
    except ValueError:
        raise UsageError(f"--retrieval-contexts wants numbers of tokens, such as 512,1024,2048, got {text!r}") from None
    if any(length < 0 for length in found):
        raise UsageError(f"--retrieval-contexts must be positive, got {text!r}")
    return tuple(sorted({length for length in found if length}))


def clauses(ids: Tensor, tokenizer: Any) -> list[list[int]]:
    """The clauses of a text [T], tokens of each with the space before it; long ones in pieces."""
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    found = []
    for part in _CLAUSE.split(text):
        tokens = _tokens(tokenizer, " " + " ".join(part.split())) if part.strip() else []
        found += [tokens[start : start + _LONGEST] for start in range(0, len(tokens), _LONGEST)]
    return found


def haystacks(filler: Sequence[list[int]], tokenizer: Any, context: int, items: int, seed: int = 0) -> Haystacks | None:
    """`items` questions over contexts of `context` tokens, drawn from `seed`; None where the facts and the questions
    would leave less than a third of a context to prose."""
    random_state = random.Random(f"{seed} {context}")
    rows: list[list[int]] = []
    answers: list[tuple[int, int, int]] = []
    while len(answers) < items:
        names, numbers = random_state.sample(NAMES, PAIRS), random_state.sample(range(1000, 10000), PAIRS)
        keys = [_tokens(tokenizer, KEY.format(name)) for name in names]
        values = [_tokens(tokenizer, f" {number}") for number in numbers]
        end = _tokens(tokenizer, END)
        facts = [[*key, *value, *end] for key, value in zip(keys, values, strict=True)]
        # One question from each stretch of the context, at a depth that goes on from row to row.
        stretch = PAIRS // QUESTIONS
        asked = [stretch * place + len(rows) % stretch for place in range(QUESTIONS)]
        random_state.shuffle(asked)
        asked = asked[: items - len(answers)]
        questions = [[*keys[pair], *values[pair], *end] for pair in asked]
        facts = facts * TELLINGS
        room = context - sum(map(len, facts)) - sum(map(len, questions))
        if room < context // 3 or not filler:
            return None
        row = _hidden(facts, _prose(filler, room, random_state))
        for pair, question in zip(asked, questions, strict=True):
            start = len(row) + len(keys[pair])
            answers.append((len(rows), start, start + len(values[pair])))
            row += question
        rows.append(row)
    # A context with fewer questions than the others has more prose: all are of one length.
    return Haystacks(torch.tensor(rows), answers)


def retrieval(
    models: Mapping[str, Any],
    scorers: Mapping[str, Scorer],
    tokenizer: Any,
    ids: Tensor,
    contexts: Sequence[int],
    items: int,
    *,
    tokens: int,
    known: Callable[..., Any],
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Accuracies by context length: `context`, `items`, `student` and `teacher` (None without one); a length that a
    model was not made for has no items, and `skipped` says why.

    Args:
        models: the student, and the teacher where there is one, by role; `scorers` are theirs.
        ids: the text that makes the prose, [T].
        tokens: about how many go through a model at once.
        known: asked for the teacher's figures, which several students share.
    """
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models.values()]
    limit = min((limit for limit in limits if isinstance(limit, int)), default=None)
    prose = clauses(ids, tokenizer) if contexts else []
    found: list[dict[str, Any]] = []
    for context in tqdm(contexts, desc="retrieval", disable=not progress or not contexts):
        entry: dict[str, Any] = {"context": context, "items": 0, STUDENT: None, TEACHER: None}
        if limit is not None and context > limit:
            found.append(entry | {"skipped": f"longer than max_position_embeddings, {limit}"})
            continue
        made = haystacks(prose, tokenizer, context, items)
        if made is None:
            found.append(entry | {"skipped": f"too short to hide {PAIRS} facts in prose"})
            continue
        entry |= {"items": len(made.answers), STUDENT: accuracy(scorers[STUDENT], made, tokens)}
        if TEACHER in models:
            entry[TEACHER] = known(("retrieval", context), functools.partial(accuracy, scorers[TEACHER], made, tokens))
        found.append(entry)
    return found


def accuracy(scorer: Scorer, found: Haystacks, tokens: int) -> float:
    """Share of right answers, in batches of about `tokens` tokens."""
    right = 0
    size = 1 if scorer.whole_logits else max(tokens // found.ids.shape[1], 1)
    for first in range(0, len(found.ids), size):
        ids = found.ids[first : first + size]
        hidden = scorer.run(ids)
        for row, start, stop in found.answers:
            if first <= row < first + size:
                guess = scorer.head(hidden[row - first, start - 1 : stop - 1]).argmax(-1).cpu()
                right += bool((guess == found.ids[row, start:stop]).all())
    return right / len(found.answers)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _prose(filler: Sequence[list[int]], room: int, random_state: random.Random) -> list[list[int]]:
    """Pieces in their order from one that is drawn, `room` tokens: the first ones are cut where they are too many."""
    place, held = random_state.randrange(len(filler)), 0
    found: list[list[int]] = []
    while held < room:
        found.append(filler[place % len(filler)])
        held += len(found[-1])
        place += 1
    over = held - room
    while over:
        cut = min(over, len(found[0]))
        found[0] = found[0][cut:]
        over -= cut
        if not found[0]:
            del found[0]
    return found


def _hidden(facts: Sequence[list[int]], prose: Sequence[list[int]]) -> list[int]:
    """The facts between the pieces, evenly spread from the beginning on, none of them in the tail."""
    room = sum(map(len, prose))
    room -= min(TAIL, room // 4)
    row: list[int] = []
    seen = placed = 0
    for piece in prose:
        while placed < len(facts) and seen >= room * placed / len(facts):
            row += facts[placed]
            placed += 1
        row += piece
        seen += len(piece)
    for fact in facts[placed:]:
        row += fact
    return row
