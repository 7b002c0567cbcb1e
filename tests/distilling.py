"""Small students, text and options of the tests of training, and what stops a run."""

from __future__ import annotations

import torch

import linearize  # noqa: F401  (registers the classes)
from linearize.convert import convert
from linearize.distill import LogitOptions, TransferOptions
from linearize.distill.trainer import StageTrainer

LENGTH = 24


def rows(count: int = 8, *, vocab: int = 128, seed: int = 0, ignored: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ids = torch.randint(3, vocab, (LENGTH,), generator=generator)
        labels = ids.clone()
        if ignored:  # a different number of scored tokens in every row
            labels[: 2 + 5 * (row % 4)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def student_of(teacher, mixer: str = "linear", **kwargs):
    return convert(teacher, mixer, window=8, sinks=1, **kwargs)


def transfer_options(**kwargs) -> TransferOptions:
    fields = {
        "batch_size": 4,
        "max_length": LENGTH,
        "tokens": 4 * LENGTH * 8,
        "log_steps": 2,
        "device": "cpu",
    }
    return TransferOptions(**{**fields, **kwargs})


def logit_options(**kwargs) -> LogitOptions:
    fields = {
        "batch_size": 4,
        "max_length": LENGTH,
        "tokens": 4 * LENGTH * 6,
        "log_steps": 2,
        "device": "cpu",
    }
    return LogitOptions(**{**fields, "chunk": 32, **kwargs})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stop_at(monkeypatch, step: int) -> None:
    whole = StageTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", interrupted)
