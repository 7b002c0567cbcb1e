"""Llama 2 and 3, and what shares their layout (SmolLM2, TinyLlama, ...)."""

from . import Family, register

register(
    Family(
        model_type="llama",
        name="Llama",
        summary="Llama 2 and 3, and what shares their layout (SmolLM2, TinyLlama, ...)",
    )
)
