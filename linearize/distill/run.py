"""The verbs `distill` and `finetune`: load, check, train, and write a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import provenance
from ..device import chosen_device
from ..errors import UsageError, UserError
from ..output import check_new, new_folder
from ..rows import TextSource
from .feed import packed, split
from .options import (
    STAGES,
    FinetuneOptions,
    LogitOptions,
    TrainOptions,
    TransferOptions,
    check_overrides,
    with_overrides,
)
from .work import LOG_FILE, Place

if TYPE_CHECKING:  # stages imports transformers' Trainer, which takes a second: each verb does when it trains
    from torch.utils.data import Dataset

    from .feed import Item
    from .stages import StageResult

TRANSFER_SHARE = 1 / 3


def distill(
    student: Any,
    teacher: Any,
    dataset: str | Dataset[Item],
    *,
    tokenizer: Any = None,
    stage: str = "transfer",
    output: str | Path | None = None,
    transfer: TransferOptions | None = None,
    logits: LogitOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    work_dir: str | Path | None = None,
    isolate: bool = False,
    text_field: str = "text",
    command: list[str] | str = "linearize.distill",
    dtype: Any = None,
    **options: Any,
) -> Any:
    """Brings a converted student near its teacher; trains `student` in place and returns it.

    Args:
        student: a LinearizeForCausalLM, or the folder of one.
        teacher: the model that it was converted from, in memory (it is moved to the device), a Hub id, a
            folder or a `ModelSource`.
        dataset: `name[:config[:split]]` on the Hub, local files, or a data set packed already (`data.pack`).
        tokenizer: packs the text and travels with `output`; by default the student folder's.
        stage: "transfer" (new parameters, layer by layer), "logits" (KL), or "all": a third of the tokens for
            transfer, the rest for logits, on different text.
        output: folder to write. Checkpoints go beside it, to `OUTPUT.work` or `work_dir`, until it is whole.
        transfer, logits: a stage's options; `options` overrides fields of both (`batch_size=4`).
        resume: go on from the last checkpoint; the loss trace is the one of a run that never stopped.
        isolate: documents do not see each other, though packed together.
        dtype: of the models that are loaded here, as stored by default; one that is in memory stays as it is.

    Returns:
        The student, in evaluation mode; on `student.distillation` the list of `StageResult`.

    Raises:
        UsageError: an option out of range or unknown, an output that exists.
        UserError: models that do not fit, a data set too small, a loss that is not finite, a full disk.
    """
    if stage not in STAGES:
        raise UsageError(f"--stage must be one of {', '.join(STAGES)}, got {stage!r}")
    used: list[type[TrainOptions]] = [TransferOptions] if stage != "logits" else []
    check_overrides(options, *used, *([LogitOptions] if stage != "transfer" else []))
    budget = options.get("tokens")
    both = stage == "all"
    if both and "learning_rate" in options:
        raise UsageError(
            "--learning-rate with --stage all: the stages need rates 50 times apart; leave it out, or run "
            "--stage transfer and --stage logits one after the other"
        )
    first = with_overrides(transfer or TransferOptions(), _share(options, budget, TRANSFER_SHARE, both))
    second = with_overrides(logits or LogitOptions(), _share(options, budget, 1 - TRANSFER_SHARE, both))
    output = _checked(output, overwrite)
    place = _place(output, work_dir, resume, overwrite)
    _check_spec(dataset)
    device = chosen_device(first.device)
    student, tokenizer = _loaded_student(student, tokenizer, dtype, device)
    teacher = _loaded_teacher(teacher, dtype, device)
    from . import stages

    def data(chosen: TransferOptions | LogitOptions) -> Dataset[Item]:
        return packed(dataset, tokenizer, chosen, isolate=isolate, text_field=text_field)

    results: list[StageResult] = []
    if stage == "all":
        stages.check_pair(student, teacher, same_layers=True)
        texts = _two_texts(dataset, data, first, second)
        results.append(stages.transfer(student, teacher, texts[0], first, place))
        results.append(stages.logits(student, teacher, texts[1], second, place))
    elif stage == "transfer":
        stages.check_pair(student, teacher, same_layers=True)
        results.append(stages.transfer(student, teacher, data(first), first, place))
    else:
        stages.check_pair(student, teacher, same_layers=False)
        results.append(stages.logits(student, teacher, data(second), second, place))
    student.eval()
    student.distillation = results
    if output is not None:
        chosen = {"transfer": first.record(), "logits": second.record()}
        _write(
            output,
            student,
            student,
            tokenizer,
            results,
            overwrite=overwrite,
            record={
                "command": command,
                "stage": stage,
                "teacher": _name(teacher),
                "dataset": _dataset_name(dataset),
                "options": {name: record for name, record in chosen.items() if stage in (name, "all")},
            },
        )
        _clear_work(place, work_dir)
    return student


def finetune(
    student: Any,
    dataset: str | Dataset[Item],
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    finetune: FinetuneOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    work_dir: str | Path | None = None,
    isolate: bool = False,
    text_field: str = "text",
    command: list[str] | str = "linearize.finetune",
    dtype: Any = None,
    **options: Any,
) -> Any:
    """Adapts a converted student with LoRA and cross-entropy on the labels; arguments as in `distill`.

    With `merge` the result and `output` are a plain converted model. Without, the result is a peft model and
    `output` an adapter, which `AutoModelForCausalLM.from_pretrained(output)` loads after `import linearize`
    (or `PeftModel.from_pretrained`): it names the student's folder as its base,
    so the student must lie in one.

    Raises:
        UsageError, UserError: as `distill`; and for an adapter whose student is in no folder.
    """
    check_overrides(options, FinetuneOptions)
    chosen = with_overrides(finetune or FinetuneOptions(), options)
    output = _checked(output, overwrite)
    place = _place(output, work_dir, resume, overwrite)
    _check_spec(dataset)
    student, tokenizer = _loaded_student(student, tokenizer, dtype, chosen_device(chosen.device))
    from . import stages

    base = Path(student.name_or_path)
    if output is not None and not chosen.merge:
        if not student.name_or_path or not (base / "config.json").is_file():
            raise UserError(
                "an adapter names its base model's folder, and this student was not loaded from one: "
                "save the student first, or pass --merge"
            )
        student.name_or_path = str(base.resolve())
    data = packed(dataset, tokenizer, chosen, isolate=isolate, text_field=text_field)
    model, result = stages.finetune(student, data, chosen, place)
    model.eval()
    student.distillation = [result]
    if output is not None:
        _write(
            output,
            model,
            student,
            tokenizer,
            [result],
            overwrite=overwrite,
            record={
                "command": command,
                "stage": "finetune",
                "dataset": _dataset_name(dataset),
                "options": {"finetune": chosen.record()},
            },
        )
        _clear_work(place, work_dir)
    return model


def _share(options: Mapping[str, Any], budget: int | None, share: float, both: bool) -> dict[str, Any]:
    """The overrides of one stage: of a budget for both, its share."""
    if budget is None or not both or budget <= 0:
        return dict(options)
    return {**options, "tokens": max(round(budget * share), 1)}


def _two_texts(
    dataset: str | Dataset[Item], data: Any, first: TransferOptions, second: LogitOptions
) -> tuple[Dataset[Item], Dataset[Item]]:
    """The text of transfer and of logits: two parts of one data set, so that neither repeats the other's."""
    if first.tokens is not None and second.tokens is not None:
        share = first.tokens / (first.tokens + second.tokens)
    else:
        share = TRANSFER_SHARE
    if not isinstance(dataset, str) or first.max_length == second.max_length:
        total = first.tokens + second.tokens if first.tokens and second.tokens else None
        return split(data(with_overrides(first, {"tokens": total})), share)
    return split(data(with_overrides(first, {"tokens": None})), share)[0], split(
        data(with_overrides(second, {"tokens": None})), share
    )[1]


