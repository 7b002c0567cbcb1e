"""Students side by side: what they cost, who is loaded when, and how the table is ordered."""

from __future__ import annotations

import gc
import json
import warnings
import weakref

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_teacher
from test_data import letters, write_lines
from test_evaluate import TEXT
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM

from linearize.cli import main
from linearize.convert import convert, convert_folder, plan
from linearize.errors import UsageError
from linearize.evaluate import evaluate_each, several
from linearize.evaluate.costs import costs
from linearize.evaluate.table import equal_groups, format_results
from linearize.source import ModelSource

SMALL = ["--context", "32", "--sequences", "2", "--recall-length", "12", "--recall-passages", "2"]
HELD = ("kv_bytes_per_token", "kv_bytes_per_token_teacher", "kv_share", "state_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from test_cli import teacher_at

    folder = tmp_path_factory.mktemp("several")
    teacher_at(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    tokenizer = list((folder / "teacher").glob("*token*"))
    for name, to, options in (
        ("hybrid", "linear", {"window": 8, "keep_softmax": "heads:0.1"}),
        ("linear", "linear", {"window": 8}),
        ("same", "linear", {"window": 8, "seed": 1}),
        ("bare", "retention", {"window": 0}),
    ):
        convert(teacher, to, **options).save_pretrained(folder / name)
        for file in tokenizer:
            (folder / name / file.name).write_bytes(file.read_bytes())
    write_lines(folder / "text.jsonl", TEXT)
    write_lines(folder / "task.jsonl", [{"context": "a", "choices": [" b", " c"], "gold": 1}] * 3)
    return folder


def run(place, *args, code=0):
    words = [str(place / word) if word and (place / str(word)).exists() else str(word) for word in args]
    result = CliRunner().invoke(main, ["eval", *words, "--dataset", str(place / "text.jsonl"), *SMALL])
    assert result.exit_code == code, result.stderr
    return result


@pytest.mark.parametrize("keep", [None, [1], "heads:0.1,0.2,1.0", [0, 1]])
def test_costs_are_those_of_the_plan(keep):
    teacher = tiny_teacher()
    options = {"keep_softmax": keep, "window": 8, "mixer_options": {"state_heads": "query"}}
    student, planned = convert(teacher, "gla", **options), plan(teacher, "gla", **options)
    found = costs(student)
    assert found.kv_bytes_per_token == planned.kv_bytes_per_token
    assert found.kv_bytes_per_token_teacher == planned.kv_bytes_per_token_teacher
    assert found.state_bytes == planned.state_bytes_per_sequence
    assert found.kv_share == planned.kv_bytes_per_token / planned.kv_bytes_per_token_teacher


def test_costs_of_models_that_are_no_students():
    teacher = tiny_teacher()
    assert costs(teacher).to_dict() == dict(zip(HELD, (512, 512, 1.0, 0), strict=True)) | {"state_bytes_teacher": 0}
    foreign = MptForCausalLM(MptConfig(vocab_size=128, d_model=32, n_layers=1, n_heads=2))
    assert set(costs(foreign).to_dict().values()) == {None}


def test_one_model_is_the_plain_object_and_several_are_named(place):
    extras = ["--teacher", "teacher", "--tasks", place / "task.jsonl", "--retrieval-contexts", "0", "--json"]
    alone = json.loads(run(place, "hybrid", *extras).stdout)
    assert alone["perplexity"]["ratio"] > 0 and alone["kv_share"] == 0.25 and alone["tasks"]["task"]["items"] == 3
    both = json.loads(run(place, "hybrid", "bare", *extras).stdout)
    assert list(both["students"]) == [str(place / "hybrid"), str(place / "bare")]
    first, bare = both["students"].values()
    assert {**first, "seconds": 0} == {**alone, "seconds": 0}
    assert bare["linear_off"] is None and bare["kv_share"] == 0.0
    teacher = both["teacher"]
    assert teacher["name"] == str(place / "teacher") and teacher["perplexity"] == alone["perplexity"]["teacher"]
    assert (teacher["kv_share"], teacher["state_bytes"], teacher["kv_bytes_per_token"]) == (1.0, 0, 512)
    assert teacher["tasks"]["task"] == {"teacher": alone["tasks"]["task"]["teacher"], "items": 3, "kind": "choices"}
    without = json.loads(run(place, "hybrid", "bare", "--retrieval-contexts", "", "--no-branches", "--json").stdout)
    assert without["teacher"] is None and all(result["kl"] is None for result in without["students"].values())


def test_the_teacher_is_loaded_once_and_students_are_freed(place, monkeypatch):
    loaded, alive = [], []
    load = several.load_model

    def loading(source, **options):
        gc.collect()
        alive.append([ref() is not None for ref in loaded])
        model = load(source, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(several, "load_model", loading)
    options = {"dataset": [str(place / "text.jsonl")], "context": 32, "sequences": 2, "recall_passages": 0}
    students = [ModelSource(str(place / name)) for name in ("linear", "bare", "hybrid")]
    results = evaluate_each(students, ModelSource(str(place / "teacher")), agreement_prompts=1, **options)
    assert len(results) == 3 and len(loaded) == 4  # student, teacher, student, student
    assert alive[1:] == [[True], [False, True], [False, True, False]]


def test_bad_input_is_said_before_a_model_is_loaded(place, monkeypatch):
    monkeypatch.setattr(several, "load_model", None)
    for flags, code, message in (
        (["linear", "linear"], 2, "is given twice"),
        (["linear", "--tasks", "none.jsonl"], 1, "there is no file none.jsonl"),
        (["linear", "--retrieval-contexts", "many"], 2, "--retrieval-contexts"),
        (["linear", "--task-items", "0"], 2, "--task-items"),
    ):
        assert message in run(place, *flags, code=code).stderr
    with pytest.raises(UsageError, match="is given twice"):
        evaluate_each([ModelSource("a"), ModelSource("a")])


def result(kl, recall, state, kv=0, **extra):
    perplexity = {"student": 12.0, "teacher": 10.0, "ratio": 1.2}
    return {
        "perplexity": perplexity,
        "kl": kl,
        "recall": {"student": recall, "teacher": 0.2, "first_copy": {"student": 3.0, "teacher": 2.5}},
        "state_bytes": state,
        "kv_bytes_per_token": kv,
        "kv_bytes_per_token_teacher": 1024,
        "context": 100,
        **extra,
    }


def test_equal_bytes_orders_and_stars_within_groups():
    results = {
        "large": result(0.01, 0.3, 5000, kv=100),
        "near": result(0.20, 1.0, 1040),
        "small": result(0.10, 2.0, 1000),
        "other": result(0.40, 1.5, 1050),
        "more": result(0.05, 0.9, 1051),
    }
    assert equal_groups(results) == [["small", "near", "other"], ["more"], ["large"]]
    lines = format_results(results, equal_bytes=True).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["teacher", "small", "near", "other", "more", "large"]
    stars = {line.split()[0]: [cell for cell in line.split() if cell.endswith("*")] for line in lines[3:]}
    # A group of one has nobody to be better than.
    assert stars == {"small": ["0.100*"], "near": ["1.000*"], "other": [], "more": [], "large": []}
    assert lines[2].split()[-2:] == ["100.0", "KiB"] and lines[-1].split()[-2:] == ["14.6", "KiB"]
    plain = format_results(results).splitlines()
    assert [line.split()[0] for line in plain[3:]] == list(results) and "*" not in "".join(plain)


def test_another_teacher_than_the_conversions_is_warned_of(tmp_path):
    teacher = tiny_teacher()
    for name in ("teacher", "changed"):
        teacher.save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)
        with torch.no_grad():
            teacher.model.layers[0].mlp.up_proj.weight[0] += 1
    convert_folder(ModelSource(str(tmp_path / "teacher")), "linear", tmp_path / "student", window=4)
    write_lines(tmp_path / "text.jsonl", TEXT)
    small = {"context": 32, "sequences": 2, "recall_passages": 2, "recall_length": 12}
    options = {"dataset": [str(tmp_path / "text.jsonl")], **small}
    student = ModelSource(str(tmp_path / "student"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*converted from")
        evaluate_each([student], ModelSource(str(tmp_path / "teacher")), **options)
    with pytest.warns(UserWarning, match="changed is not the checkpoint that .*student was converted from"):
        evaluate_each([student], ModelSource(str(tmp_path / "changed")), **options)
    for damaged in ('{"history": null}', '{"history": [3]}', "{"):  # nothing that an evaluation needs
        (tmp_path / "student" / "linearize.json").write_text(damaged)
        evaluate_each([student], ModelSource(str(tmp_path / "changed")), **options)


def test_what_was_asked_for_has_its_columns():
    extra = {
        "retrieval": [
            {"context": 512, "items": 8, "student": 0.25, "teacher": 0.875},
            {"context": 9000, "items": 0, "student": None, "teacher": None, "skipped": "longer than"},
        ],
        "agreement": {"prompts": 2, "new_tokens": 32, "same_prefix": 0.5, "same_tokens": 0.75},
        "tasks": {"squad": {"student": 0.125, "teacher": 0.375, "items": 8, "kind": "answers"}},
    }
    off = {key: value for key, value in result(0.3, 2.0, 0).items() if key in ("perplexity", "kl", "recall")}
    *lines, note = format_results({"a": result(0.1, 1.0, 1000, linear_off=off, **extra)}).splitlines()
    assert lines[0].endswith("kv@512  agreement  squad") and "9000" not in lines[0]
    teacher, student, variant = (line.split()[-3:] for line in lines[2:])
    assert (teacher, student, variant) == (["0.875", "1.000", "0.375"], ["0.250", "0.500", "0.125"], ["-"] * 3)
    assert len({len(line) for line in lines}) == 1
    assert note == "kv@9000: none, longer than"


def test_the_table_of_the_command(place):
    text = run(place, "linear", "bare", "same", "--teacher", "teacher", "--equal-bytes").stdout
    names = [line.split("  ")[0].removeprefix(str(place)) for line in text.splitlines()[2:]]
    whole = [name for name in names if "," not in name]
    assert whole[0] == "/teacher" or whole[0] == "teacher"
    assert (
        sorted(whole[1:]) == ["/bare", "/linear", "/same"] and abs(whole.index("/linear") - whole.index("/same")) == 1
    )
    assert [name for name in names if name.startswith("/same")] == [
        "/same",
        "/same, linear branch off",
        "/same, window off",
        "/same, window alone untrained",
    ]
