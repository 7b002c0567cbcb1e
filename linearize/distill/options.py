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
LOSSES = ("relative", "mse", "l2")
TRAINABLE = ("all", "new", "attention", "all_but_mlp")
LORA_ON = ("qkv", "swapped", "attention", "linear")
_LORA_ON_HELP = (
    "Projections that get LoRA: qkv or all (swapped) of swapped attention, of every attention, or every linear layer."
)


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
    batch_size: int = _option(8, "Sequences in one forward pass, of all processes together.")
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
    min_learning_rate: float = _option(0.0, "Where a cosine ends.")
    window_dropout: float = _option(0.0, "Share of the steps whose windows are off, so that the linear branch learns.")
    repeats: float = _option(0.0, "Share of the sequences whose second half repeats the first: it teaches recall.")
    skip_tokens: int = _option(0, "Tokens of the data to pass over: those that an earlier stage has had.")
    seed: int = _option(0, "Seed of the order of the data and of everything drawn at random.")
    precision: str = _option("auto", "auto, fp32 or bf16 (autocast); trained parameters are fp32 always.")
    device: str | None = _option(None, "cpu, or the accelerator that is there (default).")
    compile: bool = _option(False, "Compile the layers: a later start, shorter steps.")
    cuda_graph: bool = _option(False, "Record a step as a CUDA graph: a small model does not wait for Python.")
    save_steps: int = _option(500, "Steps between checkpoints.")
    log_steps: int = _option(10, "Steps between lines of the loss log.")

    def __post_init__(self) -> None:
        _positive(self, "tokens", "batch_size", "gradient_accumulation", "learning_rate", "save_steps", "log_steps")
        _not_negative(self, "weight_decay", "max_grad_norm", "seed", "min_learning_rate", "skip_tokens")
        _fraction(self, "warmup", "beta1", "beta2", "window_dropout", "repeats")
        _one_of(self, "precision", PRECISIONS)
        _one_of(self, "schedule", SCHEDULES)
        if self.min_learning_rate and (self.schedule != "cosine" or self.min_learning_rate > self.learning_rate):
            raise UsageError(
                f"--min-learning-rate {self.min_learning_rate} is where a cosine ends: it needs --schedule cosine and "
                f"a --learning-rate above it, got {self.schedule} and {self.learning_rate}"
            )
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
    """Attention transfer: each layer on its own, by default only its new parameters (LoLCATs, 2410.10254).

    Losses: `relative`, squared error in units of the teacher's energy; `mse`, its mean over tokens and channels
    (LoLCATs scales it by 1000); `l2`, the norm of a token's error times d^-1/2, a mean over tokens (RADLADS,
    2505.03005).
    """

    learning_rate: float = _option(1e-2, "Peak learning rate (AdamW).")
    loss: str = _option("relative", "Error of a layer's attention output: relative, mse, l2.")
    loss_scale: float = _option(1.0, "Multiplies the loss.")
    train: str = _option("new", "Parameters that train: the new ones, or all of swapped attention.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "loss_scale")
        _one_of(self, "loss", LOSSES)
        _one_of(self, "train", ("new", "attention"))


@dataclass(frozen=True, kw_only=True)
class MixingOptions(TrainOptions):
    """The matrix of attention weights, each layer on its own (MOHAWK's first stage, 2408.10189)."""

    learning_rate: float = _option(1e-3, "Peak learning rate (AdamW).")
    max_length: int = _option(256, "Tokens in one packed sequence: memory is quadratic in it.")
    train: str = _option("new", "Parameters that train: the new ones, or all of swapped attention.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "train", ("new", "attention"))


@dataclass(frozen=True, kw_only=True)
class BlockOptions(TrainOptions):
    """Outputs of whole decoder layers, each on its own (MOHAWK's second stage, 2408.10189)."""

    train: str = _option("attention", "Parameters that train: new ones, swapped attention, or all of its layer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "train", ("new", "attention", "all"))


@dataclass(frozen=True, kw_only=True)
class _HeadOptions(TrainOptions):
    """What the two stages with a loss on the vocabulary share."""

    chunk: int = _option(1024, "Tokens whose logits over the vocabulary exist at the same time.")
    gradient_checkpointing: bool | None = _option(
        None, "Recompute activations in the backward pass; by default where they would take a quarter of free memory."
    )
    lora_alpha: float | None = _option(None, "LoRA's scale numerator; by default twice the rank.")
    lora_dropout: float = _option(0.0, "Dropout on LoRA's input.")
    lora_on: str = _option("swapped", _LORA_ON_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "chunk", "lora_alpha")
        _fraction(self, "lora_dropout")
        _one_of(self, "lora_on", LORA_ON)


@dataclass(frozen=True, kw_only=True)
class LogitOptions(_HeadOptions):
    """Logit distillation: forward KL from the teacher, on all parameters, on some of them, or on LoRA.

    `active` is the stepwise replacement of Mamba-in-Llama (2408.15237).
    """

    learning_rate: float = _option(2e-4, "Peak learning rate (AdamW).")
    temperature: float = _option(1.0, "Both distributions are softened by it; the loss is scaled by its square.")
    ce_weight: float = _option(0.0, "Share of cross-entropy on the labels in the loss; the rest is KL.")
    train: str = _option("all", "Parameters that train without --lora-rank: all, new, attention, all_but_mlp.")
    lora_rank: int | None = _option(None, "Train LoRA of this rank (and the new parameters) instead; merged after.")
    lora_on: str = _option("linear", _LORA_ON_HELP)
    active: str | None = _option(
        None,
        "Swapped layers that run their mixer, 0,2,4 or every:2; the others run the teacher's attention for this stage.",
    )

    linear_branch: bool = _option(True, "Off: the windows alone learn, the control that says what the branch adds.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.linear_branch and self.window_dropout:
            raise UsageError("--no-linear-branch with --window-dropout would leave nothing: choose one")
        _positive(self, "temperature", "lora_rank")
        _fraction(self, "ce_weight")
        _one_of(self, "train", TRAINABLE)
        if self.active is not None and self.lora_rank is not None:
            raise UsageError("--active goes without --lora-rank: LoRA would be laid over the teacher's own attention")


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


# What `--stage` names, besides both of transfer and logits.
KINDS: dict[str, type[TrainOptions]] = {
    "transfer": TransferOptions,
    "logits": LogitOptions,
    "mixing": MixingOptions,
    "blocks": BlockOptions,
}
STAGES = (*KINDS, "all")

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