def _checked(output: str | Path | None, overwrite: bool) -> Path | None:
    """Hours of training must not end at a folder that was there all along."""
    return None if output is None else check_new(output, overwrite=overwrite)


def _check_spec(dataset: str | Dataset[Item]) -> None:
    """A file that is not there is said before models are loaded."""
    if isinstance(dataset, str):
        TextSource.parse(dataset)


def _loaded_student(student: Any, tokenizer: Any, dtype: Any, device: str) -> tuple[Any, Any]:
    """The student in memory, and the tokenizer, which a folder brings along."""
    if hasattr(student, "mixer_layers"):
        return student, tokenizer
    from ..source import load_student, load_tokenizer

    if tokenizer is None:
        tokenizer = load_tokenizer(student)
    return load_student(student, dtype=dtype, device=device), tokenizer


def _loaded_teacher(teacher: Any, dtype: Any, device: str) -> Any:
    if hasattr(teacher, "base_model"):
        return teacher
    from ..source import load_model

    return load_model(teacher, dtype=dtype, device=device)


def _place(output: Path | None, work_dir: str | Path | None, resume: bool, overwrite: bool) -> Place:
    folder = Path(work_dir) if work_dir is not None else None
    if folder is None and output is not None:
        folder = output.with_name(f"{output.name}.work")
    if resume and folder is None:
        raise UsageError("--resume needs an --output or a --work-dir to find the checkpoint in")
    return Place(folder=folder, resume=resume, overwrite=overwrite and not resume)


def _clear_work(place: Place, work_dir: str | Path | None) -> None:
    if work_dir is None and place.folder is not None:
        shutil.rmtree(place.folder, ignore_errors=True)


def _name(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _dataset_name(dataset: str | Dataset[Item]) -> str:
    return dataset if isinstance(dataset, str) else type(dataset).__name__


def _write(
    output: Path,
    model: Any,
    student: Any,
    tokenizer: Any,
    results: list[StageResult],
    *,
    overwrite: bool,
    record: dict[str, Any],
) -> None:
    facts = {
        "tokens": sum(result.tokens for result in results),
        "steps": {result.stage: result.steps for result in results},
        "loss": {result.stage: result.loss for result in results},
        "seed": next(iter(record["options"].values()))["seed"],
    }
    parent = student.name_or_path or None
    with new_folder(output, overwrite=overwrite) as folder:
        if model is student:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        with open(Path(folder) / LOG_FILE, "w") as file:
            for result in results:
                file.writelines(json.dumps(line) + "\n" for line in result.log)
        provenance.write(folder, provenance.record(parent=parent, **record, **facts))
