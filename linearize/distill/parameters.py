"""Which parameters train, in which precision, and which models fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .options import TrainOptions

HALF = (torch.float16, torch.bfloat16)


def is_new(name: str) -> bool:
    """Whether a parameter came with the conversion: those of the `mixer` sub-modules, and no others."""
    return ".mixer." in name


def trainable_names(student: Any, train: str) -> set[str]:
    """Names of the parameters that `--train` means.

    "all"; "new", what came with the conversion; "attention", all of the swapped attention modules; "all_but_mlp", all
    but the decoder layers' MLPs (any child of a layer that has matrices and is not its attention); "layers", all of
    the decoder layers whose attention is swapped.
    """
    names = {name for name, _ in student.named_parameters()}
    anatomies = [attention.anatomy for _, attention in student.mixer_layers()]
    if train == "new":
        return {name for name in names if is_new(name)}
    if train == "attention":
        return _under(names, [anatomy.path for anatomy in anatomies])
    if train == "layers":
        return _under(names, [anatomy.layer_path for anatomy in anatomies])
    if train == "all_but_mlp" and anatomies:
        stack, leaf = anatomies[0].stack_path, anatomies[0].path.rpartition(".")[2]
        mlps = [
            f"{stack}.{index}.{child}"
            for index, layer in student.get_submodule(stack).named_children()
            for child, module in layer.named_children()
            if child != leaf and any(parameter.ndim > 1 for parameter in module.parameters())
        ]
        return names - _under(names, mlps)
    return names


def _under(names: set[str], paths: list[str]) -> set[str]:
    starts = tuple(path + "." for path in paths)
    return {name for name in names if name.startswith(starts)}


@contextmanager
def training_only(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Inside, only parameters of these names train, in fp32; after, flags, dtypes and mode are as before.

    Half precision would lose an update smaller than 1/256 of the parameter.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if name in names}
    was_training = model.training
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names and parameter.dtype in HALF:
                parameter.data = parameter.data.float()
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(flags[name])
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        model.train(was_training)


@contextmanager
def cache_setting_kept(config: Any) -> Iterator[None]:
    """The Trainer sets `config.use_cache` to False; a saved student must not carry that.

    A converted model's config hands the setting on to the teacher's, which it holds.
    """
    missing = object()
    configs = [each for each in (config, getattr(config, "parent_config", None)) if each is not None]
    before = [vars(each).get("use_cache", missing) for each in configs]
    try:
        yield
    finally:
        for each, value in zip(configs, before, strict=True):
            if value is missing:
                vars(each).pop("use_cache", None)
            else:
                vars(each)["use_cache"] = value


def optimizer_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """AdamW's groups: the first pattern of `lr_scale` in the name scales the rate, matrices alone decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((s for pattern, s in options.lr_scale.items() if re.search(pattern, name)), 1.0)
            decay = options.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": options.learning_rate * scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def check_pair(student: Any, teacher: Any, *, same_layers: bool) -> None:
    """Raises UserError unless vocabularies agree and, with `same_layers`, sizes and numbers of layers too."""
    facts = ["vocab_size"] + (["hidden_size", "num_hidden_layers"] if same_layers else [])
    for fact in facts:
        ours, theirs = getattr(student.config, fact), getattr(teacher.config, fact)
        if ours != theirs:
            raise UserError(
                f"student and teacher differ: {fact} is {ours} in the student and {theirs} in the teacher. "
                "Pass as --teacher the model that the student was converted from."
            )
    # configs can say less than the weights: an embedding resized without its config
    ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"student and teacher differ: the student has {ours} logits a token, the teacher {theirs}. "
            "Pass as --teacher the model that the student was converted from."
        )


def own_memory(student: nn.Module, teacher: nn.Module) -> None:
    """Copies what `student` shares with `teacher` (`convert(share_memory=True)`), which must not train."""
    shared = {parameter.data_ptr() for parameter in teacher.parameters()}
    for parameter in student.parameters():
        if parameter.data_ptr() in shared:
            parameter.data = parameter.data.clone()
