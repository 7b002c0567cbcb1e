"""The report is one file that holds everything, says what was measured, and refuses what it cannot read."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from linearize.cli import main
from linearize.errors import UsageError, UserError
from linearize.report import report

EVALUATION = {
    "perplexity": {"student": 12.5, "teacher": 12.0, "ratio": 1.0417},
    "kl": 0.0531,
    "recall": {"student": 0.41, "teacher": 0.24},
    "linear_off": {"perplexity": {"student": 15.0, "ratio": 1.25}, "kl": 0.2, "recall": {"student": 4.0}},
    "tokens": 32768,
    "context": 1024,
    "datasets": [{"name": "/somewhere/prose.jsonl"}],
    "by_position": [{"from": 0, "to": 64, "student": 3.0, "teacher": 2.9}],
    "retrieval": [{"context": 512, "items": 32, "student": 0.5, "teacher": 1.0}],
    "tasks": {"questions.jsonl": {"student": 0.4, "teacher": 0.43, "items": 80, "kind": "answers"}},
}


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    first = {
        "stage": "convert",
        "mixer": "gla",
        "tokens": 0,
        "time": "2026-01-01",
        "command": "linearize convert '<m>'",
    }
    record = {
        "stage": "transfer",
        "tokens": 4096,
        "dataset": "/home/me/text.jsonl",
        "command": "linearize distill /home/me/student",
        "history": [first],
    }
    (folder / "linearize.json").write_text(json.dumps(record))
    lines = [
        {"stage": "transfer", "step": i, "tokens": i * 1024, "loss": 1 / i, "layers": [0.5, 0.1]} for i in (1, 2, 3)
    ]
    lines += [{"stage": "logits", "step": i, "tokens": i * 1024, "loss": 1 / i, "kl": 0.5 / i} for i in (1, 2)]
    (folder / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"method": "gradient", "scores": [[0.1, None], [0.3, 0.2]], "chosen": [[1, 0]]}
    (folder / "keep_scores.json").write_text(json.dumps(scores))
    near = {"cosine": 0.9, "relative_error": 0.3}
    names = ("window_alone", "uncalibrated", "closed_form", "calibrated")
    layers = [{"layer": i, **dict.fromkeys(names, near)} for i in range(2)]
    (folder / "calibration.json").write_text(json.dumps({"layers": layers}))
    return folder


def test_one_file_holds_everything(student, tmp_path):
    pytest.importorskip("matplotlib")
    judged = tmp_path / "judged.json"
    judged.write_text(json.dumps(EVALUATION))
    text = report(student, evaluation=judged).read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [
        "What it cost",
        "Perplexity by position",
        "Key-value retrieval by length",
        "Tasks",
        "Stages",
        "Loss: transfer",
        "Loss: logits",
        "What stays softmax",
        "Fidelity by layer",
        "How to load it",
    ]
    assert text.count("<svg") == 6
    assert "/home/" not in text and "text.jsonl" in text and "linearize distill student" in text
    assert "<td>student</td><td>12.5</td><td>1.042</td><td>0.0531</td><td>0.41</td>" in text
    assert "<td>linear branch off</td><td>15</td><td>1.25</td><td>0.2</td><td>4</td>" in text
    assert "<td>questions.jsonl</td><td>80</td><td>0.43</td><td>0.4</td>" in text
    assert "linearize convert &#x27;&lt;m&gt;&#x27;" in text and "<m>" not in text
    assert "/somewhere" not in text  # nothing of the machine that measured
    assert not re.search(r"(src|href)=\"(?!#|data:)", text.replace("xlink:href", "href"))  # it needs no other file
    assert report(student, evaluation=judged, overwrite=True).read_text() == text


def test_what_is_missing_is_left_out(student):
    pytest.importorskip("matplotlib")
    for name in ("loss.jsonl", "keep_scores.json", "calibration.json"):
        (student / name).unlink()
    result = CliRunner().invoke(main, ["report", str(student)])
    assert result.exit_code == 0, result.output
    text = (student / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Stages", "How to load it"]
    assert str(student / "report.html") in result.output


def test_what_it_refuses(student, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="is no folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"linearize\.json"):
        report(tmp_path)
    with pytest.raises(UserError, match="--evaluation: there is no file"):
        report(student, evaluation=tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        report(student, evaluation=tmp_path / "list.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not what `linearize eval"):
        report(student, evaluation=tmp_path / "other.json")
    with pytest.raises(UsageError, match="no file in a folder"):
        report(student, out=tmp_path / "nowhere" / "x.html")
    (student / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        report(student)
    assert (student / "report.html").read_text() == "mine"
    (student / "loss.jsonl").write_text("{broken")
    with pytest.raises(UserError, match=r"loss\.jsonl"):
        report(student, overwrite=True)
    assert (student / "report.html").read_text() == "mine"
