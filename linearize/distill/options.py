"""The options of each training stage: one dataclass makes the flags, the Python arguments and the record.

Every field carries its help text in `metadata["help"]`; a check that fails names the flag and the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from ..errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
STAGES = ("transfer", "logits", "all")
TRAINABLE = ("all", "new")
LORA_ON = ("swapped", "attention", "linear")


def flag(name: str) -> str:
    """The command line's spelling of a field: `learning_rate` is `--learning-rate`."""
    return "--" + name.replace("_", "-")


def _positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"{flag(name)} must be positive, got {value}")


def _not_negative(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not value >= 0:
            raise UsageError(f"{flag(name)} must be zero or more, got {value}")


def _fraction(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise UsageError(f"{flag(name)} must be between 0 and 1, got {value}")


def _one_of(options: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(options, name)
    if value not in choices:
        raise UsageError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every stage needs. Raises UsageError, naming the flag, for a value out of range."""

    tokens: int | None = _option(None, "Tokens to train on; by default once through the data set.")
    max_length: int = _option(1024, "Tokens in one packed sequence.")
    batch_size: int = _option(8, "Sequences in one forward pass.")
    gradient_accumulation: int = _option(1, "Forward passes for each step of the optimizer.")
    learning_rate: float = _option(1e-3, "Peak learning rate (AdamW).")
    lr_scale: Mapping[str, float] = field(
        default_factory=dict,
        metadata={"help": "Regular expression -> multiplier of the learning rate; the first that matches wins."},
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay, on matrices only.")
    beta1: float = _option(0.9, "AdamW's first beta.")
    beta2: float = _option(0.95, "AdamW's second beta.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 never clips.")
    warmup: float = _option(0.05, "Share of the steps over which the learning rate rises.")
    schedule: str = _option("cosine", "How the learning rate falls after the warmup: cosine, linear, constant.")
    seed: int = _option(0, "Seed of the order of the data and of everything drawn at random.")
    precision: str = _option("auto", "auto, fp32 or bf16 (autocast); trained parameters are fp32 always.")
    device: str | None = _option(None, "cpu, or the accelerator that is there (default).")
    compile: bool = _option(False, "Compile the mixers: half a minute at the start for shorter steps.")
    save_steps: int = _option(500, "Steps between checkpoints.")
    log_steps: int = _option(10, "Steps between lines of the loss log.")

    def __post_init__(self) -> None:
        _positive(self, "tokens", "batch_size", "gradient_accumulation", "learning_rate", "save_steps", "log_steps")
        _not_negative(self, "weight_decay", "max_grad_norm", "seed")
        _fraction(self, "warmup", "beta1", "beta2")
        _one_of(self, "precision", PRECISIONS)
        _one_of(self, "schedule", SCHEDULES)
        if self.max_length < 2:
            raise UsageError(f"--max-length must be at least 2, got {self.max_length}")
        for pattern, scale in self.lr_scale.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--lr-scale: {pattern!r} is not a regular expression: {error}") from None
            if not scale >= 0:
                raise UsageError(f"--lr-scale must be zero or more, got {scale} for {pattern!r}")

    def record(self) -> dict[str, Any]:
        """Plain data for the provenance and for the check that a resumed run is the same run."""
        return asdict(self) | {"lr_scale": dict(self.lr_scale)}


@dataclass(frozen=True, kw_only=True)
class TransferOptions(TrainOptions):
    """Attention transfer: only the new parameters train, each layer on its own (LoLCATs, 2410.10254)."""

    learning_rate: float = _option(1e-2, "Peak learning rate (AdamW).")


@dataclass(frozen=True, kw_only=True)
class _HeadOptions(TrainOptions):
    """What the two stages with a loss on the vocabulary share."""

    chunk: int = _option(1024, "Tokens whose logits over the vocabulary exist at the same time.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward pass.")
    lora_alpha: float | None = _option(None, "LoRA's scale numerator; by default twice the rank.")
    lora_dropout: float = _option(0.0, "Dropout on LoRA's input.")
    lora_on: str = _option(
        "swapped",
        "Projections that get LoRA: those of swapped attention, of every attention, or every linear layer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "chunk", "lora_alpha")
        _fraction(self, "lora_dropout")
        _one_of(self, "lora_on", LORA_ON)


@dataclass(frozen=True, kw_only=True)
class LogitOptions(_HeadOptions):
    """Logit distillation: forward KL from the teacher, on all parameters, on the new ones, or on LoRA."""

    learning_rate: float = _option(2e-4, "Peak learning rate (AdamW).")
    temperature: float = _option(1.0, "Both distributions are softened by it; the loss is scaled by its square.")
    ce_weight: float = _option(0.0, "Share of cross-entropy on the labels in the loss; the rest is KL.")
    train: str = _option("all", "Parameters that train without --lora-rank: all, or only the new ones.")
    lora_rank: int | None = _option(None, "Train LoRA of this rank (and the new parameters) instead; merged after.")
    lora_on: str = _option(
        "linear",
        "Projections that get LoRA: those of swapped attention, of every attention, or every linear layer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "temperature", "lora_rank")
        _fraction(self, "ce_weight")
        _one_of(self, "train", TRAINABLE)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(_HeadOptions):
    """LoRA fine-tuning with cross-entropy on the labels, through peft."""

    learning_rate: float = _option(1e-4, "Peak learning rate (AdamW).")
    lora_rank: int = _option(8, "LoRA's rank.")
    train_mixers: bool = _option(True, "Train the mixers' new parameters too.")
    merge: bool = _option(False, "Merge LoRA into the weights: OUT is a plain converted model, not an adapter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "lora_rank")


Options = TypeVar("Options", bound=TrainOptions)


def with_overrides(options: Options, overrides: Mapping[str, Any]) -> Options:
    """`options` with those `overrides` that it knows. The checks run again."""
    known = {entry.name for entry in fields(options)}
    return replace(options, **{name: value for name, value in overrides.items() if name in known})


def check_overrides(overrides: Mapping[str, Any], *stages: type[TrainOptions]) -> None:
    """Raises UsageError for a name that no stage of the run knows."""
    known = sorted({entry.name for stage in stages for entry in fields(stage)})
    for name in overrides:
        if name not in known:
            raise UsageError(f"unknown option {name!r} for this stage; there are: {', '.join(known)}")
