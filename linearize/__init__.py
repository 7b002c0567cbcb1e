"""Turn a pretrained softmax-attention transformer into a linear-time one, and measure what it cost.

The verbs of the command line, as functions: `convert`, `plan`, `distill`, `finetune`, `evaluate`. Importing this package
lets `transformers.AutoModelForCausalLM.from_pretrained` load converted models.
"""

from __future__ import annotations

from typing import Any

from . import modeling

__version__ = "0.1.0"
__all__ = ["convert", "distill", "evaluate", "finetune", "mixers", "modeling", "plan"]

_VERBS = {
    "convert": ".convert",
    "plan": ".convert",
    "distill": ".distill",
    "finetune": ".distill",
    "evaluate": ".evaluate",
}


def mixers() -> dict[str, str]:
    """Names of the mixers, each with a line about it."""
    return {name: mixer.summary for name, mixer in sorted(modeling.MIXERS.items())}


class _Verbs:
    """Stands in for the sub-packages whose name is a verb's, so that `linearize.convert(...)` calls the verb."""


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        import importlib

        return getattr(importlib.import_module(_VERBS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
