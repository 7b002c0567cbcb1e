"""One stage of training on models in memory: what trains, with which trainer, and where its files go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from .. import processes
from ..errors import UsageError, UserError
from ..json_files import read_lines
from ..provenance import hardware
from ..room import check_room, room_of
from . import together
from .blocks import BlockTrainer
from .compiling import compiled
from .documents import refuse_shared
from .feed import Item, length_of, steps_for, with_repeats
from .layer_pass import attention_pairs
from .logits import HeadTrainer, set_checkpointing
from .lora import attach_lora, merged, unloaded
from .memory import graph_bytes
from .mixing import MixingTrainer, eager_attention
from .options import BlockOptions, FinetuneOptions, LogitOptions, MixingOptions, TrainOptions, TransferOptions
from .parameters import cache_setting_kept, check_pair, own_memory, trainable_names, training_only
from .stepwise import teacher_attention
from .trainer import StageTrainer
from .transfer import TransferTrainer
from .work import LOG_FILE, Place, open_work, start_hash, text_hash


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage did: optimizer steps, tokens seen, the lines of its loss log, and the seconds that it trained, those
    before its last checkpoint included where it was resumed, on which hardware."""

    stage: str
    steps: int
    tokens: int
    log: list[dict[str, Any]]
    seconds: float | None = field(default=None, compare=False)
    hardware: str | None = field(default=None, compare=False)

    @property
    def loss(self) -> float | None:
        """Mean loss of the last line."""
        return self.log[-1]["loss"] if self.log else None


def _train(
    trainer_class: type[StageTrainer],
    model: nn.Module,
    student: Any,
    names: set[str],
    dataset: Dataset[Item],
    options: TrainOptions,
    place: Place,
    start: str,
    teacher: Any = None,
) -> StageResult:
    processes.start(options.device)
    together.check_batch(options)
    if options.compile and processes.sharded():
        raise UsageError("--compile goes without FSDP: leave it out, or start the processes with DDP")
    length = dataset[0]["input_ids"].numel() if length_of(dataset) else 0
    room = room_of(student, teacher)
    check_room(room, f"--max-length {length}", length, f"give at most {room}")
    max_steps = steps_for(dataset, options)
    text = text_hash(dataset, length_of(dataset))
    dataset = with_repeats(dataset, options)
    stage = place.recipe.name if place.recipe else trainer_class.title
    if any(not attention.mixer.window for _, attention in student.mixer_layers()):
        if options.window_dropout:
            raise UsageError("--window-dropout: the student has no windows to switch off; convert it with --window")
        if not getattr(options, "linear_branch", True):
            raise UsageError("--no-linear-branch: the student has no windows to learn alone; convert it with --window")
    run = {
        "stage": stage,
        "start": start,
        "teacher": None if teacher is None else start_hash(teacher),
        "text": text,
        "steps": max_steps,
        "sequences": length_of(dataset),
        "options": options.record(),
    }
    with ExitStack() as stack:
        checkpoint = None
        if place.folder is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="linearize-")))
        else:
            folder = place.folder / stage
            # the folder is one, on a disk that all processes see
            found = processes.from_main(
                lambda: str(open_work(folder, run, resume=place.resume, overwrite=place.overwrite) or "")
            )
            checkpoint = Path(found) if found else None
        stack.enter_context(cache_setting_kept(student.config))
        stack.enter_context(training_only(model, names))
        if teacher is not None:
            stack.enter_context(_evaluating(teacher))
        trainer = trainer_class(
            model,
            student,
            dataset,
            options,
            folder,
            max_steps=max_steps,
            save=place.folder is not None,
            teacher=teacher,
            title=stage,
            watch=place.recipe.watch if place.recipe else None,
        )
        # on the device of this process, where the trainer has put it
        together.same_start(parameter for parameter in model.parameters() if parameter.requires_grad)
        if trainer.isolated:
            with trainer.autocast():
                for model in (student, teacher):
                    if model is not None:
                        refuse_shared(model)
        if options.compile:
            stack.enter_context(compiled(trainer.to_compile()))
        try:
            trainer.run(checkpoint)
        finally:
            # accelerate's wrapper of the model would otherwise hold on to the optimizer's state
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.accelerator.free_memory()
        log = folder / LOG_FILE
        lines = processes.from_main(lambda: read_lines(log) if log.is_file() else [])
    return StageResult(
        stage=stage,
        steps=max_steps,
        tokens=lines[-1]["tokens"] if lines else 0,
        log=lines,
        seconds=round(trainer.seconds, 1),
        hardware=("" if not processes.several() else f"{processes.count()} x ") + hardware(trainer.args.device),
    )


@contextmanager
def _evaluating(teacher: nn.Module) -> Iterator[None]:
    was_training = teacher.training
    teacher.eval()
    try:
        yield
    finally:
        teacher.train(was_training)


