"""Reads what a model's softmax attention modules are made of, and refuses what does not fit, by name."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from ..errors import UserError, one_line
from ..modeling import AttentionAnatomy, LinearizeConfig
from ..modeling.projections import weight_and_bias
from .families import FAMILIES, Family
from .parts import (
    ALIBI_MAKERS,
    ALIBI_SCALES,
    BOUNDS,
    CAPS,
    HEAD_DIMS,
    NORMS,
    NULLS,
    OUTPUTS,
    PROJECTION,
    SCALES,
    first,
    inputs_of,
    parts_text,
)
from .rotation import frequencies, rotation_of

NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HOW_TO_ADD = "CONTRIBUTING.md shows how a family is added: its parts' names in linearize/surgery/parts.py"


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's config; one that is not listed is taken as its modules show it.

    Raises:
        UserError: already converted, or no decoder-only language model.
    """
    model_type = config.model_type
    if isinstance(config, LinearizeConfig) or model_type == LinearizeConfig.model_type:
        raise UserError(
            "this model is already converted: give the original teacher, or train this one with 'linearize distill'"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model_type!r} is an encoder-decoder; linearize converts decoder-only language models")
    try:
        text = config.get_text_config()
    except ValueError as error:  # several of them
        raise UserError(f"{model_type!r} is a model of several parts: {one_line(error, 300)}") from error
    if text is not config:
        parts = sorted(name for name, part in vars(config).items() if isinstance(part, PreTrainedConfig))
        raise UserError(
            f"{model_type!r} is a model of several parts ({', '.join(parts)}); linearize converts language models that "
            f"stand alone, here a {text.model_type!r}: save that part in a folder of its own, and give that"
        )
    if model_type in FAMILIES and not getattr(config, "add_cross_attention", False):
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if type(config) in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"{model_type!r} is an encoder; linearize converts decoder-only language models: {known}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{model_type!r} is no causal language model; linearize converts {known}")
    if getattr(config, "add_cross_attention", False):
        raise UserError(f"{model_type!r} with cross-attention is not supported: linearize converts language models")
    return Family(summary="read off its modules, and proven at the conversion")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The teacher's class without weights, on the meta device: shapes and names in a second, whatever its size.

    Raises:
        UserError: as `family_of`; a config of which transformers makes no model.
    """
    family_of(config)
    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ImportError as error:
        raise UserError(
            f"a model of kind {config.model_type!r} needs more than is installed: {one_line(error, 300)}"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"transformers makes no model of this config ({type(error).__name__}: {one_line(error, 300)}): a number or "
            "a name in config.json is wrong; download it again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """A config as old as its checkpoint makes transformers warn about fields that conversion does not touch."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_anatomy(model: PreTrainedModel) -> list[AttentionAnatomy]:
    """One anatomy a decoder layer, read off the modules (a meta model will do).

    Raises:
        UserError: the model has attention of parts that are not known, or not supported yet; names the module and what
            was found.
    """
    family = family_of(model.config)
    layers, attention = _find_layers(model)
    try:
        return [_Reader(model, family, index, f"{layers}.{index}.{attention}").read() for index in range(_depth(model))]
    except UserError:
        raise
    except ValueError as error:  # a fact that no attention has
        raise UserError(str(error)) from error


def _depth(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "num_hidden_layers", 0))


def _find_layers(model: PreTrainedModel) -> tuple[str, str]:
    """The path of the decoder's layers, and the name of the attention module in each: the child that knows its layer's
    index."""
    found, near = [], []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != _depth(model) or not len(module):
            continue
        near.append(f"{path}.0: {parts_text(module[0])}")
        children = {name: child for name, child in module[0].named_children() if hasattr(child, "layer_idx")}
        known = [name for name, child in children.items() if inputs_of(child) is not None]
        names = known or list(children)
        if len(names) == 1:
            found.append((path, names[0]))
    if len(found) == 1:
        return found[0]
    kind = model.config.model_type
    if found:
        raise UserError(f"{kind!r} has several stacks of attention layers: {', '.join(path for path, _ in found)}")
    layers = "; ".join(near) or "no list of that length"
    raise UserError(
        f"{kind!r} has no stack of {_depth(model)} layers with one attention module each: {layers}. {HOW_TO_ADD}"
    )


