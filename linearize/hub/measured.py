"""What was measured about a converted model and lies in its folder, as plain data by file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..json_files import Row, read_lines, read_object

LOSSES, SCORES, CALIBRATION = "loss.jsonl", "keep_scores.json", "calibration.json"
# Where `bench -o OUT` or `bench -o OUT/speed` leaves its results.
BENCH_FOLDERS = ("", "speed/", "bench/")
_EVALUATION = re.compile(r"eval[\w.-]*\.json")
_BENCH = {"model.json": "model_benches", "kernels.json": "kernel_benches"}


@dataclass
class Measured:
    """`evaluations`, `model_benches` and `kernel_benches` by file; `refused` has files of such a name that hold
    something else, and why."""

    evaluations: dict[str, Row] = field(default_factory=dict)
    model_benches: dict[str, Row] = field(default_factory=dict)
    kernel_benches: dict[str, Row] = field(default_factory=dict)
    losses: list[Row] = field(default_factory=list)
    scores: Row | None = None
    calibration: Row | None = None
    files: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def read(name: str, there: Mapping[str, Path]) -> Measured:
    """Reads what the files `there` (path in the folder -> file) tell of the folder called `name`.

    Raises:
        UserError: a file that is no JSON.
    """
    found = Measured()
    for path in sorted(there):
        if path == LOSSES:
            found.losses = read_lines(there[path])
        elif path == SCORES:
            found.scores = read_object(there[path])
        elif path == CALIBRATION:
            found.calibration = read_object(there[path])
        elif _EVALUATION.fullmatch(path):
            judged = about(read_object(there[path]), name)
            if judged is None:
                found.refused[path] = "not what `linearize eval` printed about this folder"
                continue
            found.evaluations[path] = judged
        elif _bench(path):
            results = read_object(there[path])
            if not _is_bench(results, path):
                found.refused[path] = "not what `linearize bench` writes"
                continue
            timed = str(results.get("student") or "")
            # random weights of a config's shapes have a mixer and its window for a name
            if path.endswith("model.json") and " (" not in timed and Path(timed).name not in ("", name):
                found.refused[path] = f"the timing of another student, {Path(timed).name}"
                continue
            getattr(found, _BENCH[path.rpartition("/")[2]])[path] = results
        else:
            continue
        found.files.append(path)
        picture = f"{path.rpartition('.')[0]}.png"
        if picture in there:
            found.pictures.append(picture)
    return found


def _bench(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return name in _BENCH and (f"{folder}/" if folder else "") in BENCH_FOLDERS


def _is_bench(results: Row, path: str) -> bool:
    known = ("rows", "hardware", "dtype", "versions")
    own = ("overtakes", "student", "teacher") if path.endswith("model.json") else ("decode", "cold_start", "heads")
    return all(name in results for name in (*known, *own)) and isinstance(results["rows"], list)


def about(results: Row, name: str) -> Row | None:
    """What `eval --json` printed about the folder called `name`, alone or beside others; None for something else."""
    students = results.get("students")
    if isinstance(students, dict):
        own = [judged for student, judged in students.items() if Path(student).name == name]
        results = own[0] if len(own) == 1 else {}
    perplexity, recall = results.get("perplexity"), results.get("recall")
    whole = isinstance(perplexity, dict) and isinstance(perplexity.get("student"), int | float)
    return results if whole and isinstance(recall, dict) and "kl" in results else None
