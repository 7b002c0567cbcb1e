"""The pictures of what was measured before training, drawn from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]

LINES = (
    ("window_alone", "window and sinks alone", "#555555"),
    ("uncalibrated", "start from the weights", "#0072B2"),
    ("closed_form", "closed forms", "#009E73"),
    ("calibrated", "calibrated", "#D55E00"),
)


def save(figure_of: Callable[[Found], Any], found: Found, path: Path) -> bool:
    """Writes the figure to `path`; False where matplotlib is missing, and there is no picture."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    figure_of(found).savefig(path, dpi=130)
    return True


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no window system is asked for: a Figure saves itself

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def scores_figure(found: Found) -> Any:
    """The map of scores over layers and key groups, what was kept framed."""
    scores = found["scores"]
    layers, groups = len(scores), len(scores[0])
    figure, axes = _axes(max(6.0, 0.22 * layers + 2), max(2.2, 0.35 * groups + 1.4))
    columns = [[float("nan") if row[group] is None else row[group] for row in scores] for group in range(groups)]
    image = axes.imshow(columns, aspect="auto", cmap="viridis", origin="lower")
    for layer, group in found["chosen"]:
        axes.plot(layer, group, marker="s", markersize=8, markerfacecolor="none", markeredgecolor="#D55E00", mew=1.6)
    axes.set_xlabel("layer")
    axes.set_ylabel("key group")
    axes.set_yticks(range(groups))
    unit = "nats of KL" if found["method"] == "gradient" else "attention"
    axes.set_title(f"what stays softmax, by {found['method']} ({unit})", fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def calibration_figure(found: Found) -> Any:
    """By layer: error and cosine of the attention output at each step of the calibration; of the teacher's attention
    each head's entropy, and the half-lives of what it reads past the window."""
    from matplotlib.figure import Figure

    rows = found["layers"]
    layers = [row["layer"] for row in rows]
    heads = [
        ("entropy, nats", [(row.get("attention") or {}).get("entropy") or [] for row in rows]),
        ("half-life, tokens", [row.get("half_lives") or [] for row in rows]),
    ]
    measured = any(values for _, points in heads for values in points)
    figure = Figure(figsize=(9, 6.4 if measured else 3.4), layout="constrained")
    panels = figure.subplots(2 if measured else 1, 2, sharex=True, squeeze=False)
    error, cosine = panels[0]
    for name, label, colour in LINES:
        if rows[0][name] is not None:
            error.plot(layers, [row[name]["relative_error"] for row in rows], label=label, color=colour)
            cosine.plot(layers, [row[name]["cosine"] for row in rows], label=label, color=colour)
    error.set_ylim(0, min(2.0, error.get_ylim()[1]))
    error.set_ylabel("|student - teacher| / |teacher|")
    error.legend(fontsize=8)
    cosine.set_ylim(top=1.0)
    cosine.set_ylabel("cosine")
    for axes, (label, points) in zip(panels[-1] if measured else (), heads, strict=bool(measured)):
        for layer, values in zip(layers, points, strict=True):
            axes.plot([layer] * len(values), values, ".", color="#555555", markersize=4)
        axes.set_ylabel(f"teacher's {label}")
    if measured:
        panels[-1][1].set_yscale("log")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    figure.suptitle("attention output on the teacher's own inputs, and the teacher's attention", fontsize=10)
    return figure
