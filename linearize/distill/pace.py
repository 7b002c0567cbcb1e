"""What a person sees of a stage while it runs, and when it stops early."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from .. import processes
from .interrupt import Interrupt


class Pace(TrainerCallback):
    """A bar on stderr, a line in the log wherever a checkpoint is due, and a checkpoint and the end on SIGTERM."""

    def __init__(self, title: str, interrupt: Interrupt) -> None:
        self.title, self.interrupt = title, interrupt
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint has brought those of the run that wrote it
        if not processes.is_main():
            # dropout differs between the rows of a batch, whichever process has them
            torch.manual_seed(args.seed + processes.rank())
            return
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
        if self.interrupt.agreed:
            control.should_save = control.should_training_stop = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
