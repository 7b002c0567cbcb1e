"""Qwen2 and 2.5, with biases on q, k and v."""

from . import Family, register

register(Family(model_type="qwen2", name="Qwen2", summary="Qwen2 and 2.5, with biases on q, k and v"))
