"""Bringing a converted student near its teacher, and adapting it: on transformers' Trainer.

- transfer: attention outputs, layer by layer, the new parameters alone (transfer.py)
- mixing, blocks: attention weights, and whole decoder layers' outputs, layer by layer (mixing.py, blocks.py)
- logits: KL from the teacher's logits, all parameters or LoRA (logits.py)
- finetune: cross-entropy through LoRA (stages.py)

The verbs are imported when first used: transformers' Trainer takes seconds, and `plan` reads memory.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory import training_flops, training_memory
from .options import BlockOptions, FinetuneOptions, LogitOptions, MixingOptions, TrainOptions, TransferOptions

if TYPE_CHECKING:
    from .run import distill, finetune
    from .stages import StageResult

__all__ = [
    "BlockOptions",
    "FinetuneOptions",
    "LogitOptions",
    "MixingOptions",
    "StageResult",
    "TrainOptions",
    "TransferOptions",
    "distill",
    "finetune",
    "training_flops",
    "training_memory",
]

_LATE = {"distill": ".run", "finetune": ".run", "StageResult": ".stages"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
