"""The options of the two benchmarks: one dataclass makes the flags, the Python arguments and the record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError

OPS = ("linear", "retention", "mamba2", "gla", "based", "gated_delta", "window", "softmax")
DECODE = "decode"  # the recurrent step, named beside the operations in `--ops`
SDPA_CUDNN, SDPA_FLASH = "sdpa-cudnn", "sdpa-flash"
PROVIDERS = ("linearize", "fla", "fla-parallel", "mamba_ssm", SDPA_CUDNN, SDPA_FLASH)

MODELS = ("teacher", "student")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _numbers(options: Any, name: str) -> list[int]:
    """The whole numbers of a comma-separated field, rising, each once."""
    text = getattr(options, name)
    try:
        found = sorted({int(part) for part in str(text).split(",")})
    except ValueError:
        raise UsageError(f"{_flag(name)} wants whole numbers with commas between them, got {text!r}") from None
    if found[0] < 1:
        raise UsageError(f"{_flag(name)} must be at least 1, got {found[0]}")
    return found


def _names(options: Any, name: str, known: tuple[str, ...]) -> list[str]:
    """The names of a comma-separated field, in the order of `known`; all of them where it is None."""
    text = getattr(options, name)
    if text is None:
        return list(known)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for part in asked:
        if part not in known:
            raise UsageError(f"{_flag(name)}: there is no {part!r}; there are {', '.join(known)}")
    if not asked:
        raise UsageError(f"{_flag(name)} is empty; there are {', '.join(known)}")
    return [entry for entry in known if entry in asked]


def _at_least(options: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{_flag(name)} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What `bench kernels` measures. Raises UsageError, naming the flag, for a value out of range."""

    ops: str | None = _option(None, f"Some of {','.join((*OPS, DECODE))}.  [default: all]")
    providers: str | None = _option(None, f"Some of {','.join(PROVIDERS)}.  [default: what is installed]")
    tokens: str = _option("2048,8192,32768", "Lengths.")
    batch: int = _option(1, "Sequences.")
    heads: int = _option(32, "Query heads.")
    kv_heads: int | None = _option(None, "Key heads.  [default: as many as query heads]")
    head_dim: int = _option(128, "Channels of a head (based has queries and keys of 16).")
    decode_batch: str = _option("64", "Sequences in a step of decoding.")
    softmax_max_tokens: int = _option(131072, "Longest length of what is quadratic in it.")
    only_forward: bool = _option(False, "Leave the backward pass out.")
    autograd_thread: bool = _option(
        False, "Backward passes in autograd's own thread; its hand-over to another core can outlast a short kernel."
    )
    timing: bool = _option(True, "Speed and memory; --no-timing for the cold starts alone.")
    cold_start: bool = _option(False, "Also the seconds of each first call, from an empty Triton cache.")
    jobs: int = _option(1, "Cold starts measured at once; more than 1 disturb each other.")
    warm_cache: int | None = _option(
        None, "Child processes that fill Triton's cache first, 0 for none.  [default: on a GPU one a core]"
    )
    merge: bool = _option(False, "Keep the rows that OUT has of other operations, providers and lengths.")

    def __post_init__(self) -> None:
        self.chosen_ops()
        self.chosen_providers()
        self.lengths()
        self.decode_batches()
        _at_least(self, 1, "batch", "heads", "kv_heads", "head_dim", "softmax_max_tokens", "jobs")
        _at_least(self, 0, "warm_cache")
        if self.heads % self.groups():
            raise UsageError(f"--kv-heads {self.kv_heads} does not divide --heads {self.heads}")
        if not self.timing and not self.cold_start:
            raise UsageError("--no-timing leaves nothing to measure without --cold-start")

    def chosen_ops(self) -> list[str]:
        return _names(self, "ops", (*OPS, DECODE))

    def chosen_providers(self) -> list[str]:
        return _names(self, "providers", PROVIDERS)

    def lengths(self) -> list[int]:
        return _numbers(self, "tokens")

    def decode_batches(self) -> list[int]:
        return _numbers(self, "decode_batch")

    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What `bench model` measures. Raises UsageError, naming the flag, for a value out of range."""

    models: str | None = _option(None, "teacher or student alone.  [default: both]")
    contexts: str = _option("1,4096,32768,131072", "Lengths.")
    batch: str = _option("1,4", "Sequences at once.")
    new_tokens: int = _option(64, "Tokens that are decoded and timed after each context.")
    prefill: bool = _option(True, "Also time the reading of the context.")
    teacher_max_prefill: int | None = _option(None, "Longest context that the teacher reads.")
    compile: bool = _option(False, "Also decode with a static cache, compiled; each model's faster figure counts.")
    merge: bool = _option(False, "Keep the rows that OUT has of other models, batches and contexts.")
    config: str | None = _option(None, "Random weights of this config (file, folder, Hub id), converted here.")
    to: str | None = _option(None, "With --config: the mixer.")
    window: int | None = _option(None, "With --config: keys of exact softmax, 0 for none.")
    sinks: int | None = _option(None, "With --config: first tokens always visible.")
    keep_softmax: str | None = _option(None, "With --config: 0,7,14 | every:6 | heads:18.6,17.3.")
    keep_window: int | None = _option(None, "With --config: keys that kept heads see.")

    def __post_init__(self) -> None:
        self.lengths()
        self.batches()
        self.chosen_models()
        _at_least(self, 2, "new_tokens")
        _at_least(self, 1, "teacher_max_prefill")
        if self.config is None:
            for name in ("to", "window", "sinks", "keep_softmax", "keep_window"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{_flag(name)} goes with --config; a STUDENT is converted already")
        elif self.to is None:
            raise UsageError("--config needs --to: which mixer the student has")

    def lengths(self) -> list[int]:
        return _numbers(self, "contexts")

    def chosen_models(self) -> list[str]:
        return _names(self, "models", MODELS)

    def batches(self) -> list[int]:
        return _numbers(self, "batch")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
