"""transformers' Trainer as every stage uses it: a device a process, a loss log, checkpoints of what trains alone."""

from __future__ import annotations

import json
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from .. import processes
from ..errors import UserError
from ..modeling import branch_off
from . import sharding, together
from .arguments import trainer_arguments
from .compiling import mixers
from .feed import Item, Stack
from .graphed import GraphedStep
from .interrupt import Interrupt
from .options import TrainOptions
from .pace import Pace
from .parameters import HALF, optimizer_groups
from .tally import Figure, Tally
from .work import LOG_FILE, TRAINABLE_FILE, check_state, checkpoint_step, full_disk_said, last_checkpoint, unreadable


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
        self._twin: nn.Module | None = None
        self.pace = Pace(self.title, self.interrupt)
        super().__init__(
            model=model,
            args=trainer_arguments(options, folder, max_steps, save),
            train_dataset=dataset,
            data_collator=Stack(student.config.vocab_size),
            callbacks=[self.pace],
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.teacher = teacher
        if teacher is not None and not processes.sharded():
            teacher.to(self.args.device)
        self.half = self._runs_in_half()
        self.share = 1.0  # of a batch's rows, this process's
        self.graphed: GraphedStep | None = None
        if processes.several():
            # gradients are summed here (together.py): wrapped for DDP, the model would do it again
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

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

    def look(self, inputs: Item) -> Item:
        """`inputs`, and what a step must know of their values: `step_losses` itself, which may be recorded as a CUDA
        graph, cannot look at any."""
        return inputs

    def step_losses(self, inputs: Item, num_items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one batch: its detached share of the step's loss, and parts for the log."""
        raise NotImplementedError

    def losses(self, inputs: Item, num_items: Any, off: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        """`step_losses`, plainly or by a replay; `off` is the mixers' branch that is off."""
        if self.graphed is None or inputs.keys() & {"position_ids", "attention_mask"}:
            return self.step_losses(inputs, num_items)
        tensors = dict(inputs)
        if num_items is not None:
            tensors["num_items"] = torch.as_tensor(num_items).to(self.args.device)
        return self.graphed(tensors, (off, self.current_gradient_accumulation_steps))

    def _graphed(self) -> GraphedStep | None:
        if not self.options.cuda_graph or processes.several():
            return None
        if any(getattr(module, "gradient_checkpointing", False) for module in self.student.modules()):
            warnings.warn(
                "--cuda-graph: steps whose activations are recomputed are not recorded; --no-gradient-checkpointing "
                "keeps them, where memory allows it",
                stacklevel=2,
            )
            return None
        if any(getattr(module, "layerdrop", 0) for module in self.student.modules()):
            warnings.warn("--cuda-graph: steps that draw which layers they skip are not recorded", stacklevel=2)
            return None

        def step(tensors: Item) -> tuple[Tensor, dict[str, Tensor]]:
            inputs: dict[str, Any] = dict(tensors)
            return self.step_losses(inputs, inputs.pop("num_items", None))

        return GraphedStep(step, list(self._trainable().values()), self.args.device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._restored = True
        model.train()
        rows = len(inputs["input_ids"])
        inputs = self._prepare_inputs(self.look(together.own_rows(inputs)))
        self.share = len(inputs["input_ids"]) / rows
        without_window = self._is_without_window()
        off = "window" if without_window else None if getattr(self.options, "linear_branch", True) else "linear"
        with branch_off(self.student, off) if off else nullcontext():
            loss, parts = self.losses(inputs, num_items_in_batch, off)
        if processes.several():
            loss, parts, self.interrupt.others = together.totals(loss, parts, self.interrupt.asked)
            if self.accelerator.sync_gradients and not processes.sharded():
                together.sum_gradients(model.parameters())
        if not math.isfinite(loss.item()):
            self.stop_not_finite(f"the loss is {loss.item()}{self.blame(parts)}")
        figures: dict[str, Figure] = {name: value.tolist() for name, value in parts.items()}
        if without_window:
            figures = {f"{name}_window_off": value for name, value in {**figures, "loss": loss.item()}.items()}
        self.tally.add(self.state.global_step, {"loss": loss.item(), **figures})
        return loss

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not processes.sharded():  # a whole model may be larger than the device
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if processes.several():
            # every process goes through whole batches, as one alone would, and takes its rows of each
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if processes.several():
            self.state.num_input_tokens_seen += inputs["input_ids"].numel()
        else:
            super()._track_num_input_tokens(inputs)

    def backward(self, loss: Tensor) -> None:
        """FSDP takes the mean of what the processes' losses give; they are shares of one sum."""
        self.accelerator.backward(loss * processes.count() if processes.sharded() else loss)

    def _is_without_window(self) -> bool:
        """Drawn from the seed and the step alone, so that a resumed run draws the same; never the first step, whose
        loss is that of the start."""
        step = self.state.global_step
        return step > 0 and random.Random(f"window {self.options.seed} {step}").random() < self.options.window_dropout

    def blame(self, parts: dict[str, Tensor]) -> str:
        """Where in the model a loss that is not finite comes from, if the stage can tell."""
        return ""

    def stop_not_finite(self, what: str) -> None:
        last = last_checkpoint(self.folder)
        kept = "" if last is None else f" The last checkpoint is kept: {last}."
        raise UserError(
            f"{what} at step {self.state.global_step + 1}: lower --learning-rate or lengthen --warmup.{kept}"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # called once a step before the optimizer: the last moment at which the parameters are still good
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if norm is not None and not math.isfinite(float(norm)):
            bad = []  # of shards each process knows its own
            if not processes.sharded():
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
        with processes.lost_said(), self.sharded():
            self._run(checkpoint)

    def _run(self, checkpoint: Path | None) -> None:
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
        self._restored = False
        self.graphed = self._graphed()
        try:
            if checkpoint is not None:
                check_state(checkpoint)
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
            if checkpoint is None or self._restored or processes.is_lost(error):
                raise
            raise unreadable(checkpoint, error) from error
        finally:
            self.tally.seconds, self._began = self.seconds, None
            self.graphed = None  # and the memory that its recordings hold
            self.pace.close()
        if self.interrupt.agreed:
            if processes.is_main():
                self._say_stopped()
            raise SystemExit(self.interrupt.exit_code)

    def _say_stopped(self) -> None:
        print(
            f"{self.interrupt.name}: {self.title} stopped at step {self.state.global_step} of {self.state.max_steps}, "
            f"with a checkpoint in {self.folder}; --resume goes on from there",
            file=sys.stderr,
        )

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
        if not processes.is_main():
            return
        with open(self.folder / LOG_FILE, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch is not None:
            self.watch(line)

    # -- shards: twins of the models take their place while the stage trains

    def to_shard(self, student: Any, teacher: Any) -> tuple[nn.Module, list[nn.Module]]:
        """Out of twins of the models, which the stage works with from now on: a module whose parameters hold all that
        trains, and the modules to shard, inner ones first."""
        raise NotImplementedError

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Inside, the stage trains shards, where the run has them; at its end the models have what was learned."""
        if not processes.sharded():
            yield
            return
        whole, student, teacher = self._whole(), self.student, self.teacher
        self._twin, self.student = sharding.twins(whole, student)
        # on its own: a layer that runs the teacher's attention (--active) has the teacher's very modules
        self.teacher = None if teacher is None else sharding.twins(teacher)[0]
        self.model, modules = self.to_shard(self.student, self.teacher)
        self.model_wrapped = self.model
        sharding.shard(modules, self.args.device)
        try:
            yield
            trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
            sharding.gather(self._trainable(), trained)
        finally:
            self._twin, self.student, self.teacher = None, student, teacher
            self.model = self.model_wrapped = whole

    # -- checkpoints: the frozen weights are in STUDENT already

    def _whole(self) -> nn.Module:
        model = self.model if self._twin is None else self._twin
        assert model is not None
        return model

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._whole().named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        target = Path(output_dir or self.folder)
        target.mkdir(parents=True, exist_ok=True)
        if not processes.sharded():
            save_file({name: p.detach().contiguous() for name, p in self._trainable().items()}, target / TRAINABLE_FILE)
        if processes.is_main():  # of shards, every process comes here
            self.tally.save(target, seconds=self.seconds)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not processes.sharded():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_shards(Path(output_dir), self._trainable(), self.optimizer)
        assert self.lr_scheduler is not None
        if processes.is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        together.meet()  # the main process writes next that the checkpoint is whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint, trainable = Path(resume_from_checkpoint), self._trainable()
        shards = sharding.holds_shards(checkpoint)
        saved = {} if shards else load_file(checkpoint / TRAINABLE_FILE)
        if (sharding.names_in(checkpoint) if shards else saved.keys()) != trainable.keys():
            raise UserError(f"{resume_from_checkpoint} holds other parameters than those that train now")
        if shards:
            sharding.load_shards(checkpoint, trainable)
        else:
            sharding.load_whole(trainable, saved)
        self.tally.load(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._restored = True  # it is the last that is read

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # several processes on CPUs read nothing with transformers 5.17's own
        if checkpoint is None or not (processes.several() or sharding.holds_shards(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        assert self.lr_scheduler is not None
        if sharding.holds_shards(Path(checkpoint)):
            sharding.load_optimizer_shards(Path(checkpoint), self._trainable(), optimizer)
        else:
            saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            sharding.load_whole_optimizer(optimizer, saved) if processes.sharded() else optimizer.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
