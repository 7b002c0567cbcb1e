"""Several students side by side: one teacher, held throughout, and one student at a time."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import provenance
from ..errors import UsageError
from ..rows import TextSource
from ..source import ModelSource, load_model, load_tokenizer
from .evaluation import evaluate
from .retrieval import parse_contexts
from .table import teacher_costs
from .task_files import read_tasks


def evaluate_each(
    students: Sequence[ModelSource],
    teacher: ModelSource | None = None,
    *,
    dataset: Sequence[str] = (),
    dtype: str = "auto",
    device: str | None = None,
    tasks: str = "",
    task_items: int = 300,
    retrieval_contexts: str = "",
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """What `evaluate` gives for each student, by its name as given; its own tokenizer reads the text.

    Files and numbers are looked at before a model is loaded. The teacher is loaded once, and what is generated or
    retrieved with it is done once. A student is freed before the next is loaded.

    Raises:
        UserError, UsageError: as `evaluate` and `source.load_model`; a student is given twice.
    """
    names = [source.label for source in students]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"MODEL {name} is given twice")
    for spec in dataset:
        TextSource.parse(spec)
    contexts, read = parse_contexts(retrieval_contexts), read_tasks(tasks, task_items)
    reference: Any = None
    results: dict[str, dict[str, Any]] = {}
    figures: dict[Any, Any] = {}
    for source in students:
        student = load_model(source, dtype=dtype, device=device or "cpu")
        if teacher is not None:
            provenance.warn_of_another_teacher(source, teacher)
        if teacher is not None and reference is None:
            reference = load_model(teacher, dtype=dtype, device=device or "cpu")
        results[source.label] = evaluate(
            student,
            reference,
            tokenizer=load_tokenizer(source),
            dataset=list(dataset) or None,
            device=device,
            tasks=read,
            task_items=task_items,
            retrieval_contexts=contexts,
            teacher_figures=figures,
            **options,
        )
        del student
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def side_by_side(results: Mapping[str, Mapping[str, Any]], teacher: str | None) -> dict[str, Any]:
    """The JSON of several results: `students` by name, and the teacher's own figures, None without one."""
    if teacher is None:
        return {"students": dict(results), "teacher": None}
    first = next(iter(results.values()))
    held = {key: value for key, value in teacher_costs(results).items() if key != "context"}
    return {
        "students": dict(results),
        "teacher": {
            "name": teacher,
            "perplexity": first["perplexity"]["teacher"],
            "recall": first["recall"]["teacher"],
            "by_position": [_own(entry) for entry in first["by_position"]],
            "retrieval": [_own(entry) for entry in first["retrieval"]],
            "tasks": {name: _own(task) for name, task in first["tasks"].items()},
            **held,
        },
    }


def _own(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("student", "normalised")}
