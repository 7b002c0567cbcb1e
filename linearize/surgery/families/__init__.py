"""The model families that can be converted: one small file each, data on the default anatomy.

A family is registered by its `model_type` in config.json. Everything that the default fits (separate q, k, v and o
projections, rotary positions, RMS-normalised input) needs no field at all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family's attention is, and in what it departs from the default.

    `layers` is the dotted path of the decoder layers; `attention` and `input_norm` are paths inside a layer. `qk_norm`
    says that queries and keys go through an RMS norm over each head's channels before rotation.
    """

    model_type: str
    name: str
    summary: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family.

    Raises:
        ValueError: its model_type is taken.
    """
    if family.model_type in FAMILIES:
        raise ValueError(f"two families claim model_type {family.model_type!r}")
    FAMILIES[family.model_type] = family
    return family


from . import llama, mistral, qwen2, qwen3  # noqa: E402, F401  (each registers its family)