def wants_checkpoints(student: Any, options: LogitOptions | FinetuneOptions, free: int | None) -> bool:
    """Whether to recompute activations: as asked, else unless they take less than a quarter of `free` bytes on a GPU,
    None without one."""
    if options.gradient_checkpointing is not None or free is None:
        return options.gradient_checkpointing is not False
    config = student.config.get_text_config()
    needed = graph_bytes(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        tokens=-(-options.batch_size // processes.count()) * options.max_length,
        intermediate=getattr(config, "intermediate_size", None),
    )
    return needed > free // 4


@contextmanager
def _checkpointing(student: Any, options: LogitOptions | FinetuneOptions) -> Iterator[None]:
    on_gpu = torch.cuda.is_available() and not (options.device or "").startswith("cpu")
    if on_gpu:
        torch.cuda.empty_cache()  # what stages before have freed is free
    enabled = wants_checkpoints(student, options, torch.cuda.mem_get_info()[0] if on_gpu else None)
    if enabled:
        set_checkpointing(student, True)
    try:
        yield
    finally:
        if enabled:
            set_checkpointing(student, False)


def transfer(student: Any, teacher: Any, dataset: Dataset[Item], options: TransferOptions, place: Place) -> StageResult:
    """Attention transfer of `student`, in place.

    UserError when nothing of it would train, UsageError for sequences that the windows cover whole.
    """
    _check_lengths(student, options)
    return _layerwise(TransferTrainer, student, teacher, dataset, options, options.train, place)


def mixing(student: Any, teacher: Any, dataset: Dataset[Item], options: MixingOptions, place: Place) -> StageResult:
    """Mixing-matrix matching of `student`, in place. Raises as `transfer`."""
    _check_lengths(student, options)
    if options.compile:
        raise UsageError("--compile: this stage reads the mixers' inner results, and a compiled one has none")
    with eager_attention(teacher):
        return _layerwise(MixingTrainer, student, teacher, dataset, options, options.train, place)


def blocks(student: Any, teacher: Any, dataset: Dataset[Item], options: BlockOptions, place: Place) -> StageResult:
    """Hidden-state alignment of `student`'s decoder layers, in place. Raises as `transfer`."""
    _check_lengths(student, options)
    train = "layers" if options.train == "all" else options.train
    return _layerwise(BlockTrainer, student, teacher, dataset, options, train, place)


def _check_lengths(student: Any, options: TrainOptions) -> None:
    window = min((attention.mixer.window for _, attention in student.mixer_layers()), default=0)
    if window and options.max_length <= window:
        raise UsageError(
            f"--max-length {options.max_length} is no longer than the student's window of {window} tokens: the linear "
            "branch would see nothing to learn from; give longer sequences"
        )


def _layerwise(
    trainer_class: type[StageTrainer],
    student: Any,
    teacher: Any,
    dataset: Dataset[Item],
    options: TrainOptions,
    train: str,
    place: Place,
) -> StageResult:
    check_pair(student, teacher, same_layers=True)
    attention_pairs(student, teacher)
    names = trainable_names(student, train)
    if not names:
        raise UserError(
            f"the student's mixers have no new parameters, so attention {trainer_class.title} has nothing to train: "
            "use --train attention or --stage logits"
        )
    if train != "new":
        own_memory(student, teacher)
    start = start_hash(student)
    return _train(trainer_class, student, student, names, dataset, options, place, start, teacher)


def logits(student: Any, teacher: Any, dataset: Dataset[Item], options: LogitOptions, place: Place) -> StageResult:
    """Logit distillation of `student`, in place; LoRA is merged when the stage ends."""
    check_pair(student, teacher, same_layers=options.active is not None)
    own_memory(student, teacher)
    aim = None if options.ce_weight == 1 else teacher  # cross-entropy alone asks no teacher
    start = start_hash(student)
    if options.lora_rank is not None:
        # LoRA first: peft, seeing checkpointing, would make the embeddings' outputs require gradients
        with _lora(student, options, options.lora_rank, mixers=True) as model:
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            with _checkpointing(student, options):
                result = _train(HeadTrainer, model, student, names, dataset, options, place, start, aim)
            _merge(model, student)
        return result
    with teacher_attention(student, teacher, options.active) as inactive:
        names = {
            name
            for name in trainable_names(student, options.train)
            if not any(name.startswith(path + ".") for path in inactive)
        }
        if not names:
            raise UserError("--train new: the student's mixers have no new parameters; use --train all or --lora-rank")
        with _checkpointing(student, options):
            return _train(HeadTrainer, student, student, names, dataset, options, place, start, aim)


class FinetuneTrainer(HeadTrainer):
    """Cross-entropy alone."""

    title = "finetune"


def finetune(student: Any, dataset: Dataset[Item], options: FinetuneOptions, place: Place) -> tuple[Any, StageResult]:
    """LoRA fine-tuning: the merged `student`, or the PeftModel around it when not `options.merge`."""
    start = start_hash(student)
    with _lora(student, options, options.lora_rank, mixers=options.train_mixers) as model:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        with _checkpointing(student, options):
            result = _train(FinetuneTrainer, model, student, names, dataset, options, place, start)
        if options.merge:
            _merge(model, student)
    return (student if options.merge else model), result


@contextmanager
def _lora(student: Any, options: LogitOptions | FinetuneOptions, rank: int, *, mixers: bool) -> Iterator[Any]:
    """The student inside a PeftModel; if the body raises, the student is as it was before."""
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    set_seed(options.seed)  # LoRA's start is drawn at random
    model = attach_lora(
        student,
        rank=rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        on=options.lora_on,
        mixers=mixers,
    )
    try:
        yield model
    except BaseException:
        unloaded(model)
        _set_flags(student, flags)
        raise
    if flags.keys() == {name for name, _ in student.named_parameters()}:  # merged
        _set_flags(student, flags)


def _set_flags(student: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags[name])


def _merge(model: Any, student: Any) -> None:
    plain = merged(model)
    assert plain is student, "peft gave back another model than the one it wrapped"
