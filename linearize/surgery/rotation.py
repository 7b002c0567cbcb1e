"""How a family rotates its queries and keys: its own function, tried against those that are known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.configuration_linearize import KINDS
from ..modeling.projections import rotate


def frequencies(model: PreTrainedModel, layer: int) -> Tensor | None:
    """[rotary_dim / 2], the rotary frequencies of a layer, which may depend on its type; None where there are none."""
    types = getattr(model.config, "layer_types", None)
    names = [f"{types[layer]}_inv_freq"] if types else []
    # Where most families have them first: all modules of a large model, for each layer, take a second.
    for module in (*model.base_model.children(), *model.modules()):
        for name in (*names, "inv_freq"):
            found = getattr(module, name, None)
            if isinstance(found, Tensor):
                return found
    return None


def rotation_of(module: nn.Module, rotary_dim: int) -> tuple[str, bool] | None:
    """(`rotary`, `rotary_wide`) of an anatomy for an attention module; None where its family turns otherwise.

    A family without a function of the usual name is taken to turn as Llama does; the proof tells.
    """
    turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    return ("half", False) if turn is None else _kind(turn, rotary_dim)


@lru_cache(maxsize=64)
def _kind(turn: Callable[..., Any], dim: int) -> tuple[str, bool] | None:
    generator = torch.Generator().manual_seed(0)
    # Angles in fp32 beside states in bf16 show what is rounded when.
    q, k = (torch.randn(1, 2, 5, dim, generator=generator, device="cpu").bfloat16() for _ in range(2))
    for width in (dim, dim // 2):  # some give each angle once
        cos, sin = (torch.randn(1, 5, width, generator=generator, device="cpu") for _ in range(2))
        try:
            want = turn(q, k, cos, sin)[0]
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        return _how(q, cos, sin, want, dim)
    return None


def _how(q: Tensor, cos: Tensor, sin: Tensor, want: Tensor, dim: int) -> tuple[str, bool] | None:
    for how in KINDS["rotary"]:
        for wide in (False, True):
            got = rotate(q.transpose(1, 2), cos, sin, dim, how, wide).transpose(1, 2)
            if got.dtype == want.dtype and torch.equal(got, want):
                return how, wide
    return None
