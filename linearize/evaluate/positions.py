"""Loss by position: what a model gains, or no longer gains, from a longer past."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .scoring import Sums
from .variants import STUDENT, TEACHER

FIRST = 64


def buckets(context: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions: 0 to 64, then each as long as all before it, the last cut at `context`."""
    edges = [0, FIRST]
    while edges[-1] < context:
        edges.append(2 * edges[-1])
    return [(low, min(high, context)) for low, high in pairwise(edges) if low < context]


def by_position(sums: Sequence[Sums], context: int, *, teacher: bool) -> list[dict[str, Any]]:
    """Mean loss, nats a token, of the tokens in each bucket, over all data sets together.

    A token's position is the number of tokens before it in its sequence; the first of a sequence is not predicted, so
    the first bucket has one position less.
    """
    rows = sum(part.rows for part in sums)
    found = []
    for low, high in buckets(context):
        low_target = max(low, 1)
        count = rows * (high - low_target)
        if not count:
            continue
        means = {
            role: float(sum(part.places[role][low_target:high].sum() for part in sums)) / count
            for role in (STUDENT, *((TEACHER,) if teacher else ()))
        }
        found.append({"from": low, "to": high, STUDENT: means[STUDENT], TEACHER: means.get(TEACHER)})
    return found
