"""Local tasks beside naive computations, lm-eval's by name, and what is said of bad files."""

from __future__ import annotations

import gzip
import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import shake, tiny_teacher
from test_data import CHATML, letters, write_lines
from test_evaluate import SMALL, TEXT, learned, other_teacher

from linearize.convert import convert
from linearize.errors import UsageError, UserError
from linearize.evaluate import answers, evaluate, generate_text
from linearize.evaluate.scoring import Scorer
from linearize.evaluate.task_files import read_tasks

CHOICES = [
    {"context": f"the {i} cats", "choices": [" sat on mats.", f" sat on {i} mats.", " ran"], "gold": i % 3}
    for i in range(12)
]
QUESTIONS = [
    {"context": f"there are {i} cats. " * (i + 1), "question": "how many?", "answers": ["x"]} for i in range(5)
]


@torch.no_grad()
def naive_log(model, context, choice):
    before, ids = letters()(context)["input_ids"], torch.tensor([letters()(context + choice)["input_ids"]])
    log = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return float(sum(log[t - 1, ids[0, t]] for t in range(len(before), ids.shape[1])))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_choices_are_weighed_as_naively(tmp_path, batch_size):
    file = write_lines(tmp_path / "cats.jsonl.gz", CHOICES)
    student, teacher = shake(convert(tiny_teacher(), "gla", window=4)), other_teacher()
    options = {**SMALL, "branches": False, "tasks": str(file), "task_items": 10, "batch_size": batch_size}
    found = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, **options)["tasks"]["cats"]
    assert found.pop("kind") == "choices" and found.pop("items") == 10
    for role, model in (("student", student), ("teacher", teacher)):
        logs = [[naive_log(model, row["context"], choice) for choice in row["choices"]] for row in CHOICES[:10]]
        sizes = [[len(choice) for choice in row["choices"]] for row in CHOICES[:10]]
        by_length = [[log / size for log, size in zip(*pair, strict=True)] for pair in zip(logs, sizes, strict=True)]
        for score, values in ((found[role], logs), (found["normalised"][role], by_length)):
            right = [
                max(range(3), key=own.__getitem__) == row["gold"] for own, row in zip(values, CHOICES, strict=False)
            ]
            assert score == pytest.approx(sum(right) / 10)


@torch.no_grad()
def test_log_likelihoods_are_the_naive_ones():
    model = other_teacher()
    for context, choice in (("the cats", " sat."), ("", "sat")):
        tokens, first = answers._choice(letters(), context, choice)
        hidden = Scorer.of(model).run(torch.tensor([[*tokens, 9, 9]]))[0]
        found = answers._log_likelihood(Scorer.of(model), hidden, tokens, first)
        end = letters().eos_token
        assert found == pytest.approx(naive_log(model, context or end, choice), rel=1e-5)


@pytest.mark.parametrize("template", [None, CHATML])
def test_answers_are_those_of_generate(tmp_path, template):
    tokenizer = letters(template)
    model = shake(convert(tiny_teacher(vocab_size=48), "linear", window=8))
    rows, right = [], []
    for row in QUESTIONS:
        prompt = f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
        text = generate_text(model, tokenizer, prompt, chat=bool(template), max_new_tokens=24)
        right.append(len(rows) % 2 == 0 and len(text) > 3)
        rows.append(row | {"answers": ["not this one", text[1:4].upper() if right[-1] else "nor this one"]})
    assert any(right)
    file = write_lines(tmp_path / "cats.jsonl", rows)
    options = {**SMALL, "branches": False, "tasks": [str(file)], "batch_size": 2}
    found = evaluate(model, None, tokenizer=tokenizer, dataset=TEXT, **options)["tasks"]
    assert found == {"cats": {"student": sum(right) / 5, "teacher": None, "items": 5, "kind": "answers"}}


def test_the_teacher_is_asked_once_for_several_students(tmp_path):
    file = write_lines(tmp_path / "cats.jsonl", CHOICES)
    teacher, held = other_teacher(), {}
    options = {**SMALL, "branches": False, "tasks": str(file), "teacher_figures": held}
    first = evaluate(tiny_teacher(), teacher, tokenizer=letters(), dataset=TEXT, **options)["tasks"]["cats"]
    assert held[("task", "cats")]["score"] == first["teacher"]
    held[("task", "cats")] = {"score": 0.125, "normalised": 0.25}
    again = evaluate(tiny_teacher(), teacher, tokenizer=letters(), dataset=TEXT, **options)["tasks"]["cats"]
    assert again["teacher"] == 0.125 and again["student"] == first["student"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "bad.jsonl:1: not a JSON object"),
        (["[1]"], "bad.jsonl:1: a JSON object is needed"),
        ([{"text": "a"}], "bad.jsonl:1 has the fields text; an item has context, question and answers"),
        ([CHOICES[0], QUESTIONS[0]], "bad.jsonl:2 has the fields"),
        ([CHOICES[0] | {"gold": 3}], "gold is the number of one of the choices"),
        ([CHOICES[0] | {"choices": []}], "lists of texts"),
        ([QUESTIONS[0] | {"answers": "x"}], "lists of texts"),
        ([], "is empty"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match="--tasks: ") as error:
        read_tasks(str(write_lines(tmp_path / "bad.jsonl", lines)), 300)
    assert message in str(error.value) and not isinstance(error.value, UsageError)


