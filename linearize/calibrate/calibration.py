"""`calibrate`: starts of a student's mixers from what its teacher's attention does on a little text."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import UsageError, UserError
from ..modeling import LinearizeForCausalLM, branch_off
from .align import align
from .capture import Seen, attentions_of, watch
from .closed_form import start_from_batch, start_from_statistics
from .fidelity import Fidelity, fidelity
from .statistics import HeadStatistics, StatisticsOf
from .widened import widened

MOST_SEQUENCES = 64
# Rows that gains, scales and temperatures are fitted on, and rows held out for the report.
FITTED, HELD_OUT = 4, 2
# Of the alignment. The delta rule's closed forms leave it farther from the teacher's logits than its windows alone,
# though each layer's output is nearer: what it writes must be learned first (SmolLM2, 32 x 512 tokens, KL: windows
# .204, closed forms .253, aligned at 5e-3 .221, at 2e-2 .178).
LEARNING_RATE, LEARNING_RATES = 5e-3, {"gated_delta": 2e-2}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Raises UsageError, naming the flag, for a value out of range.

    `sequences` of `length` tokens; `passes` through them in the short alignment, 0 for the closed forms alone, at the
    mixer's own learning rate where none is given.
    """

    sequences: int = 64
    length: int = 1024
    batch_size: int = 8
    passes: int = 4
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not HELD_OUT < self.sequences <= MOST_SEQUENCES:
            raise UsageError(
                f"--calibrate-sequences must be from {HELD_OUT + 1} to {MOST_SEQUENCES}, got {self.sequences}"
            )
        if self.length < 16:
            raise UsageError(f"--calibrate-length must be at least 16, got {self.length}")
        if self.passes < 0:
            raise UsageError(f"--calibrate-passes must be at least 0, got {self.passes}")
        if self.batch_size < 1:
            raise UsageError(f"--calibrate-batch-size must be at least 1, got {self.batch_size}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UsageError(f"--calibrate-learning-rate must be positive, got {self.learning_rate}")


@dataclass
class LayerReport:
    """One swapped layer: how near its output was with the window alone, at the plain start, after the closed forms, and
    after the alignment; and its teacher's attention."""

    layer: int
    window_alone: Fidelity | None
    uncalibrated: Fidelity
    closed_form: Fidelity
    calibrated: Fidelity
    half_lives: list[float]
    attention: dict[str, Any]


@dataclass
class Calibration:
    """What `calibrate` reports."""

    layers: list[LayerReport]
    trace: list[float]
    tokens: int
    seconds: float
    options: CalibrateOptions

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    student: LinearizeForCausalLM, teacher: Any, rows: Tensor, options: CalibrateOptions | None = None
) -> Calibration:
    """Starts the student's mixers from `rows` [N, T] of ids, in place.

    Closed forms first (closed_form.py), then a short alignment of each layer against its teacher's attention output.
    A layer that any of it made worse on the held-out rows keeps what it had before.

    Args:
        student, teacher: as `convert` gives and takes them, on one device.
        rows: token ids; the last two are held out for the report.

    Raises:
        UserError: fewer than three rows, or no layer that is swapped.
    """
    options = options or CalibrateOptions()
    started = time.monotonic()
    attentions = attentions_of(student)
    if not attentions:
        raise UserError("--calibrate: every layer stays softmax, so there is nothing to calibrate")
    if len(rows) <= HELD_OUT:
        raise UserError(f"--calibrate: {len(rows)} sequences are too few; give text for at least {HELD_OUT + 1}")
    mixer = next(iter(attentions.values())).mixer.name
    rate = options.learning_rate or LEARNING_RATES.get(mixer, LEARNING_RATE)
    options = replace(options, learning_rate=rate)
    device = next(teacher.parameters()).device
    rows = rows.to(device)
    used, held = rows[:-HELD_OUT], [rows[-HELD_OUT:]]
    batches = list(used.split(options.batch_size))

    own = [parameter for attention in attentions.values() for parameter in attention.mixer.parameters()]
    with widened(teacher, student, trained=own):
        reports, alone, found, trace = _calibrated(student, teacher, attentions, batches, held, options)
    student.eval()
    layers = [
        LayerReport(
            layer=layer,
            window_alone=None if alone is None else alone[layer],
            **{name: report[layer] for name, report in reports.items()},
            half_lives=[round(x, 2) for x in found[layer].half_lives().tolist()],
            attention=found[layer].to_dict(),
        )
        for layer in attentions
    ]
    return Calibration(layers, trace, used.numel(), round(time.monotonic() - started, 1), options)


def _calibrated(
    student: Any,
    teacher: Any,
    attentions: dict[int, Any],
    batches: list[Tensor],
    held: list[Tensor],
    options: CalibrateOptions,
) -> tuple[dict[str, dict[int, Fidelity]], dict[int, Fidelity] | None, dict[int, HeadStatistics], list[float]]:
    """The fidelity of each step and of the windows alone, the teacher's statistics, and the alignment's losses."""
    fitted, rate = torch.cat(batches)[:FITTED], options.learning_rate or LEARNING_RATE
    reports = {"uncalibrated": fidelity(student, teacher, held)}
    alone: dict[int, Fidelity] | None = None
    if all(attention.mixer.window for attention in attentions.values()):
        with branch_off(student, "linear"):
            alone = fidelity(student, teacher, held)
    found = _statistics(teacher, attentions, batches)
    before = _parameters(attentions)
    for layer, attention in attentions.items():
        start_from_statistics(attention, found[layer])
    watch(teacher, attentions, fitted, lambda layer, seen: start_from_batch(attentions[layer], seen))
    reports["closed_form"] = fidelity(student, teacher, held)
    best = _keep_better(attentions, before, reports["uncalibrated"], reports["closed_form"])
    before = _parameters(attentions)
    trace = align(student, teacher, batches, passes=options.passes, learning_rate=rate)
    reports["calibrated"] = _keep_better(attentions, before, best, fidelity(student, teacher, held))
    return reports, alone, found, trace


def _statistics(teacher: Any, attentions: dict[int, Any], batches: list[Tensor]) -> dict[int, HeadStatistics]:
    sums = {
        layer: StatisticsOf(attention.anatomy, attention.mixer.window, attention.mixer.sinks)
        for layer, attention in attentions.items()
    }

    def add(layer: int, seen: Seen) -> None:
        sums[layer].add(seen)

    for ids in logging.tqdm(batches, desc="calibrating"):
        watch(teacher, attentions, ids, add)
    return {layer: total.found() for layer, total in sums.items()}


def _parameters(attentions: dict[int, Any]) -> dict[int, dict[str, Tensor]]:
    return {
        layer: {name: tensor.detach().clone() for name, tensor in attention.mixer.state_dict().items()}
        for layer, attention in attentions.items()
    }


@torch.no_grad()
def _keep_better(
    attentions: dict[int, Any],
    before: dict[int, dict[str, Tensor]],
    old: dict[int, Fidelity],
    new: dict[int, Fidelity],
) -> dict[int, Fidelity]:
    """Puts a layer's parameters back where its error grew, or is no number; the fidelity of what each has then."""
    kept = dict(new)
    for layer, attention in attentions.items():
        if not new[layer].relative_error <= old[layer].relative_error:
            attention.mixer.load_state_dict(before[layer])
            kept[layer] = old[layer]
    return kept
