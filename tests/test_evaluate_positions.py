"""Loss by position is the mean of naive losses, bucket by bucket."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_teacher
from test_data import letters
from test_evaluate import TEXT, other_teacher, tokens

from linearize.evaluate import evaluate
from linearize.evaluate.positions import buckets


def test_buckets_double_up_to_the_context():
    assert buckets(1024) == [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert buckets(200) == [(0, 64), (64, 128), (128, 200)]
    assert buckets(64) == [(0, 64)] and buckets(2) == [(0, 2)]


@torch.no_grad()
def losses(model, ids):
    log = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    return -log.gather(-1, ids[:, 1:, None])[..., 0]


def test_by_position_is_the_naive_mean():
    student, teacher = tiny_teacher(), other_teacher()
    options = {"tokenizer": letters(), "context": 150, "sequences": 4, "batch_size": 3, "recall_passages": 0}
    result = evaluate(student, teacher, dataset=TEXT, **options)
    ids = tokens(4 * 150).reshape(4, 150)
    assert [(entry["from"], entry["to"]) for entry in result["by_position"]] == buckets(150)
    for entry in result["by_position"]:
        for role, model in (("student", student), ("teacher", teacher)):
            naive = losses(model, ids)[:, max(entry["from"] - 1, 0) : entry["to"] - 1]
            assert entry[role] == pytest.approx(float(naive.mean()), rel=1e-5)
    # Together the buckets are the perplexity's own tokens.
    weighed = sum(entry["student"] * (entry["to"] - max(entry["from"], 1)) for entry in result["by_position"])
    assert math.exp(weighed / 149) == pytest.approx(result["perplexity"]["student"])


def test_data_sets_count_by_their_tokens():
    model = tiny_teacher()
    options = {"tokenizer": letters(), "context": 80, "sequences": 3, "recall_passages": 0}
    sets = {"long": TEXT[:10], "short": TEXT[10:11]}
    result = evaluate(model, dataset=sets, **options)
    both = [evaluate(model, dataset=rows, **options) for rows in sets.values()]
    assert [part["sequences"] for part in both] == [3, 2]
    for entry, *parts in zip(result["by_position"], *(part["by_position"] for part in both), strict=True):
        mean = (3 * parts[0]["student"] + 2 * parts[1]["student"]) / 5
        assert entry["student"] == pytest.approx(mean) and entry["teacher"] is None