def test_bad_names(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "cats.jsonl", CHOICES)
    (tmp_path / "notes.md").write_text("a")
    task = tmp_path / "task.yaml"
    task.write_text("task: mine\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"a" * 100)[:20])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for spec, message in (
        (tmp_path / "none.jsonl", "there is no file"),
        (tmp_path / "notes.md", "unknown kind"),
        (tmp_path / "cut.jsonl.gz", "is truncated"),
        (f"{file},{file}", "two tasks are named cats"),
        ("hellaswag", r"pip install 'linearize\[tasks\]'"),
        (task, r"is a task of lm-eval's, which needs: pip install 'linearize\[tasks\]'"),
        (tmp_path / "none.yaml", "there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            read_tasks(str(spec), 300)
    with pytest.raises(UsageError, match="--task-items must be at least 1, got 0"):
        read_tasks("", 0)
    assert read_tasks("", 300) == read_tasks((), 300) == []
    assert [len(task.rows) for task in read_tasks(str(file), 3)] == [3]


def test_names_go_to_lm_eval(monkeypatch):
    """On a stand-in for the package, with the shape of its results."""
    asked = []

    def simple_evaluate(model, tasks, limit, **rest):
        asked.append((model, tasks, limit))
        if tasks == ["nonsense"]:
            raise KeyError("nonsense")
        figures = {"alias": tasks[0], "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}
        return {"results": {tasks[0]: figures}, "n-samples": {tasks[0]: {"original": 90, "effective": 7}}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    modules["lm_eval.models.huggingface"].HFLM = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    student, teacher = tiny_teacher(), other_teacher()
    options = {"tokenizer": letters(), "dataset": TEXT, **SMALL, "task_items": 7}
    found = evaluate(student, teacher, tasks="piqa", **options)["tasks"]
    assert json.loads(json.dumps(found)) == {
        "piqa": {
            "student": 0.5,
            "teacher": 0.5,
            "items": 7,
            "kind": "lm-eval",
            "metric": "acc",
            "normalised": {"student": 0.25, "teacher": 0.25},
        }
    }
    assert [(model.pretrained, tasks, limit) for model, tasks, limit in asked] == [
        (student, ["piqa"], 7),
        (teacher, ["piqa"], 7),
    ]
    with pytest.raises(UserError, match="lm-eval cannot run nonsense: "):
        evaluate(student, None, tasks="nonsense", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("task: a\nversion: 2024-13-01", "is no YAML"),
        ("task: !!python/name:os.getcwd", "is no YAML"),
        ("- task", "names no task"),
        ("dataset_path: json", "names no task"),
    ],
)
def test_bad_files_of_lm_evals_kind(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_tasks(str(tmp_path / "mine.yaml"), 300)


def test_lm_eval_itself_runs_a_local_task(tmp_path):
    """The package, on a file of one's own though it has a task of that name: the accuracy of our own choices."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'linearize[tasks]'")
    own = write_lines(tmp_path / "own.jsonl", CHOICES)
    (tmp_path / "mine.yaml").write_text(
        "task: piqa\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {own}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
        "process_docs: !function tools.same\n"
    )
    (tmp_path / "tools.py").write_text("def same(docs):\n    return docs\n")
    (tmp_path / "another.yaml").write_text("task: piqa\ndataset_path: nowhere\n")
    student, teacher = shake(convert(tiny_teacher(), "gla", window=4)), other_teacher()
    options = {"tokenizer": letters(), "dataset": TEXT, **SMALL, "branches": False}
    found = evaluate(student, teacher, tasks=[f"{tmp_path / 'mine.yaml'}", str(own)], **options)["tasks"]
    assert found["piqa"]["kind"] == "lm-eval" and found["piqa"]["metric"] == "acc"
    for name in ("student", "teacher", "items"):
        assert found["piqa"][name] == pytest.approx(found["own"][name]), name


@pytest.mark.parametrize("items", [CHOICES, QUESTIONS])
def test_items_end_with_the_learned_positions(tmp_path, items):
    long = {**items[0], "context": "a" * 120}
    file = write_lines(tmp_path / "long.jsonl", [*items[:2], long])
    options = {**SMALL, "context": 32, "recall_length": 16, "branches": False, "tasks": str(file)}
    with pytest.raises(UsageError, match=r"longest item of --tasks takes 1\d\d positions.*learned 100 .*out of the"):
        evaluate(learned("gpt2", 100), tokenizer=letters(), dataset=TEXT, **options)
