"""Facts hidden in prose: where they stand, who finds them, and which contexts are left out."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_teacher
from test_data import letters
from test_evaluate import SMALL, TEXT, other_teacher, tokens
from torch import nn

from linearize.errors import UsageError
from linearize.evaluate import evaluate
from linearize.evaluate.retrieval import PAIRS, QUESTIONS, TAIL, TELLINGS, accuracy, clauses, haystacks, parse_contexts
from linearize.evaluate.scoring import Scorer

FACT = re.compile(r" \?he password is (\?\w+): (\d{4})\.")  # there are no capitals among the letters


def made(context=1536, items=10, seed=0):
    found = haystacks(clauses(tokens(2000), letters()), letters(), context, items, seed)
    assert found is not None
    return found


class Finding(nn.Module):
    """Sure of what followed the longest of its last tokens that was there before; or always undecided."""

    def __init__(self, finds: bool = True) -> None:
        super().__init__()
        self.finds = finds
        self.config = SimpleNamespace(vocab_size=64)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 64)
        for b, row in enumerate(input_ids.tolist() if self.finds else []):
            text = "".join(map(chr, row))
            for t in range(len(row)):
                for length in range(min(10, t), 0, -1):
                    at = text.rfind(text[t + 1 - length : t + 1], 0, t)
                    if at >= 0:
                        logits[b, t, row[at + length]] = 50.0
                        break
        return SimpleNamespace(logits=logits)


def test_each_context_holds_its_facts_at_even_depths_and_asks_for_some():
    found = made()
    assert found.ids.shape == (3, 1536) and len(found.answers) == 10
    asked_at = []
    for number, row in enumerate(found.ids):
        text = letters().decode(row)
        pairs = [match.groups() for match in FACT.finditer(text)]
        facts, questions = pairs[:PAIRS], pairs[PAIRS * TELLINGS :]
        assert pairs[: PAIRS * TELLINGS] == facts * TELLINGS
        assert len({name for name, _ in facts}) == len({value for _, value in facts}) == PAIRS
        spans = [letters().decode(row[a:b]) for line, a, b in found.answers if line == number]
        assert spans == [f" {value}" for _, value in questions] and len(spans) == (QUESTIONS if number < 2 else 2)
        assert all(question in facts for question in questions)
        asked_at.append({facts.index(question) for question in questions})
        starts = [match.start() for match in FACT.finditer(text)]
        # One token a letter: the first question is farther from the last fact than a window reaches.
        assert starts[PAIRS * TELLINGS] - starts[PAIRS * TELLINGS - 1] > TAIL
        starts = starts[: PAIRS * TELLINGS]
        gaps = [b - a for a, b in pairwise(starts)]
        assert starts[0] == 0 and max(gaps) - min(gaps) <= 64
    # One in each stretch, and the next row goes deeper into each.
    assert asked_at[0] == {0, 2, 4, 6} and asked_at[1] == {1, 3, 5, 7}


def test_the_seed_decides():
    assert torch.equal(made().ids, made().ids) and not torch.equal(made().ids, made(seed=1).ids)


def test_accuracy_is_greedy_decoding():
    found = made(items=8)
    assert accuracy(Scorer.of(Finding()), found, 4000) == 1.0
    assert accuracy(Scorer.of(Finding(finds=False)), found, 4000) == 0.0
    # A random model, asked for what it would say anyway.
    model = tiny_teacher(max_position_embeddings=2048)
    ids = found.ids.clone()
    with torch.no_grad():
        for row, start, stop in found.answers[::2]:
            for t in range(start, stop):
                ids[row, t] = model(input_ids=ids[row : row + 1, :t]).logits[0, -1].argmax()
    told = type(found)(ids, found.answers)
    for tokens_at_once in (1, 2048):
        with torch.no_grad():
            assert accuracy(Scorer.of(model), told, tokens_at_once) == 0.5


def test_retrieval_in_the_result():
    student, teacher = tiny_teacher(max_position_embeddings=2048), other_teacher()
    teacher.config.max_position_embeddings = 1500
    options = {**SMALL, "retrieval_contexts": "0,1300,96,2048", "retrieval_items": 5, "branches": False}
    held: dict = {}
    runs = [
        evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, teacher_figures=held, **options)["retrieval"]
        for _ in range(2)
    ]
    short, whole, long = runs[0]
    assert runs[0] == runs[1] and list(held) == [("retrieval", 1300)]
    assert (whole["context"], whole["items"]) == (1300, 5) and 0 <= whole["student"] <= 1 and 0 <= whole["teacher"] <= 1
    assert short["items"] == long["items"] == 0 and short["student"] is long["teacher"] is None
    assert "too short" in short["skipped"] and "max_position_embeddings, 1500" in long["skipped"]
    copying = evaluate(Finding(), Finding(False), tokenizer=letters(), dataset=TEXT, **options)["retrieval"][1]
    assert (copying["student"], copying["teacher"]) == (1.0, 0.0)


def test_contexts_as_written():
    assert parse_contexts("1024, 512,512") == (512, 1024) == parse_contexts([1024, 512])
    assert parse_contexts("") == parse_contexts("0") == parse_contexts(()) == ()
    for text in ("512,many", "-1"):
        with pytest.raises(UsageError, match="--retrieval-contexts"):
            parse_contexts(text)
    with pytest.raises(UsageError, match="--retrieval-items must be at least 1"):
        evaluate(tiny_teacher(), tokenizer=letters(), dataset=TEXT, retrieval_items=0)
