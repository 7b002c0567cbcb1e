"""`convert`: the surgery, with what stays softmax and where the mixers start from measured on a little text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import PASSAGE, CalibrateOptions, calibrate, measure, passages_on, sequences
from ..errors import UsageError
from ..modeling import LinearizeForCausalLM
from ..quantised import dense
from ..room import check_room, room_of
from ..source import load_model, load_tokenizer
from ..surgery.anatomy import read_anatomy
from ..surgery.keep import as_many, parse_auto
from ..surgery.student import DEFAULT_SINKS, DEFAULT_WINDOW, calibrated_options, student_config
from ..surgery.swap import check_whole, swap
from .given import source_of


def convert(
    model: PreTrainedModel | str | Path,
    to: str = "based",
    *,
    keep_softmax: str | Sequence[int] | None = None,
    keep_window: int | None = None,
    window: int | None = None,
    sinks: int | None = None,
    mixer_options: dict[str, Any] | None = None,
    calibrate_on: str | Tensor | None = None,
    calibrate_options: CalibrateOptions | None = None,
    keep_score: str = "gradient",
    tokenizer: Any = None,
    text_field: str = "text",
    share_memory: bool = False,
    seed: int = 0,
) -> LinearizeForCausalLM:
    """Swaps a model's softmax attention for `to`; the argument itself stays as it is.

    Args:
        model: a loaded transformers model, a Hub id or a folder.
        to: a mixer, see `linearize.mixers()`.
        keep_softmax: layers or heads left softmax: a list of layers, or the text of `--keep-softmax`. `auto:5` and
            `heads:auto:10%` choose by scores measured here, which the student has as `.keep_scores`.
        keep_window: keys that the kept heads see, so that their cache is bounded too; None for everything.
        window: keys of exact softmax beside the linear branch; 64 by default, 0 for none.
        sinks: first tokens that stay visible; 1 by default with a window.
        mixer_options: further options of the mixer, such as `feature_map`.
        calibrate_on: a DATASET, or rows of token ids [N, T]: the mixers start from what the teacher's attention does
            there, and the student has the report as `.calibration`. Scores are measured there too, or without it on the
            embedded text.
        tokenizer: of a loaded model, where text is to be read; a Hub id or a folder has its own.
        share_memory: let the student hold the teacher's own tensors. It halves the memory, and training the student
            then changes the teacher.
        seed: for the few starts that are random, and the order of the text.

    Returns:
        The student, in the teacher's dtype and on its device, in eval mode.

    Raises:
        UserError, UsageError: the model cannot be converted, an option is out of range, text is missing or too short;
            nothing was changed.
    """
    if not isinstance(model, PreTrainedModel):
        source = source_of(model)
        if tokenizer is None and _reads_text(keep_softmax, calibrate_on):
            tokenizer = load_tokenizer(source)
        model, share_memory = dense(load_model(source), own=True), True
    else:
        check_whole(model)
        model = dense(model)
    options = calibrate_options or CalibrateOptions(seed=seed)
    if calibrate_on is not None:
        mixer_options = calibrated_options(to, mixer_options)
    settings: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "mixer_options": mixer_options,
        "keep_window": keep_window,
    }
    anatomies = read_anatomy(model)
    wanted = parse_auto(keep_softmax, anatomies, keep_window)
    known = keep_softmax if wanted is None else as_many(wanted, anatomies)
    student_config(model, to, keep_softmax=known, **settings)  # refuses before it measures

    reading: dict[str, Any] = {"seed": options.seed, "text_field": text_field, "vocab_size": model.config.vocab_size}

    def text(count: int, length: int) -> Tensor:
        return sequences(calibrate_on, tokenizer, count=count, length=length, **reading)

    passages = None if wanted is None else text(passages_on(model.device), PASSAGE)
    rows = None if calibrate_on is None else text(options.sequences, options.length)
    _check_room(room_of(model), keep_softmax, passages, rows)
    scores = None
    if wanted is not None and passages is not None:
        near = window or DEFAULT_WINDOW
        scores = measure(
            model, passages, wanted, window=near, sinks=DEFAULT_SINKS if sinks is None else sinks, method=keep_score
        )
        scores.text = calibrate_on if isinstance(calibrate_on, str) else "embedded" if calibrate_on is None else None
        keep_softmax = scores.keep_softmax
    student = swap(model, to, keep_softmax=keep_softmax, share_memory=share_memory, seed=seed, **settings)
    student.keep_scores = scores
    student.calibration = None
    if rows is not None:
        if not student.mixer_layers():
            raise UsageError("--calibrate: every layer stays softmax, so there is nothing to calibrate")
        student.calibration = calibrate(student, model, rows, options)
    return student


def _reads_text(keep_softmax: str | Sequence[int] | None, calibrate_on: str | Tensor | None) -> bool:
    if calibrate_on is None:
        return isinstance(keep_softmax, str) and "auto" in keep_softmax
    return not isinstance(calibrate_on, Tensor)


def _check_room(room: int | None, keep: Any, passages: Tensor | None, rows: Tensor | None) -> None:
    if room is None:
        return
    if passages is not None:
        what = f"--keep-softmax {keep}, measured on passages shown twice,"
        check_room(room, what, 2 * passages.shape[1], "name layers or heads")
    if rows is not None:
        check_room(room, f"--calibrate-length {rows.shape[1]}", rows.shape[1], f"give at most {room}")
