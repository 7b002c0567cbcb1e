"""LoRA through peft, with the mixers' new parameters trained whole beside it."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError


def lora_targets(student: Any, on: str) -> list[str]:
    """Full names of the linear layers that get LoRA.

    `on`: "swapped", the projections of swapped attention; "qkv", those without the output's; "attention", those of the
    kept softmax layers too; "linear", every linear layer of the decoder (never a mixer's, never the head; experts are
    tensors of no layer in transformers, and stay as they are).
    """
    paths = [attention.path for _, attention in student.mixer_layers()]
    linear = [name for name, module in student.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    head = student.get_output_embeddings()
    linear = [name for name in linear if ".mixer." not in name and student.get_submodule(name) is not head]
    if on in ("swapped", "qkv"):
        targets = [name for name in linear if name.rpartition(".")[0] in paths]
        if on == "qkv":
            outputs = {f"{attention.path}.{attention.anatomy.output}" for _, attention in student.mixer_layers()}
            targets = [name for name in targets if name not in outputs]
    elif on == "attention":
        # kept layers sit at the same path under another number
        shapes = {re.sub(r"\.\d+\.", ".#.", path) for path in paths}
        targets = [name for name in linear if re.sub(r"\.\d+\.", ".#.", name.rpartition(".")[0]) in shapes]
    else:
        targets = linear
    if not targets:
        raise UserError(f"--lora-on {on}: the student has no such linear layer")
    return targets


def attach_lora(student: Any, *, rank: int, alpha: float | None, dropout: float, on: str, mixers: bool) -> Any:
    """Wraps `student`, in place, into a PeftModel; with `mixers` they train whole (`modules_to_save`)."""
    from peft import LoraConfig, get_peft_model

    if hasattr(student, "peft_config"):
        raise UserError("the student carries an adapter already: merge it first (merge_and_unload)")
    mixer_paths = [
        f"{attention.path}.mixer"
        for _, attention in student.mixer_layers()
        if any(True for _ in attention.mixer.parameters())
    ]
    targets = lora_targets(student, on)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(student.get_submodule(name), Conv1D) for name in targets),  # else peft warns
        modules_to_save=mixer_paths if mixers and mixer_paths else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks for a property under the name that transformers has since changed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(student, config)


def merged(model: Any) -> Any:
    """The plain student again, LoRA added into its weights and trained mixers in their place."""
    return model.merge_and_unload()


def unloaded(model: Any) -> Any:
    """The plain student as it was before `attach_lora`."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            # unload() would keep the trained copy
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    return model.unload()