class _Reader:
    """Reads one attention module."""

    def __init__(self, model: PreTrainedModel, family: Family, index: int, path: str) -> None:
        self.model, self.family, self.index, self.path = model, family, index, path
        self.config: Any = model.config
        try:
            self.module = model.get_submodule(path)
        except AttributeError:
            layer = model.get_submodule(path.rpartition(".")[0])
            raise UserError(f"there is no {path}: that layer is made of {parts_text(layer)}") from None
        self.arguments = inspect.signature(type(self.module).forward).parameters

    def read(self) -> AttentionAnatomy:
        module, config = self.module, self.config
        self._refuse_what_comes_later()
        inputs, output = inputs_of(module), first(module, OUTPUTS, PROJECTION)
        if inputs is None or output is None:
            what = "no projections" if inputs is None else "no output projection"
            raise UserError(
                f"{self.path} ({type(module).__name__}) has {what} of a name that is known; it is made of: "
                f"{parts_text(module)}. {HOW_TO_ADD}"
            )
        if "mixer" in self.path.split("."):  # by that name new parameters are told from the teacher's
            raise UserError(f"{self.path}: attention modules of that name are not supported")
        names, rows = inputs
        self._refuse_quantised((*names, output))
        heads = config.num_attention_heads
        named = first(module, HEAD_DIMS, int)
        dim = getattr(module, named) if named else config.hidden_size // heads
        scale = first(module, SCALES, (int, float))
        norms, norm_over = self._norms(heads, dim)
        rotary_dim, rotary, wide = self._rotation()
        null = self._null(heads)
        anatomy = AttentionAnatomy(
            path=self.path,
            hidden_size=weight_and_bias(module.get_submodule(names[0]))[0].shape[1],
            num_heads=heads,
            num_kv_heads=self._groups(names, output, heads, dim),
            head_dim=dim,
            scale=float(getattr(module, scale)) if scale else dim**-0.5,
            window=self._window(),
            inputs=list(names),
            rows=rows,
            output=output,
            norms=norms,
            norm_over=norm_over,
            rotary_dim=rotary_dim,
            rotary=rotary,
            rotary_wide=wide,
            logit_cap=self._set(CAPS),
            alibi=self._slopes(heads) if self._has_alibi() else [],
            null_logits=null,
            adds_residual="residual" in self.arguments,
        )
        self._refuse_strangers((*names, output, *norms), null)
        return anatomy

    def _refuse_what_comes_later(self) -> None:
        module = self.module
        later = {
            f"bounded projections ({', '.join(BOUNDS)} {self._set(BOUNDS)})": self._set(BOUNDS) is not None,
            "attention to both sides": getattr(module, "is_causal", True) is False,
        }
        for part, present in later.items():
            if present:
                raise UserError(
                    f"{self.path} ({type(module).__name__}) has {part}, which linearize does not support yet"
                )

    def _refuse_quantised(self, names: tuple[str, ...]) -> None:
        """A weight that is packed, or in numbers that are scaled elsewhere, shows neither shape nor value."""
        for name in names:
            projection = self.module.get_submodule(name)
            weight = projection.get_parameter("weight")
            shape = (getattr(projection, "out_features", None), getattr(projection, "in_features", None))
            if weight.dtype not in NUMBERS or (None not in shape and tuple(weight.shape) != shape):
                kind = str(weight.dtype).removeprefix("torch.")
                raise UserError(
                    f"{self.path}.{name} ({type(projection).__name__}) holds its weight quantised ({kind}, "
                    f"{list(weight.shape)}), and linearize converts models as they were before that: load this one "
                    "without quantization_config, or give the model that it was made of"
                )

    def _set(self, names: tuple[str, ...]) -> float | None:
        """The first of these attributes, of the module or the config, that is set."""
        values = (getattr(self.module, name, None) or getattr(self.config, name, None) for name in names)
        return next((float(value) for value in values if value), None)

    def _has_alibi(self) -> bool:
        return "alibi" in self.arguments and bool(getattr(self.config, "alibi", True))

    def _slopes(self, heads: int) -> list[float]:
        """ALiBi's slope a head, as the family's own function makes them."""
        family = sys.modules[type(self.module).__module__]
        make = next((getattr(family, name) for name in ALIBI_MAKERS if hasattr(family, name)), None)
        if make is None:
            raise UserError(
                f"{self.path} ({type(self.module).__name__}) has ALiBi positions, and beside it is no function of a "
                f"name that is known: {', '.join(ALIBI_MAKERS)}. {HOW_TO_ADD}"
            )
        made = make(torch.ones(1, 2, dtype=torch.long, device="cpu"), heads, torch.float32).view(heads, 2)
        scale = first(self.module, ALIBI_SCALES, (int, float))
        return ((made[:, 1] - made[:, 0]).double() * (getattr(self.module, scale) if scale else 1.0)).tolist()

    def _null(self, heads: int) -> str | None:
        """The name of the parameter that is a logit of each head without a key."""
        name = first(self.module, NULLS, nn.Parameter)
        if name is not None and tuple(getattr(self.module, name).shape) != (heads,):
            shape = tuple(getattr(self.module, name).shape)
            raise UserError(f"{self.path}.{name} is {shape}, where a logit for each of {heads} heads is known")
        return name

    def _refuse_strangers(self, known: tuple[str, ...], null: str | None) -> None:
        """Every tensor of the module must belong to a part that the student takes over."""
        parts = tuple(f"{name}." for name in known)
        strangers = [name for name in self.module.state_dict() if name != null and not name.startswith(parts)]
        if strangers:
            raise UserError(
                f"{self.path} ({type(self.module).__name__}) has parts that are not known: {', '.join(strangers)}. "
                f"{HOW_TO_ADD}"
            )

    def _groups(self, names: tuple[str, ...], output: str, heads: int, dim: int) -> int:
        """Key groups, from the shapes."""
        shapes = {name: weight_and_bias(self.module.get_submodule(name))[0].shape for name in (*names, output)}
        if len(names) == 3:
            q, k, v = (shapes[name][0] for name in names)
            if q != heads * dim:
                raise UserError(
                    f"{self.path}.{names[0]} gives {q} channels, where config.json's {heads} heads of {dim} make "
                    f"{heads * dim}"
                )
            if k % dim or k != v:
                raise UserError(
                    f"{self.path}: {names[1]} and {names[2]} give {k} and {v} channels, which are not as many heads of "
                    f"{dim}"
                )
            groups = k // dim
        else:
            rows = shapes[names[0]][0]
            groups = (rows // dim - heads) // 2
            if (heads + 2 * groups) * dim != rows:
                raise UserError(
                    f"{self.path}.{names[0]} gives {rows} channels, which are not {heads} query heads of {dim} with "
                    "their keys and values"
                )
        if groups < 1 or heads % groups:
            raise UserError(f"{self.path}: {heads} query heads do not divide into {groups} key heads")
        if shapes[output][1] != heads * dim:
            raise UserError(
                f"{self.path}.{output} takes {shapes[output][1]} channels, where {heads} heads of {dim} make "
                f"{heads * dim}"
            )
        return groups

    def _norms(self, heads: int, dim: int) -> tuple[list[str], str]:
        """The names of the norms of queries and keys, and what they are given, by their weights' shapes."""
        for names in NORMS:
            norm = getattr(self.module, names[0], None)
            if not isinstance(norm, nn.Module) or not isinstance(getattr(self.module, names[1], None), nn.Module):
                continue
            shapes = {tuple(parameter.shape) for parameter in norm.parameters()}
            if any(isinstance(part, nn.ModuleList) for part in norm.modules()):
                return list(names), "head_first"  # a norm a head
            if shapes <= {(dim,), (heads, dim)}:
                return list(names), "head"
            if shapes == {(heads * dim,)}:
                return list(names), "channels"
            raise UserError(
                f"{self.path}.{names[0]} is {norm}, neither over the {dim} channels of a head nor over all "
                f"{heads * dim}"
            )
        return [], "head"

    def _rotation(self) -> tuple[int, str, bool]:
        """The channels of a head that are rotated, and how."""
        rotates = "position_embeddings" in self.arguments and not self._has_alibi()
        if not rotates or not getattr(self.module, self.family.rotates, True):
            return 0, "half", False
        angles = frequencies(self.model, self.index)
        if angles is None:
            return 0, "half", False
        dim = 2 * angles.shape[0]
        kind = rotation_of(self.module, dim)
        if kind is None:
            raise UserError(
                f"{self.path} ({type(self.module).__name__}) rotates queries and keys in a way that is not known"
            )
        return dim, *kind

    def _window(self) -> int | None:
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types:
            kind = types[self.index]
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(f"{self.path}: layers of type {kind!r} are not supported")
            return window if kind == "sliding_attention" else None
        return window if getattr(self.config, "use_sliding_window", True) else None
