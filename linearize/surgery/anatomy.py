"""Reads what a model's softmax attention modules are made of, and refuses what does not fit, by name."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..modeling import AttentionAnatomy, LinearizeConfig
from .families import FAMILIES, Family


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's config.

    Raises:
        UserError: already converted, no decoder, or an architecture that nobody described.
    """
    model_type = config.model_type
    if isinstance(config, LinearizeConfig) or model_type == LinearizeConfig.model_type:
        raise UserError(
            "this model is already converted: give the original teacher, or train this one with 'linearize distill'"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model_type!r} is an encoder-decoder; linearize converts decoder-only language models")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if type(config) in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"{model_type!r} is an encoder; linearize converts decoder-only language models: {known}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{model_type!r} is no causal language model; linearize converts {known}")
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UserError(f"architecture {model_type!r} is not supported{hint}; there are: {known} ('linearize ls families')")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The teacher's class without weights, on the meta device: shapes and names in a second, whatever its size.

    Raises:
        UserError: as `family_of`.
    """
    family_of(config)
    # A config as old as its checkpoint makes transformers warn about fields that conversion does not touch.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    finally:
        logger.setLevel(level)


def read_anatomy(model: PreTrainedModel) -> list[AttentionAnatomy]:
    """One anatomy a decoder layer, read off the modules (a meta model will do).

    Raises:
        UserError: the architecture is not supported, or its attention is not made as its family says; names the
            module and what was found.
    """
    config = model.config
    family = family_of(config)
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    rotary_dim = _rotary_dim(model)
    return [_read_layer(config, family, index, layer, rotary_dim) for index, layer in enumerate(layers)]


def _rotary_dim(model: PreTrainedModel) -> int:
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor):
            return 2 * frequencies.shape[0]
    return 0


def _window(config: PreTrainedConfig, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types:
        return window if types[index] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _read_layer(
    config: PreTrainedConfig, family: Family, index: int, layer: nn.Module, rotary_dim: int
) -> AttentionAnatomy:
    path = f"{family.layers}.{index}.{family.attention}"
    module = layer.get_submodule(family.attention)
    found: dict[str, Any] = {name: getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    missing = [name for name, projection in found.items() if not isinstance(projection, nn.Linear)]
    if missing:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
        raise UserError(f"{path} has no linear {', '.join(missing)}; it is made of: {children}")
    q, k, v, o = (found[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = {"q_proj": (q, heads), "k_proj": (k, groups), "v_proj": (v, groups)}
    for name, (projection, count) in shapes.items():
        if projection.out_features != count * dim:
            raise UserError(
                f"{path}.{name} gives {projection.out_features} channels, where config.json's {count} heads of "
                f"{dim} make {count * dim}"
            )
    norm = getattr(module, "q_norm", None)
    if (norm is not None) != family.qk_norm or (norm is not None and tuple(norm.weight.shape) != (dim,)):
        raise UserError(f"{path}: query and key norms are not those of a {family.name} model: q_norm is {norm}")
    return AttentionAnatomy(
        path=path,
        hidden_size=q.in_features,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=dim,
        scale=float(getattr(module, "scaling", dim**-0.5)),
        rotary_dim=rotary_dim,
        q_bias=q.bias is not None,
        k_bias=k.bias is not None,
        v_bias=v.bias is not None,
        o_bias=o.bias is not None,
        qk_norm_eps=None if norm is None else float(norm.variance_epsilon),
        window=_window(config, index),
    )
