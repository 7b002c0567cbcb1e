"""The card's pictures of losses and evaluations, drawn from the figures that go up beside them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .measured import Measured

FOLDER = "pictures/"


def available() -> bool:
    """Whether matplotlib is there to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def drawn(measured: Measured) -> dict[str, bytes]:
    """PNGs by their path in the repository; none where matplotlib is missing. What cannot be drawn is left out."""
    if not available():
        return {}
    return {name: png for name, figure in _figures(measured) if (png := _png(figure)) is not None}


def evaluation_pictures(path: str) -> dict[str, str]:
    """The pictures that an evaluation's file `path` may have, and their captions."""
    stem = path.removesuffix(".json")
    return {
        f"{FOLDER}{stem}-positions.png": "Mean loss, nats a token, by how many tokens came before.",
        f"{FOLDER}{stem}-retrieval.png": "Share of facts that are found again, by length of the context.",
    }


def loss_picture(stage: str) -> str:
    """The picture of a stage's loss."""
    return f"{FOLDER}loss-{re.sub(r'[^A-Za-z0-9_-]+', '-', stage)}.png"


def _figures(measured: Measured) -> Iterator[tuple[str, Callable[[], Any]]]:
    from ..report import pictures

    for path, judged in measured.evaluations.items():
        positions, retrieval = evaluation_pictures(path)
        if len(judged.get("by_position") or ()) > 1:
            yield positions, partial(pictures.positions_figure, judged["by_position"])
        found = [row for row in judged.get("retrieval") or () if row.get("student") is not None]
        if len(found) > 1:
            yield retrieval, partial(pictures.retrieval_figure, found)
    for stage in dict.fromkeys(line.get("stage") for line in measured.losses):
        lines = [line for line in measured.losses if line.get("stage") == stage]
        if isinstance(stage, str) and len(lines) > 1:
            yield loss_picture(stage), partial(pictures.loss_figure, lines)


def _png(figure: Callable[[], Any]) -> bytes | None:
    buffer = io.BytesIO()
    try:
        figure().savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    except (KeyError, TypeError, ValueError):  # figures that someone changed by hand
        return None
    return buffer.getvalue()
