"""`--tasks`: each for student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..room import room_of
from .answers import contained, likeliest
from .harness import run_harness
from .scoring import Scorer
from .task_files import ANSWERS, CHOICES, HARNESS, Task
from .variants import STUDENT, TEACHER

# Gives a figure by its key: computes it, or knows it already.
Known = Callable[[tuple[Any, ...], Callable[[], Any]], Any]


def run_tasks(
    models: Mapping[str, Any],
    scorers: Mapping[str, Scorer],
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    items: int,
    batch_size: int,
    known: Known,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores by task, as plain data: `student`, `teacher` (None without one), `items` and `kind`; `normalised` with the
    same two where scores by length exist.

    Args:
        models: the student, and the teacher where there is one, by role; `scorers` are theirs.
        known: asked for the teacher's figures, which several students share.
    """
    return {task.name: _run(models, scorers, tokenizer, task, items, batch_size, known, progress) for task in tasks}


def _run(
    models: Mapping[str, Any],
    scorers: Mapping[str, Scorer],
    tokenizer: Any,
    task: Task,
    items: int,
    batch_size: int,
    known: Known,
    progress: bool,
) -> dict[str, Any]:
    def score(role: str) -> dict[str, Any]:
        if task.kind == HARNESS:
            return run_harness(models[role], tokenizer, task.name, items, batch_size, task.file)
        count = len(task.rows) if task.kind == ANSWERS else sum(len(row["choices"]) for row in task.rows)
        with tqdm(total=count, desc=f"{task.name}, {role}", disable=not progress) as bar:
            if task.kind == CHOICES:
                return likeliest(scorers[role], tokenizer, task.rows, batch_size, bar, room_of(models[role]))
            return contained(models[role], tokenizer, task.rows, batch_size, bar)

    own = score(STUDENT)
    teacher = known(("task", task.name), lambda: score(TEACHER)) if TEACHER in models else None
    result = {
        STUDENT: own["score"],
        TEACHER: None if teacher is None else teacher["score"],
        "items": own.get("items", len(task.rows)),
        "kind": task.kind,
    }
    if "metric" in own:
        result["metric"] = own["metric"]
    if "normalised" in own:
        result["normalised"] = {
            STUDENT: own["normalised"],
            TEACHER: None if teacher is None else teacher["normalised"],
        }
    return result
