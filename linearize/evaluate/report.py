"""From sums to the figures of a result: perplexities, KL and recall, of the student or of one of its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .scoring import Sums
from .variants import STUDENT, TEACHER

Copies = tuple[Sums, Sums]


def report(name: str, teacher: str | None, sums: Sequence[Sums], copies: Copies | None) -> dict[str, Any]:
    """Perplexity, KL and recall of `name` beside the teacher's. `copies` are the sums over the first and over the
    second copies of the repeated passages."""
    recall = [
        {
            role: copy.mean_nll(key) if copy is not None and key is not None else None
            for role, key in ((STUDENT, name), (TEACHER, teacher))
        }
        for copy in (copies or (None, None))
    ]
    return {**figures(name, teacher, sums), "recall": {**recall[1], "first_copy": recall[0]}}


def figures(name: str, teacher: str | None, sums: Sequence[Sums]) -> dict[str, Any]:
    """Perplexities (their geometric means over data sets) and KL (the mean over tokens).

    Raises:
        UserError: a loss is not finite.
    """
    logs = {key: _mean_log(sums, key) for key in (name, teacher) if key is not None}
    for key, log in logs.items():
        if not math.isfinite(log):
            whose = "teacher" if key == TEACHER else "student" if key == STUDENT else f"student ({key})"
            raise UserError(
                f"the loss of the {whose} is {log}: its weights are broken, or its dtype overflows; try --dtype float32"
            )
    against = None if teacher is None else logs[teacher]
    return {
        "perplexity": {
            "student": math.exp(logs[name]),
            "teacher": None if against is None else math.exp(against),
            "ratio": None if against is None else math.exp(logs[name] - against),
        },
        "kl": None if teacher is None else sum(part.kl[name] for part in sums) / sum(p.positions for p in sums),
    }


def _mean_log(sums: Sequence[Sums], name: str) -> float:
    return sum(part.mean_nll(name) for part in sums) / len(sums)
