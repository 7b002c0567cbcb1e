"""The pictures of the benchmarks, drawn from their JSON: also `python -m linearize.bench.figures OUT/kernels.json`.

matplotlib is needed for these alone, and is imported here alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .record import read

Results = Mapping[str, Any]

# Colours that people with any colour vision tell apart (Okabe and Ito), ours first.
COLOURS = {
    "linearize": "#D55E00",
    "fla": "#0072B2",
    "fla-parallel": "#56B4E9",
    "mamba_ssm": "#009E73",
    "sdpa-cudnn": "#555555",
    "sdpa-flash": "#AAAAAA",
    "teacher": "#555555",
    "student": "#D55E00",
}
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def draw(results: Results, path: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """Writes the picture of `results` to `path`. Without matplotlib it says how to get it, and gives None."""
    try:
        import matplotlib.figure  # noqa: F401  (no window system is asked for: a Figure saves itself)
    except ImportError:
        if say is not None:
            say(
                "no picture, matplotlib is not installed: pip install 'linearize[bench]', then "
                f"python -m linearize.bench.figures {path.with_suffix('.json')}"
            )
        return None
    figure = _models(results) if "overtakes" in results else _kernels(results)
    if figure is None:
        return None
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def _kernels(results: Results) -> Any:
    """A column an operation, softmax in every one: time forward, forward and backward, and peak memory."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    ops = [op for op in dict.fromkeys(row["op"] for row in rows) if op != "softmax"] or ["softmax"]
    measures = [
        ("forward_ms", "forward, ms"),
        ("forward_backward_ms", "forward + backward, ms"),
        ("forward_backward_peak_gib", "peak above inputs, GiB\n(forward + backward)"),
    ]
    measures = [(key, label) for key, label in measures if any(row[key] is not None for row in rows)]
    if not rows or not measures:
        return None
    figure = Figure(figsize=(2.7 * len(ops) + 0.6, 2.5 * len(measures) + 0.9), layout="constrained")
    axes = figure.subplots(len(measures), len(ops), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for column, op in enumerate(ops):
        shown = [row for row in rows if row["op"] in (op, "softmax")]
        for line, (key, label) in enumerate(measures):
            axis = axes[line][column]
            for provider in dict.fromkeys(row["provider"] for row in shown):
                mine = provider == "linearize"
                drawn = _line(
                    axis,
                    [row for row in shown if row["provider"] == provider],
                    "tokens",
                    key,
                    color=COLOURS.get(provider),
                    linewidth=2.2 if mine else 1.3,
                    linestyle="--" if provider.startswith("sdpa") else "-",
                    marker="o",
                    markersize=4 if mine else 3,
                    zorder=3 if mine else 2,
                )
                if drawn is not None:
                    handles.setdefault(provider, drawn)
            if key.endswith("_ms"):
                floors = [row for row in shown if row["op"] == op and row["provider"] == "linearize"]
                floor = key.replace("_ms", "_floor_ms")
                drawn = _line(axis, floors, "tokens", floor, color="black", linewidth=0.9, linestyle=":")
                if drawn is not None:
                    handles.setdefault("HBM floor", drawn)
            _dress(axis, title=op if line == 0 else None, label=label if column == 0 else None)
            if line == len(measures) - 1:
                axis.set_xlabel("tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"{results['hardware']}, {results['dtype']}, batch {results['batch']}, {results['heads']} heads of "
        f"{results['head_dim']}",
        fontsize=10,
    )
    return figure


def _models(results: Results) -> Any:
    """Decoding, prefill and cache over context, a line a model and batch."""
    from matplotlib.figure import Figure

    rows = [row | {"cache_gib": _cache_gib(row)} for row in results["rows"]]
    measures = [
        ("decode_ms", "decoding, ms a token"),
        ("prefill_tokens_per_second", "prefill, tokens a second"),
        ("cache_gib", "state + KV, GiB"),
    ]
    measures = [(key, label) for key, label in measures if any(row[key] is not None for row in rows)]
    if not measures:
        return None
    figure = Figure(figsize=(3.9 * len(measures), 3.7), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (key, label) in zip(axes, measures, strict=True):
        for index, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
            for model in ("teacher", "student"):
                drawn = _line(
                    axis,
                    [row for row in rows if (row["batch"], row["model"]) == (batch, model)],
                    "context",
                    key,
                    color=COLOURS[model],
                    linestyle=STYLES[index % len(STYLES)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4,
                )
                if drawn is not None:
                    handles.setdefault(f"{model}, batch {batch}", drawn)
        _dress(axis, title=label)
        axis.set_xlabel("context, tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    # of a folder its name alone: a picture is shown to others
    student, teacher = (results[name].rstrip("/").rpartition("/")[2] for name in ("student", "teacher"))
    figure.suptitle(f"{student} against {teacher}; {results['hardware']}, {results['dtype']}", fontsize=10)
    return figure


def _cache_gib(row: Mapping[str, Any]) -> float | None:
    return None if row["state_bytes"] is None else (row["state_bytes"] + row["kv_bytes"]) / 2**30


def _line(axis: Any, rows: list[dict[str, Any]], across: str, key: str, **style: Any) -> Any:
    points = sorted((row[across], row[key]) for row in rows if row[key])
    return axis.plot(*zip(*points, strict=True), **style)[0] if points else None


def _dress(axis: Any, *, title: str | None = None, label: str | None = None) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if title:
        axis.set_title(title, fontsize=10)
    if label:
        axis.set_ylabel(label, fontsize=9)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        print(draw(read(file), file.with_suffix(".png"), lambda text: print(text, file=sys.stderr)))
