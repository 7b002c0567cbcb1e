"""Mistral, whose sliding window kept heads respect."""

from . import Family, register

register(Family(model_type="mistral", name="Mistral"))
