"""Qwen3, with norms on queries and keys."""

from . import Family, register

register(Family(model_type="qwen3", name="Qwen3", summary="Qwen3, with norms on queries and keys", qk_norm=True))
