"""What a person gives as a model: where one lies, or by mistake a loaded one inside something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..source import ModelSource


def source_of(model: Any) -> ModelSource:
    """Where a model lies that is not loaded. Raises UsageError for one that is, and is wrapped."""
    if isinstance(model, (str, Path)):
        return ModelSource(str(model))
    parts = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    if "_orig_mod" in parts:
        advice = "pass what was compiled: model._orig_mod"
    elif hasattr(model, "merge_and_unload"):
        advice = "merge its adapter first: model.merge_and_unload()"
    elif isinstance(parts.get("module"), PreTrainedModel):
        advice = "pass what it wraps: model.module"
    else:
        advice = "give a loaded transformers model, a Hub id or a folder"
    raise UsageError(f"{type(model).__name__} is no transformers model that can be converted; {advice}")
