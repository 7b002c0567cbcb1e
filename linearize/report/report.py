"""`report`: gathers what lies in a converted model's folder and writes one HTML file that needs no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import provenance, public
from ..convert.show import size
from ..errors import UsageError, UserError
from ..hub.facts import gather
from ..hub.files import collect
from ..hub.measured import about
from ..hub.student import student_rows
from ..json_files import as_written, read_lines, read_object
from ..paths import expanded
from . import pictures
from .page import Section, page

LOSSES, SCORES, CALIBRATION, EVALUATION = "loss.jsonl", "keep_scores.json", "calibration.json", "evaluation.json"


def report(
    folder: str | Path, *, evaluation: str | Path | None = None, out: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Writes the page about the converted model in `folder`, its pictures inside.

    Args:
        evaluation: what `linearize eval --json` printed about it; by default `evaluation.json` in the folder, if any.
        out: the file, `report.html` in the folder by default.

    Returns:
        The file.

    Raises:
        UsageError: the file exists. UserError: no converted model there, a file that is no JSON, no matplotlib.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the OUT of convert, distill, finetune or run")
    record = provenance.read(folder)
    if record is None:
        raise UserError(
            f"{folder} has no {provenance.FILE}: give the OUT of linearize convert, distill, finetune or run"
        )
    target = expanded(out) if out is not None else folder / "report.html"
    if target.exists() and not overwrite:
        raise UsageError(f"-o/--out: {target} exists; choose another name, or pass --overwrite to replace it")
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"-o/--out: {target} is no file in a folder that is there")
    pictures.require()
    judged = _json(expanded(evaluation), named=True) if evaluation is not None else _json(folder / EVALUATION)
    with as_written(folder):
        if judged is not None and (judged := about(judged, folder.resolve().name)) is None:
            raise UserError(
                f"--evaluation: {evaluation or EVALUATION} is not what `linearize eval {folder} --json` prints, alone "
                "or beside other students"
            )
        student = _student(folder)
    record, judged = public.record(record), public.record(judged)
    losses = read_lines(folder / LOSSES) if (folder / LOSSES).is_file() else []
    scores, calibration = _json(folder / SCORES), _json(folder / CALIBRATION)
    with as_written(folder):
        text = page(_title(folder, record), record, _sections(student, record, losses, scores, calibration, judged))
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"-o/--out: {target} cannot be written: {error.strerror or error}") from error
    return target


def _title(folder: Path, record: dict[str, Any]) -> str:
    whole = [*record.get("history", []), record]
    mixer = next((entry["mixer"] for entry in whole if entry.get("mixer")), None)
    name = folder.resolve().name
    return f"{name}: {mixer}" if mixer else name


def _json(path: Path, *, named: bool = False) -> dict[str, Any] | None:
    if not path.is_file():
        if named:
            raise UserError(f"--evaluation: there is no file {path}")
        return None
    return read_object(path)


def _student(folder: Path) -> list[list[str]]:
    """What the converted model is; nothing of an adapter, or of a folder that is not whole."""
    try:
        facts = gather(folder, collect(folder))
    except UserError:
        return []
    named = public.cut(facts.teacher.name or "not recorded")
    return [["", ""], *([what.replace("`", ""), str(value)] for what, value in student_rows(facts, named))]


def _sections(
    student: list[list[str]],
    record: dict[str, Any],
    losses: list[dict[str, Any]],
    scores: dict[str, Any] | None,
    calibration: dict[str, Any] | None,
    judged: dict[str, Any] | None,
) -> list[Section]:
    """What there is, in the order in which a reader asks for it."""
    found = [Section("The student", student)] if student else []
    if judged is not None:
        found.append(Section("What it cost", _evaluation_table(judged), text=_measured_on(judged)))
        if judged.get("by_position"):
            found.append(Section("Perplexity by position", picture=pictures.positions(judged["by_position"])))
        if judged.get("retrieval"):
            found.append(Section("Key-value retrieval by length", picture=pictures.retrieval(judged["retrieval"])))
        if judged.get("tasks"):
            found.append(Section("Tasks", _task_table(judged["tasks"])))
    found.append(Section("Stages", _stage_table(record)))
    for stage in dict.fromkeys(line.get("stage", "train") for line in losses):
        own = [line for line in losses if line.get("stage", "train") == stage]
        found.append(Section(f"Loss: {stage}", picture=pictures.loss(own)))
    if scores is not None:
        kept = f"{len(scores['chosen'])} key groups stay softmax, framed; measured by {scores['method']}"
        if scores["method"] == "gradient":
            kept += ". The colours are the first round's; each next round measured what is left beside those chosen"
        found.append(Section("What stays softmax", text=kept, picture=pictures.scores(scores)))
    if calibration is not None:
        text = (
            "Each layer's attention output beside the teacher's, on the teacher's own inputs and text held out of the "
            "calibration; below, the teacher's attention by layer, a point a head: its entropy, and the half-lives "
            "that follow from how far past the window it looks"
        )
        found.append(Section("Fidelity by layer", text=text, picture=pictures.fidelity(calibration)))
    return found


def _measured_on(judged: dict[str, Any]) -> str:
    names = ", ".join(Path(str(entry.get("name", ""))).name for entry in judged.get("datasets", []))
    return (
        f"On {judged.get('tokens', 0):,} tokens in sequences of {judged.get('context', '?')} ({names}). KL is from the "
        "teacher, nats a token; recall is the loss on a passage's second copy."
    )


VARIANTS = (
    ("linear_off", "linear branch off"),
    ("window_off", "window off"),
    ("window_alone", "the teacher's window and sinks alone, untrained"),
)


def _evaluation_table(judged: dict[str, Any]) -> list[list[str]]:
    names = ("kv_bytes_per_token", "state_bytes")
    costed = all(judged.get(name) is not None for name in names)

    def held(end: str) -> list[str]:
        values = [judged.get(f"{name}{end}") for name in names]
        return ["-" if value is None else size(value) for value in values] if costed else []

    rows = [["", "perplexity", "ratio", "KL", "recall", *(["KV a token", "state"] if costed else [])]]
    if judged["perplexity"].get("teacher") is not None:
        teacher = judged["perplexity"]["teacher"], 1.0, 0.0, (judged.get("recall") or {}).get("teacher")
        rows.append(["teacher", *map(_number, teacher), *held("_teacher")])
    rows.append(["student", *_figures(judged), *held("")])
    blank = [""] * len(held(""))
    rows += [[label, *_figures(judged[name]), *blank] for name, label in VARIANTS if judged.get(name)]
    return rows


def _figures(judged: dict[str, Any]) -> list[str]:
    perplexity = judged["perplexity"]
    values = (
        perplexity["student"],
        perplexity.get("ratio"),
        judged.get("kl"),
        (judged.get("recall") or {}).get("student"),
    )
    return [_number(value) for value in values]


def _task_table(tasks: dict[str, Any]) -> list[list[str]]:
    rows = [["task", "items", "teacher", "student"]]
    for name, found in tasks.items():
        cells = (found.get("items"), found.get("teacher"), found.get("student"))
        rows.append([Path(name).name, *(_number(value) for value in cells)])
    return rows


def _stage_table(record: dict[str, Any]) -> list[list[str]]:
    rows = [["stage", "tokens", "data", "when", "command"]]
    for entry in [*record.get("history", []), record]:
        tokens = entry.get("tokens")
        rows.append(
            [
                str(entry.get("stage", "")),
                f"{tokens:,}" if isinstance(tokens, int) else "",
                str(entry.get("dataset") or entry.get("calibrated_on") or ""),
                str(entry.get("time", "")),
                str(entry.get("command", "")),
            ]
        )
    return rows


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
