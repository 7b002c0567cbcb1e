"""Triton kernels behind the signatures of `linearize.modeling.reference`; see `linearize.modeling.dispatch`."""

from .delta import delta_rule
from .linear import linear_attention
from .taylor import taylor_attention
from .window import window_attention

__all__ = ["delta_rule", "linear_attention", "taylor_attention", "window_attention"]
