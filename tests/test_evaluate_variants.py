"""What a student is with a branch off, and what its window would be alone."""

from __future__ import annotations

import pytest
import torch
from conftest import shake, tiny_teacher
from test_data import letters
from test_evaluate import SMALL, TEXT, other_teacher
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from linearize.convert import convert
from linearize.evaluate import evaluate
from linearize.evaluate.variants import kept_softmax, window_alone
from linearize.modeling.mixer import Mixer, branch_off

KEYS = ("kl", "perplexity", "recall")
KEPT = {"keep_softmax": "heads:0.1,1.0,1.1,1.2,1.3", "window": 8, "sinks": 1}  # a head, and the whole second layer


def measured(student, teacher, **options):
    return evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, **{**SMALL, "branches": True, **options})


def test_an_untrained_student_without_its_linear_branch_is_the_window_alone(mixer_name):
    teacher = tiny_teacher()
    student = convert(teacher, mixer_name, **KEPT)
    result = measured(student, teacher, sequences=2, recall_passages=2)
    for key in KEYS:
        assert result["window_alone"][key] == result["linear_off"][key] != result[key]
    trained = shake(student)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "mlp" in name:
                parameter += 0.05
    again = measured(trained, teacher, sequences=2, recall_passages=2)
    assert again["linear_off"]["kl"] != result["linear_off"]["kl"]
    for key in KEYS:
        assert again["window_alone"][key] == result["window_alone"][key]


def test_each_variant_is_the_model_with_the_branch_off():
    teacher = other_teacher()
    student = shake(convert(teacher, "gla", **KEPT))
    result = measured(student, teacher)
    assert len({result[name]["kl"] for name in ("linear_off", "window_off", "window_alone")} | {result["kl"]}) == 4
    alone = convert(teacher, "retention", **KEPT)
    for name, model, branch in (
        ("linear_off", student, "linear"),
        ("window_off", student, "window"),
        ("window_alone", alone, "linear"),
    ):
        with branch_off(model, branch):
            bare = measured(model, teacher, branches=False)
        assert bare["linear_off"] is bare["window_off"] is bare["window_alone"] is None
        for key in KEYS:
            assert result[name][key] == bare[key]
        assert result["datasets"][0][name] == {key: bare[key] for key in ("perplexity", "kl")}


def test_the_window_alone_holds_the_teachers_tensors_and_leaves_it_as_it_was():
    teacher = tiny_teacher().requires_grad_(False)
    alone = window_alone(convert(teacher, "based", **KEPT), teacher)
    assert kept_softmax(alone.config) == KEPT["keep_softmax"]
    assert alone.config.mixer_options == {"window": 8, "sinks": 1}
    own = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert all(t.data_ptr() in own for name, t in alone.state_dict().items() if ".mixer." not in name)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_where_there_is_no_such_variant():
    teacher = tiny_teacher()
    student = convert(teacher, "linear", window=8)
    lone = measured(student, None)
    assert lone["linear_off"]["perplexity"]["student"] > 0 and lone["window_off"] and lone["window_alone"] is None
    for model in (teacher, convert(teacher, "linear", window=0), convert(teacher, "linear", keep_softmax=[0, 1])):
        result = measured(model, teacher)
        assert result["linear_off"] is result["window_off"] is result["window_alone"] is None
    config = MptConfig(vocab_size=128, d_model=32, n_layers=1, n_heads=2)
    foreign = measured(student, MptForCausalLM(config).eval())
    assert foreign["window_alone"] is None and foreign["linear_off"]["kl"] > 0
    assert measured(student, student)["window_alone"] is None  # converted already
    usual = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, **SMALL)  # the cheapest check by default
    assert usual["linear_off"] and usual["window_off"] is usual["window_alone"] is None
    with pytest.raises(ValueError, match="branches are linear_off, window_off, window_alone, not windows"):
        measured(student, teacher, branches=["windows"])
    deeper = convert(tiny_teacher(num_hidden_layers=3), "linear", keep_softmax=[2], window=8)
    assert measured(deeper, teacher)["window_alone"] is None  # of another teacher


def test_a_student_of_remote_code_is_switched_off_too(tmp_path):
    """Its classes are others than the package's."""
    teacher = tiny_teacher()
    shake(convert(teacher, "linear", window=8)).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = get_class_from_dynamic_module("modeling_linearize.LinearizeForCausalLM", str(tmp_path)).from_pretrained(
        tmp_path
    )
    assert type(theirs) is not type(ours) and not isinstance(theirs.mixer_layers()[0][1].mixer, Mixer)
    results = [measured(student, teacher, sequences=2, recall_passages=2) for student in (ours, theirs)]
    for name in ("linear_off", "window_off", "window_alone"):
        assert results[0][name]["kl"] == results[1][name]["kl"] != results[0]["kl"]
    assert results[0]["state_bytes"] == results[1]["state_bytes"] > 0


def test_without_mixers_there_is_no_branch():
    with pytest.raises(ValueError, match="no mixers"), branch_off(tiny_teacher(), "linear"):
        pass
