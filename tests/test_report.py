"""The report is one file that holds everything, says what was measured, and refuses what it cannot read."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from conftest import tiny_teacher
from test_data import letters

from linearize.cli import main
from linearize.convert.show import size
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


def test_a_whole_student_is_described_beside_its_teacher(tmp_path, monkeypatch):
    """Its table has parameters, state and KV bytes without an evaluation; one of several students side by side will
    do, and other students' will not."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    tiny_teacher(num_hidden_layers=2).save_pretrained("teacher")
    letters().save_pretrained("teacher")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    words = ["convert", "teacher", "--to", "gla", "-o", "student", "--keep-softmax", "heads:0.0,0.1,1.2,1.3"]
    words += ["--calibrate", "text.txt", "--calibrate-length", "32", "--calibrate-sequences", "4"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    text = report("student").read_text()
    rows = dict(re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", text[: text.index("<h2>Stages")]))
    assert rows["mixer gla"] == "layers 0-1" and rows["teacher"].startswith("teacher, a local folder")
    assert "of them new" in rows["parameters"] and "2 of 4 key groups" in rows["stays softmax"]
    made = json.loads(CliRunner().invoke(main, ["plan", "teacher", *words[2:4], *words[6:8], "--json"]).stdout)
    state, kv = (size(made[name]) for name in ("state_bytes_per_sequence", "kv_bytes_per_token"))
    assert rows["a sequence holds"].startswith(f"a state of {state}, and {kv} of KV a token")
    assert "teacher&#x27;s entropy" in text or "teacher's entropy" in text

    costs = {"kv_bytes_per_token": 512, "kv_bytes_per_token_teacher": 1024, "state_bytes": 2048}
    several = {"students": {"other": EVALUATION, "some/student": {**EVALUATION, **costs, "kl": 0.125}}}
    (tmp_path / "several.json").write_text(json.dumps(several))
    text = report("student", evaluation="several.json", overwrite=True).read_text()
    assert "<th>KV a token</th><th>state</th>" in text and "<td>0.125</td>" in text
    assert f"<td>{size(1024)}</td><td>-</td>" in text and f"<td>{size(512)}</td><td>{size(2048)}</td>" in text
    (tmp_path / "several.json").write_text(json.dumps({"students": {"other": EVALUATION}}))
    with pytest.raises(UserError, match="alone or beside other students"):
        report("student", evaluation="several.json", overwrite=True)


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
