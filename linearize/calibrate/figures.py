"""The pictures of what was measured before training, drawn from its JSON; without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINES = (
    ("window_alone", "window and sinks alone", "#555555"),
    ("uncalibrated", "start from the weights", "#0072B2"),
    ("closed_form", "closed forms", "#009E73"),
    ("calibrated", "calibrated", "#D55E00"),
)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # no window system is asked for: a Figure saves itself
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def draw_scores(found: Mapping[str, Any], path: Path) -> bool:
    """The map of scores over layers and key groups, what was kept framed. False without matplotlib."""
    scores = found["scores"]
    layers, groups = len(scores), len(scores[0])
    figure = _figure(max(6.0, 0.22 * layers + 2), max(2.2, 0.35 * groups + 1.4))
    if figure is None:
        return False
    axes = figure.subplots()
    columns = [[row[group] for row in scores] for group in range(groups)]
    image = axes.imshow(columns, aspect="auto", cmap="viridis", origin="lower")
    for layer, group in found["chosen"]:
        axes.plot(layer, group, marker="s", markersize=8, markerfacecolor="none", markeredgecolor="#D55E00", mew=1.6)
    axes.set_xlabel("layer")
    axes.set_ylabel("key group")
    axes.set_yticks(range(groups))
    unit = "nats of KL" if found["method"] == "gradient" else "attention"
    axes.set_title(f"what stays softmax, by {found['method']} ({unit})", fontsize=10)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=130)
    return True


def draw_calibration(found: Mapping[str, Any], path: Path) -> bool:
    """Error of each layer's attention output at each step of the calibration. False without matplotlib."""
    figure = _figure(7.5, 3.6)
    if figure is None:
        return False
    axes = figure.subplots()
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
    figure.savefig(path, dpi=130)
    return True
