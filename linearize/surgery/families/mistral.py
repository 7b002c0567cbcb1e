"""Mistral; its sliding window holds in kept heads."""

from . import Family, register

register(Family(model_type="mistral", name="Mistral", summary="Mistral; its sliding window holds in kept heads"))
