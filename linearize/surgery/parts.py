"""The parts that attention modules are made of, by the names that transformers' families give them.

A family that only names a part otherwise needs its name here and nothing else.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

PROJECTION = (nn.Linear, Conv1D)

# The projections of the input, and how the rows of a fused one lie: see `AttentionAnatomy.rows`.
INPUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "apart"),
    (("qkv_proj",), "blocks"),
    (("c_attn",), "blocks"),
    (("query_key_value",), "groups"),
)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
# Norms of queries and of keys, before rotation.
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
# Attributes that hold the factor of q.k, and the channels of a head; by default D^-1/2, and hidden_size / heads.
SCALES = ("scaling", "inv_norm_factor")
HEAD_DIMS = ("head_dim", "head_size")
# Attributes, of the module or the config, that are set where logits are bounded by c tanh(s / c), and where what makes
# them is bounded, which is not supported.
CAPS = ("attn_logit_softcapping",)
BOUNDS = ("clip_qkv",)
# A parameter a head: one more logit without a value.
NULLS = ("sinks",)
# Of ALiBi: the function beside the module that makes its biases of (mask, heads, dtype), and the module's attribute
# that holds their factor; by default 1.
ALIBI_MAKERS = ("build_alibi_tensor",)
ALIBI_SCALES = ("beta",)


def first(module: nn.Module, names: tuple[str, ...], kind: type | tuple[type, ...]) -> str | None:
    """The first of `names` that the module has as an attribute of `kind`."""
    return next((name for name in names if isinstance(getattr(module, name, None), kind)), None)


def inputs_of(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of a module's input projections and how their rows lie; None where it has none that are known."""
    for names, rows in INPUTS:
        if all(isinstance(getattr(module, name, None), PROJECTION) for name in names):
            return names, rows
    return None


def parts_text(module: nn.Module) -> str:
    """A module's children and its own parameters, for messages: "c_attn (Conv1D), sinks (parameter)"."""
    children = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    own = [f"{name} (parameter)" for name, _ in module.named_parameters(recurse=False)]
    return ", ".join(children + own) or "no parts"
