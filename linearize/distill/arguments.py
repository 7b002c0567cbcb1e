"""A stage's options as transformers' Trainer takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from ..errors import UserError
from .options import TrainOptions

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def trainer_arguments(options: TrainOptions, folder: Path, max_steps: int, save: bool) -> TrainingArguments:
    """For a stage of `max_steps` steps, whose checkpoints go to `folder` where it may `save`.

    Raises:
        UserError: no such device.
    """
    kind, _, index = (options.device or "auto").partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps", "xpu") or index not in ("", "0"):
        raise UserError(f"--device {options.device}: name a kind (cpu, cuda); CUDA_VISIBLE_DEVICES chooses the card")
    on_cpu = kind == "cpu"
    floor = options.min_learning_rate
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if floor else _SCHEDULERS[options.schedule],
        lr_scheduler_kwargs={"min_lr": floor} if floor else None,
        warmup_steps=round(options.warmup * max_steps),
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        use_cpu=on_cpu,
        save_strategy="steps" if save else "no",
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_steps=options.log_steps,
        # what the stage starts from, before its first update
        logging_first_step=True,
        # a NaN must be seen, not averaged away
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu and torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    if kind in ("cuda", "mps", "xpu") and arguments.device.type != kind:
        raise UserError(f"--device {options.device}: there is none here; this machine has {arguments.device.type}")
    # with several cards the Trainer would wrap the model in DataParallel, which cannot see into a layer
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
