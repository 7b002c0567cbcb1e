"""The verbs `distill` and `finetune`: load, check, train, and write a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import processes, provenance
from ..device import chosen_device
from ..errors import UsageError, UserError
from ..output import check_new, new_folder
from ..rows import TextSource
from ..source import commit_of, folder_of, read_for
from . import together
from .feed import packed, split
from .options import (
    KINDS,
    STAGES,
    BlockOptions,
    FinetuneOptions,
    LogitOptions,
    MixingOptions,
    TrainOptions,
    TransferOptions,
    check_overrides,
    with_overrides,
)
from .work import LOG_FILE, Place, RecipeStage, clear

if TYPE_CHECKING:  # stages imports transformers' Trainer, which takes a second: each verb does when it trains
    from torch.utils.data import Dataset

    from .feed import Item
    from .stages import StageResult

TRANSFER_SHARE = 1 / 3
# What the conversion measured travels on beside the weights.
_MEASURED = ("keep_scores.json", "keep_scores.png", "calibration.json", "calibration.png")
_HISTORY = ("config.json", provenance.FILE, *_MEASURED)


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
    mixing: MixingOptions | None = None,
    blocks: BlockOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    work_dir: str | Path | None = None,
    isolate: bool = False,
    text_field: str = "text",
    command: list[str] | str = "linearize.distill",
    dtype: Any = None,
    recipe: RecipeStage | None = None,
    **options: Any,
) -> Any:
    """Brings a converted student near its teacher; trains `student` in place and returns it.

    Args:
        student: a LinearizeForCausalLM, or the folder of one.
        teacher: the model that it was converted from, in memory (it is moved to the device), a Hub id, a
            folder or a `ModelSource`.
        dataset: `name[@revision][:config[:split]]` on the Hub, local files, or a data set packed already (`data.pack`).
        tokenizer: packs the text and travels with `output`; by default the student folder's.
        stage: "transfer" (attention outputs, layer by layer), "logits" (KL), "mixing" (attention weights), "blocks"
            (decoder layers' outputs), or "all": a third of the tokens for transfer, the rest for logits, on different
            text.
        output: folder to write. Checkpoints go beside it, to `OUTPUT.work` or `work_dir`, until it is whole.
        transfer, logits, mixing, blocks: a stage's options; `options` overrides fields of those that run
            (`batch_size=4`).
        resume: go on from the last checkpoint; the loss trace is the one of a run that never stopped.
        isolate: documents do not see each other, though packed together.
        dtype: of the models that are loaded here, as stored by default; one that is in memory stays as it is.
        recipe: the stage of a recipe that this is.

    Returns:
        The student, in evaluation mode; on `student.distillation` the list of `StageResult`.

    Raises:
        UsageError: an option out of range or unknown, an output that exists.
        UserError: models that do not fit, a data set too small, a loss that is not finite, a full disk.
    """
    if stage not in STAGES:
        raise UsageError(f"--stage must be one of {', '.join(STAGES)}, got {stage!r}")
    both = stage == "all"
    kinds = ["transfer", "logits"] if both else [stage]
    check_overrides(options, *(KINDS[kind] for kind in kinds))
    if both and "learning_rate" in options:
        raise UsageError(
            "--learning-rate with --stage all: the stages need rates 50 times apart; leave it out, or run "
            "--stage transfer and --stage logits one after the other"
        )
    given = {"transfer": transfer, "logits": logits, "mixing": mixing, "blocks": blocks}
    shares = {"transfer": TRANSFER_SHARE, "logits": 1 - TRANSFER_SHARE} if both else {stage: 1.0}
    chosen: dict[str, Any] = {}
    for kind, share in shares.items():
        overrides = _share(options, share)
        if both and kind == "transfer":
            overrides.pop("train", None)  # it is said of logits, whose choices are more
        chosen[kind] = with_overrides(given[kind] or KINDS[kind](), overrides)
    for of in chosen.values():
        together.check_batch(of)
    output = _checked(output, overwrite, dataset, student, teacher)
    place = _place(output, work_dir, resume, overwrite, recipe)
    processes.start(chosen[kinds[0]].device)
    if processes.is_main():
        provenance.warn_of_another_teacher(student, teacher)
    device = _loading_device(chosen[kinds[0]].device)
    student, tokenizer = _loaded_student(student, tokenizer, dtype, device)
    teacher = _loaded_teacher(teacher, dtype, device)
    before = _before(student, output)
    from . import stages

    def data(of: TrainOptions) -> Dataset[Item]:
        return packed(dataset, tokenizer, of, isolate=isolate, text_field=text_field)

    stages.check_pair(student, teacher, same_layers=stage != "logits")
    texts = _two_texts(dataset, data, chosen["transfer"], chosen["logits"]) if both else [data(chosen[stage])]
    results: list[StageResult] = [
        getattr(stages, kind)(student, teacher, text, chosen[kind], place)
        for kind, text in zip(kinds, texts, strict=True)
    ]
    student.eval()
    student.distillation = results
    if output is not None:
        _write(
            output,
            student,
            student,
            tokenizer,
            results,
            before=before,
            overwrite=overwrite,
            recipe=recipe,
            record={
                "command": command,
                "stage": stage,
                "teacher": _name(teacher),
                "teacher_revision": commit_of(teacher),
                "dataset": _dataset_name(dataset),
                "options": {kind: of.record() for kind, of in chosen.items()},
            },
        )
        _clear_work(place, work_dir, results)
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
    recipe: RecipeStage | None = None,
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
    together.check_batch(chosen)
    output = _checked(output, overwrite, dataset, student)
    place = _place(output, work_dir, resume, overwrite, recipe)
    processes.start(chosen.device)
    student, tokenizer = _loaded_student(student, tokenizer, dtype, _loading_device(chosen.device))
    before = _before(student, output)
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
            before=before,
            overwrite=overwrite,
            recipe=recipe,
            record={
                "command": command,
                "stage": "finetune",
                "dataset": _dataset_name(dataset),
                "options": {"finetune": chosen.record()},
            },
        )
        _clear_work(place, work_dir, [result])
    return model


def _share(options: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The overrides of one stage: of a budget for all, its share."""
    budget = options.get("tokens")
    if budget is None or share == 1 or budget <= 0:
        return dict(options)
    return {**options, "tokens": max(round(budget * share), 1)}


def _two_texts(
    dataset: str | Dataset[Item], data: Any, first: TransferOptions, second: LogitOptions
) -> list[Dataset[Item]]:
    """The text of transfer and of logits: two parts of one data set, so that neither repeats the other's."""
    if first.tokens is not None and second.tokens is not None:
        share = first.tokens / (first.tokens + second.tokens)
    else:
        share = TRANSFER_SHARE
    if not isinstance(dataset, str) or first.max_length == second.max_length:
        total = first.tokens + second.tokens if first.tokens and second.tokens else None
        return list(split(data(with_overrides(first, {"tokens": total})), share))
    return [split(data(with_overrides(of, {"tokens": None})), share)[part] for part, of in enumerate((first, second))]


def _checked(output: str | Path | None, overwrite: bool, dataset: str | Dataset[Item], *models: Any) -> Path | None:
    """Hours of training must not end at a folder that was there all along, nor models be loaded for a file that is
    not."""
    files = TextSource.parse(dataset).files if isinstance(dataset, str) else ()
    names = [name for model in models for name in read_for(model)]
    return None if output is None else check_new(output, overwrite=overwrite, reads=(*names, *files))


def _before(student: Any, output: Path | None) -> Path | None:
    """The student's folder, whose record OUT's goes on from. Raises UserError, and not when all is trained, where that
    cannot be read."""
    before = folder_of(student, _HISTORY) if output is not None else None
    if before is not None:
        provenance.read(before)
    return before


def _loading_device(device: str | None) -> str:
    """Shards go to their devices from host memory: a whole model may be larger than one."""
    return "cpu" if processes.sharded() else chosen_device(device)


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


def _place(
    output: Path | None, work_dir: str | Path | None, resume: bool, overwrite: bool, recipe: RecipeStage | None
) -> Place:
    folder = Path(work_dir) if work_dir is not None else None
    if folder is not None and output is not None and output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(
            f"--work-dir: {folder} lies in {output}, which is made when all is done; choose another folder"
        )
    if folder is None and output is not None:
        folder = output.with_name(f"{output.name}.work")
    if resume and folder is None:
        raise UsageError("--resume needs an --output or a --work-dir to find the checkpoint in")
    return Place(folder=folder, resume=resume, overwrite=overwrite and not resume, recipe=recipe)


def _clear_work(place: Place, work_dir: str | Path | None, results: list[StageResult]) -> None:
    """Removes what these stages left in `OUT.work`, where something of a person's own may lie too."""
    if work_dir is None and place.folder is not None and processes.is_main():
        for result in results:
            with suppress(OSError):
                clear(place.folder / result.stage)
                (place.folder / result.stage).rmdir()
        with suppress(OSError):
            place.folder.rmdir()


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
    before: Path | None,
    overwrite: bool,
    recipe: RecipeStage | None,
    record: dict[str, Any],
) -> None:
    facts = {
        "tokens": sum(result.tokens for result in results),
        "steps": {result.stage: result.steps for result in results},
        "loss": {result.stage: result.loss for result in results},
        "seconds": {result.stage: result.seconds for result in results},
        "hardware": results[0].hardware,
        "seed": next(iter(record["options"].values()))["seed"],
    }
    parent = student.name_or_path or None
    origin: dict[str, Any] = {"parent": parent, "parent_folder": before, "parent_revision": commit_of(student)}

    def write() -> None:
        with new_folder(output, overwrite=overwrite) as folder:
            if model is student:
                model.save_pretrained(folder)
            else:
                model.save_pretrained(folder, save_embedding_layers=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            for source in (before / name for name in _MEASURED if before is not None):
                if source.is_file():
                    shutil.copyfile(source, Path(folder) / source.name)
            lines = [*(recipe.earlier if recipe else ()), *(line for result in results for line in result.log)]
            (Path(folder) / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
            more = dict(recipe.facts) if recipe else {}
            provenance.write(folder, provenance.record(**origin, **record, **facts, **more))

    processes.from_main(write)
