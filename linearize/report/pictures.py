"""The report's pictures as SVG texts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..calibrate.figures import calibration_figure, scores_figure
from ..errors import UserError

STUDENT, TEACHER = "#D55E00", "#555555"
Row = Mapping[str, Any]


def require() -> None:
    """Raises UserError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("the report's pictures need matplotlib: pip install 'linearize[bench]'") from error


def _axes(width: float = 7.5, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no window system is asked for: a Figure saves itself

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "linearize", "svg.fonttype": "none"}):  # the same figure, the same text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_figure(lines: Sequence[Row]) -> Any:
    """Loss over tokens of one stage, and its parts where it has any."""
    figure, axes = _axes()
    parts = [name for name in ("loss", "kl", "ce") if any(isinstance(line.get(name), int | float) for line in lines)]
    for name in parts:
        points = [(line["tokens"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        axes.plot(*zip(*points, strict=True), label=name, color=STUDENT if name == "loss" else None)
    if all(line["loss"] > 0 for line in lines):
        axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss")
    if len(parts) > 1:
        axes.legend(fontsize=8)
    return figure


def positions_figure(rows: Sequence[Row]) -> Any:
    """Mean next-token loss by position in the sequence."""
    figure, axes = _axes()
    labels = [f"{row['from']}-{row['to']}" for row in rows]
    for role, colour in (("teacher", TEACHER), ("student", STUDENT)):
        values = [row.get(role) for row in rows]
        if all(value is not None for value in values):
            axes.plot(labels, values, marker="o", label=role, color=colour)
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("loss, nats")
    axes.legend(fontsize=8)
    return figure


def retrieval_figure(rows: Sequence[Row]) -> Any:
    """Share of keys whose value is found, by context length."""
    figure, axes = _axes()
    for role, colour in (("teacher", TEACHER), ("student", STUDENT)):
        points = [(str(row["context"]), row[role]) for row in rows if row.get(role) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=role, color=colour)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("found")
    axes.legend(fontsize=8)
    return figure


def loss(lines: Sequence[Row]) -> str:
    """`loss_figure`, drawn."""
    return _svg(loss_figure(lines))


def positions(rows: Sequence[Row]) -> str:
    """`positions_figure`, drawn."""
    return _svg(positions_figure(rows))


def retrieval(rows: Sequence[Row]) -> str:
    """`retrieval_figure`, drawn."""
    return _svg(retrieval_figure(rows))


def scores(found: Row) -> str:
    """The map of what stays softmax."""
    return _svg(scores_figure(found))


def fidelity(found: Row) -> str:
    """Error of each layer's attention output."""
    return _svg(calibration_figure(found))
