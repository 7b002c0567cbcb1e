"""Llama (and what shares its layout, SmolLM2 among them)."""

from . import Family, register

register(Family(model_type="llama", name="Llama"))
