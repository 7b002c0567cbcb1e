"""Surgery on a model in memory: the teacher's tensors go into a student of the same shape with swapped attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..modeling import LinearizeAttention, LinearizeForCausalLM
from .anatomy import read_anatomy
from .proof import Call, proven_calls
from .rotation import frequencies
from .starts import start_from_weights
from .student import student_config


def swap(
    model: PreTrainedModel,
    to: str = "based",
    *,
    share_memory: bool = False,
    seed: int = 0,
    **options: Any,
) -> LinearizeForCausalLM:
    """The student of a loaded model, started from its weights alone; `options` of `student_config`, the others and the
    errors as in `convert`. Nothing is swapped before the teacher's attention is proven to be what it was read as."""
    check_whole(model)
    config = student_config(model, to, **options)
    anatomies = read_anatomy(model)
    # Without weights there is nothing to run, and nothing to be wrong about.
    calls = None if model.device.type == "meta" else proven_calls(model, anatomies)
    with torch.device("meta"):
        student = LinearizeForCausalLM(config)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if not share_memory:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    result = student.load_state_dict(tensors, strict=False, assign=True)
    assert not result.unexpected_keys, result.unexpected_keys
    strangers = [name for name in result.missing_keys if ".mixer." not in name]
    assert not strangers, strangers
    fill_buffers(student, model)
    for index, attention in student.mixer_layers():
        start_mixer(attention, model, None if calls is None else calls[index], seed)
    student.tie_weights()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def check_whole(model: PreTrainedModel) -> None:
    """Raises UserError for a teacher whose weights are partly elsewhere, or that carries an adapter."""
    # the modules of an adapter stay when transformers' delete_adapter has removed it
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UserError(
            "the model carries an adapter, or the modules of one: load its base model anew, or merge the adapter into "
            "the weights (PeftModel.from_pretrained(base, adapter).merge_and_unload())"
        )
    meta = {parameter.is_meta for parameter in model.parameters()}
    if True in meta and (False in meta or any(hasattr(module, "_hf_hook") for module in model.modules())):
        raise UserError(
            "some of the model's weights are offloaded: load it whole, or give its folder, which is converted from "
            "file to file in little memory"
        )


def fill_buffers(student: nn.Module, teacher: nn.Module) -> None:
    """Buffers that checkpoints do not hold (rotary frequencies) come from the teacher's modules, where a forward may
    have made plain attributes of them."""
    for name, buffer in list(student.named_buffers()):
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            source = getattr(teacher.get_submodule(owner), attribute)
            student.get_submodule(owner).register_buffer(attribute, source.detach().clone(), persistent=False)


def start_mixer(attention: LinearizeAttention, teacher: PreTrainedModel, call: Call | None, seed: int) -> None:
    """Gives the new parameters of one swapped layer, which has the teacher's weights already, their starts."""
    device, index = attention.device, attention.layer_idx
    attention.mixer.to_empty(device=device).float()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + index)
        attention.mixer.reset_parameters()
    rotates = attention.anatomy.rotary_dim > 0
    start_from_weights(
        attention,
        None if call is None else call.norm,
        frequencies(teacher, index) if rotates else None,
        size=1.0 if call is None or call.norm is not None else call.size(),
    )
