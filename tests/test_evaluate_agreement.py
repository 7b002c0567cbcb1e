"""Agreement counts equal tokens of greedy continuations, and those are made with the cache."""

from __future__ import annotations

import pytest
import torch
from conftest import shake, tiny_teacher
from test_data import letters
from test_evaluate import SMALL, TEXT, other_teacher, tokens

from linearize.convert import convert
from linearize.errors import UsageError
from linearize.evaluate import evaluate
from linearize.evaluate.agreement import agreement, continuations, prompts_of
from linearize.modeling import window


@torch.no_grad()
def naive(model, prompts, count):
    """Greedy tokens without a cache, the end token never among them."""
    ids = prompts
    for _ in range(count):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :]


def test_shares():
    teacher = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    student = torch.tensor([[1, 2, 9, 4], [0, 6, 7, 8]])
    assert agreement(student, teacher) == {"prompts": 2, "new_tokens": 4, "same_prefix": 0.25, "same_tokens": 0.75}


def test_continuations_are_the_naive_ones():
    student = shake(convert(tiny_teacher(), "gla", window=8, keep_softmax="heads:0.1"))
    prompts = prompts_of(tokens(3 * 256), 5)
    assert prompts.shape == (3, 64) and torch.equal(prompts[1], tokens(3 * 256)[256:320])
    assert torch.equal(continuations(student, prompts, 12, batch_size=2), naive(student, prompts, 12))


def test_agreement_in_the_result(monkeypatch):
    teacher = other_teacher()
    student = convert(teacher, "linear", window=8)
    options = {"tokenizer": letters(), "dataset": TEXT, **SMALL, "branches": False, "agreement_prompts": 2}
    options["sequences"] = 20
    found = evaluate(student, teacher, **options)["agreement"]
    prompts = prompts_of(tokens(20 * 32), 2)
    assert found == agreement(naive(student, prompts, 32), naive(teacher, prompts, 32))
    assert (found["prompts"], found["new_tokens"]) == (2, 32)
    same = evaluate(teacher, teacher, **options)["agreement"]
    assert same["same_prefix"] == same["same_tokens"] == 1.0
    assert evaluate(student, None, **options)["agreement"] is None
    assert evaluate(student, teacher, **{**options, "agreement_prompts": 0})["agreement"] is None
    # A cache that loses what it held is seen here, and nowhere else.
    wide = convert(teacher, "linear", window=256)  # sees all that the teacher sees
    assert evaluate(wide, teacher, **options)["agreement"]["same_tokens"] == 1.0
    roll = window.roll
    monkeypatch.setattr(window, "roll", lambda *args: torch.zeros_like(roll(*args)))
    result = evaluate(wide, teacher, **options)
    assert result["kl"] == pytest.approx(0, abs=1e-6) and result["agreement"]["same_tokens"] < 0.5


def test_little_text_and_bad_numbers():
    assert prompts_of(tokens(100), 4).shape == (1, 64) and prompts_of(tokens(50), 4).shape == (0, 64)
    with pytest.raises(UsageError, match="--agreement-prompts must be at least 0"):
        evaluate(tiny_teacher(), tokenizer=letters(), dataset=TEXT, agreement_prompts=-1)
