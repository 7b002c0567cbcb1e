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
    """Error of each layer's attention output at each step of the calibration."""
    figure, axes = _axes(7.5, 3.6)
    layers = [row["layer"] for row in found["layers"]]
    for name, label, colour in LINES:
        if found["layers"][0][name] is not None:
            axes.plot(layers, [row[name]["relative_error"] for row in found["layers"]], label=label, color=colour)
    axes.set_ylim(0, min(2.0, axes.get_ylim()[1]))
    axes.set_xlabel("layer")
    axes.set_ylabel("|student - teacher| / |teacher|")
    axes.set_title("attention output on the teacher's own inputs", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
