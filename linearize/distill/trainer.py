"""transformers' Trainer as every stage uses it: one device, a loss log, checkpoints of what trains alone."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from ..errors import UserError
from ..modeling import branch_off
from .compiling import mixers
from .feed import Item, Stack
from .interrupt import EXIT_CODE, Interrupt
from .options import TrainOptions
from .parameters import HALF, optimizer_groups
from .tally import Figure, Tally
from .work import LOG_FILE, TRAINABLE_FILE, checkpoint_step, full_disk_said, unreadable

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def _arguments(options: TrainOptions, folder: Path, max_steps: int, save: bool) -> TrainingArguments:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training runs on one device: start it without torchrun or accelerate launch")
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


def _check_state(checkpoint: Path) -> None:
    """Raises ValueError where a number of the Trainer's state is none: it would be noticed steps later."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    for entry in fields(TrainerState):
        value = state.get(entry.name, entry.default)
        if type(entry.default) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"{TRAINER_STATE_NAME} says {entry.name}: {value!r}")
    if state.get("global_step") != checkpoint_step(checkpoint):
        raise ValueError(f"{TRAINER_STATE_NAME} is of step {state.get('global_step')}")


class _Pace(TrainerCallback):
    """A bar on stderr, a line in the log wherever a checkpoint is due, and a checkpoint and the end on SIGTERM."""

    def __init__(self, title: str, interrupt: Interrupt) -> None:
        self.title, self.interrupt = title, interrupt
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            file=sys.stderr,
            mininterval=interval,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        if self.interrupt.asked:
            control.should_save = control.should_training_stop = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class StageTrainer(Trainer):
    """A stage gives `step_losses`; this class gives it the loop, the optimizer, the log and the checkpoints.

    `model` is what trains (its `requires_grad` parameters), `student` the converted model inside. `folder`
    takes checkpoints every `options.save_steps` when `save`, and `loss.jsonl` always: a line for the first step and
    each `options.log_steps` with `stage`, `step`, `tokens`, `loss`, `lr` and the stage's own parts of the loss,
    means over the steps since the last line. Steps without windows are apart in `loss_window_off` and the like: `loss`
    is of all steps, a part of it of the others. `watch` is called with each line.
    """

    title = "train"

    def __init__(
        self,
        model: nn.Module,
        student: Any,
        dataset: Dataset[Item],
        options: TrainOptions,
        folder: Path,
        *,
        max_steps: int,
        save: bool,
        teacher: Any = None,
        title: str | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.options = options
        self.folder = folder
        self.student = student
        self.title = title or self.title
        self.watch = watch
        self.interrupt = Interrupt()
        self.tally = Tally()
        self._began: float | None = None
        self.pace = _Pace(self.title, self.interrupt)
        super().__init__(
            model=model,
            args=_arguments(options, folder, max_steps, save),
            train_dataset=dataset,
            data_collator=Stack(student.config.vocab_size),
            callbacks=[self.pace],
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.teacher = teacher
        if teacher is not None:
            teacher.to(self.args.device)
        self.half = self._runs_in_half()

    # -- precision

    def _runs_in_half(self) -> bool:
        models = [self.student] + ([self.teacher] if self.teacher is not None else [])
        loaded_half = any(parameter.dtype in HALF for model in models for parameter in model.parameters())
        if self.options.precision == "fp32" and loaded_half:
            raise UserError("--precision fp32 needs weights in fp32: load both models with --dtype float32")
        if self.options.precision == "auto":
            on_gpu = self.args.device.type == "cuda" and torch.cuda.is_bf16_supported()
            double = any(parameter.dtype == torch.float64 for parameter in self.student.parameters())
            return loaded_half or (on_gpu and not double)
        return self.options.precision == "bf16"

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """bf16 where the run has it. No cache of cast weights: it would hold a frozen fp32 model again."""
        kind = self.args.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled and self.half, cache_enabled=False)

    # -- the loop

    def to_compile(self) -> list[nn.Module]:
        """What `--compile` compiles in this stage."""
        return mixers(self.student)

    @property
    def isolated(self) -> bool:
        """Whether documents are told apart by their positions, which code that is compiled cannot look at."""
        return self.train_dataset is not None and "position_ids" in self.train_dataset[0]

    def step_losses(self, inputs: Item, num_items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one batch: its detached share of the step's loss, and parts for the log."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._stepped = True
        model.train()
        inputs = self._prepare_inputs(inputs)
        without_window = self._is_without_window()
        off = "window" if without_window else None if getattr(self.options, "linear_branch", True) else "linear"
        with branch_off(self.student, off) if off else nullcontext():
            loss, parts = self.step_losses(inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self.stop_not_finite(f"the loss is {loss.item()}{self.blame(parts)}")
        figures: dict[str, Figure] = {name: value.tolist() for name, value in parts.items()}
        if without_window:
            figures = {f"{name}_window_off": value for name, value in {**figures, "loss": loss.item()}.items()}
        self.tally.add(self.state.global_step, {"loss": loss.item(), **figures})
        return loss

    def _is_without_window(self) -> bool:
        """Drawn from the seed and the step alone, so that a resumed run draws the same; never the first step, whose
        loss is that of the start."""
        step = self.state.global_step
        return step > 0 and random.Random(f"window {self.options.seed} {step}").random() < self.options.window_dropout

    def blame(self, parts: dict[str, Tensor]) -> str:
        """Where in the model a loss that is not finite comes from, if the stage can tell."""
        return ""

    def stop_not_finite(self, what: str) -> None:
        kept = f" The last checkpoint is kept in {self.folder}." if self.args.save_strategy != "no" else ""
        raise UserError(
            f"{what} at step {self.state.global_step + 1}: lower --learning-rate or lengthen --warmup.{kept}"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # called once a step before the optimizer: the last moment at which the parameters are still good
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            where = f" (first in {bad[0]})" if bad else ""
            self.stop_not_finite(f"the gradient's norm is {float(norm)}{where}")
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                optimizer_groups(model or self._whole(), self.options),
                lr=self.options.learning_rate,
                betas=(self.options.beta1, self.options.beta2),
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    @property
    def seconds(self) -> float:
        """Of training so far: of this process, and of those before it up to the checkpoint that it went on from."""
        return self.tally.seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def run(self, checkpoint: Path | None) -> None:
        """Trains to the end, from `checkpoint` if any. Raises UserError for a loss or gradient not finite, and
        SystemExit after a SIGTERM."""
        if checkpoint is not None and checkpoint_step(checkpoint) >= self.args.max_steps:
            try:
                self._load_from_checkpoint(str(checkpoint))
            except UserError:
                raise
            except Exception as error:
                raise unreadable(checkpoint, error) from error
            return
        saves = self.args.save_strategy != "no"
        self._began = time.monotonic()
        self._stepped = False
        try:
            if checkpoint is not None:
                _check_state(checkpoint)
            # One device: a backward pass in autograd's own thread would only move every Python object to another core.
            with (
                full_disk_said(self.folder),
                torch.autograd.set_multithreading_enabled(False),
                self.interrupt.listening() if saves else nullcontext(),
            ):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if checkpoint is None or self._stepped:
                raise
            raise unreadable(checkpoint, error) from error
        finally:
            self.tally.seconds, self._began = self.seconds, None
            self.pace.close()
        if self.interrupt.asked:
            print(
                f"SIGTERM: {self.title} stopped at step {self.state.global_step} of {self.state.max_steps}, with a "
                f"checkpoint in {self.folder}; --resume goes on from there",
                file=sys.stderr,
            )
            raise SystemExit(EXIT_CODE)

    # -- the log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        line: dict[str, Any] = {
            "stage": self.title,
            "step": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "loss": None,  # keeps its place
            "lr": logs["learning_rate"],
            **self.tally.take(),
        }
        with open(self.folder / LOG_FILE, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch is not None:
            self.watch(line)

    # -- checkpoints: the frozen weights are in STUDENT already

    def _whole(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._whole().named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        target = Path(output_dir or self.folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trainable().items()}, target / TRAINABLE_FILE)
        self.tally.save(target, seconds=self.seconds)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINABLE_FILE)
        trainable = self._trainable()
        if saved.keys() != trainable.keys():
            raise UserError(f"{resume_from_checkpoint} holds other parameters than those that train now")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])
        self.tally.load(Path(resume_from_checkpoint))
