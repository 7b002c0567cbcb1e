"""What the processes of test_several_processes.py run: `python train_together.py PLACE OUT RUNS.json`.

RUNS maps names to options of `distill`, or of `finetune` where they name no stage. `stop` ends a run at that step as a
crash would, with its checkpoints left; `resume` goes on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from linearize import processes
from linearize.distill import distill, finetune
from linearize.distill.trainer import StageTrainer
from linearize.source import load_model

LENGTH = 32


class Stopped(Exception):
    pass


def stop_at(last: int | None) -> Any:
    """Replaces the training step, and gives the one that was."""
    whole = StageTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == last:
            raise Stopped
        return whole(self, *args, **kwargs)

    StageTrainer.training_step = step
    return whole


def train(place: Path, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Each run into `out/NAME`."""
    for name, options in runs.items():
        options = {
            "max_length": LENGTH,
            "batch_size": 5,
            "tokens": 5 * LENGTH * 4,
            "log_steps": 2,
            "device": "cpu",
            "precision": "fp32",
            "dtype": torch.float32,
            **options,
        }
        whole = stop_at(options.pop("stop", None))
        text = str(place / "text.txt")
        try:
            if "stage" in options:
                device = options["device"] if not processes.sharded() else "cpu"
                teacher = load_model(place / "teacher", dtype=torch.float32, device=device or "cuda")
                distill(place / "student", teacher, text, output=out / name, **options)
            else:
                finetune(place / "student", text, output=out / name, **options)
        except Stopped:
            pass
        finally:
            StageTrainer.training_step = whole


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
    # a rank that another waits for in a collective must not hide behind an exit handler
    sys.stdout.flush()
    os._exit(0)
