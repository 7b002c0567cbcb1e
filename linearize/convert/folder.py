"""Conversion from a model anywhere to a folder that transformers loads: what the `convert` verb does."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from .. import provenance
from ..calibrate import CalibrateOptions
from ..calibrate.figures import calibration_figure, save, scores_figure
from ..data import TextSource
from ..device import chosen_device
from ..errors import UsageError
from ..modeling import SOFTMAX
from ..output import check_new, new_folder, resumed_folder
from ..paths import expanded
from ..quantised import dense
from ..source import (
    ModelSource,
    commit_of,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
    read_for,
    weights_folder,
)
from ..surgery.student import calibrated_options, check_mixer
from .calibrated import convert
from .origins import NotPlain
from .plan import Plan, describe, plan
from .stream import streamed, write_model, write_student

_SIZE = re.compile(r"0*[1-9]\d*(\.\d+)?[KMGT]B", re.IGNORECASE)


def convert_folder(
    source: ModelSource,
    to: str,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    seed: int = 0,
    dry_run: bool = False,
    calibrate_on: str | None = None,
    calibrate_options: CalibrateOptions | None = None,
    keep_score: str = "gradient",
    text_field: str = "text",
    command: list[str] | str = "linearize.convert",
    **options: Any,
) -> Plan:
    """Converts `source` into the folder `out`: weights, config, code, tokenizer, generation config, provenance.

    Everything that can be refused is, before the weights are read.

    Args:
        source: the teacher.
        to, options: as in `convert`; what was measured is written too, `keep_scores.json` and `calibration.json`.
        out: a folder that is not there yet, or is to be replaced with `overwrite`.
        device: where it is done, by default the CPU; the accelerator that is there for what measures the teacher.
        dry_run: check the same, read no weights, and write nothing.

    Returns:
        What was made, as `plan` tells it.

    Raises:
        UserError, UsageError: the model cannot be converted, an option is out of range, `out` exists, a full disk.
    """
    check_mixer(to)
    texts = () if calibrate_on is None else TextSource.parse(calibrate_on, "--calibrate").files
    path = check_new(out, overwrite=overwrite, reads=(*read_for(source), *texts))
    if not _SIZE.fullmatch(max_shard_size):
        raise UsageError(f"--max-shard-size: {max_shard_size!r} is no size; give one such as 5GB or 500MB")
    chosen, place = parse_dtype(dtype), parse_device(device or "cpu")
    config = load_config(source)
    if isinstance(chosen, torch.dtype):
        config.dtype = chosen
    if calibrate_on is not None:
        options["mixer_options"] = calibrated_options(to, options.get("mixer_options"))
    planned = plan(config, to, **options)
    if calibrate_on is not None and not planned.swapped:
        raise UsageError("--calibrate: every layer stays softmax, so there is nothing to calibrate")
    if dry_run:
        return planned
    began = time.monotonic()
    tokenizer = load_tokenizer(source)
    measured = calibrate_on is not None or planned.placeholder is not None
    if measured and device is None:
        place = parse_device(chosen_device(None))

    def record(folder: Path, made: Plan, commit: str | None, tokens: int = 0) -> None:
        found = provenance.record(
            command=command,
            stage="convert",
            parent=source.model if source.gguf_file is None else str(Path(source.model) / source.gguf_file),
            teacher=source.describe() | ({} if commit is None else {"commit": commit}),
            mixer=to,
            mixer_options=made.mixer_options,
            softmax_layers=[layer.index for layer in made.layers if layer.index >= 0 and layer.mixer == SOFTMAX],
            softmax_heads={layer.index: layer.softmax_heads for layer in made.layers if layer.softmax_heads},
            softmax_window=options.get("keep_window"),
            seed=seed,
            tokens=tokens,
            calibrated_on=calibrate_on,
            seconds=round(time.monotonic() - began, 1),
            hardware=provenance.hardware(place),
        )
        provenance.write(folder, json.loads(json.dumps(found)))

    if not measured and place.type == "cpu" and (files := weights_folder(source)) is not None:
        ready = streamed(files, config, to, dtype=chosen, **options)
        if ready is not None:
            try:
                kind = str(ready.teacher.dtype).removeprefix("torch.")  # which a config may leave to its weights
                made = planned if planned.dtype == kind else describe(ready.student, ready.teacher, to)
                key = ready.key(seed=seed, max_shard_size=max_shard_size)
                with resumed_folder(path, key, overwrite=overwrite) as (folder, work):
                    write_student(ready, folder, work, seed=seed, max_shard_size=max_shard_size)
                    write_model(ready, folder, work, load_generation_config(source))
                    tokenizer.save_pretrained(folder)
                    record(folder, made, None if expanded(source.model).exists() else files.name)
                return made
            except NotPlain:  # the proof needs more than lies in the files as it is
                pass
    teacher = dense(load_model(source, dtype=chosen, device=place), own=True)
    student = convert(
        teacher,
        to,
        share_memory=True,
        seed=seed,
        tokenizer=tokenizer,
        calibrate_on=calibrate_on,
        calibrate_options=calibrate_options,
        keep_score=keep_score,
        text_field=text_field,
        **options,
    )
    made = describe(student, teacher, to)
    with new_folder(path, overwrite=overwrite) as folder:
        student.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        _write_measured(folder, student)
        record(folder, made, commit_of(teacher), 0 if student.calibration is None else student.calibration.tokens)
    return made


def _write_measured(folder: Path, student: Any) -> None:
    """The scores and the fidelity report beside the weights, as JSON and, with matplotlib, drawn."""
    for name, found, figure in (
        ("keep_scores", student.keep_scores, scores_figure),
        ("calibration", student.calibration, calibration_figure),
    ):
        if found is not None:
            data = found.to_dict()
            (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
            save(figure, data, folder / f"{name}.png")
