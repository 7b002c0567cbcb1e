"""Qwen3, with norms on queries and keys."""

from . import Family, register

register(Family(model_type="qwen3", name="Qwen3", qk_norm=True))
