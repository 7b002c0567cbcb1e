"""How near a student is to its teacher: perplexity, KL, recall, the same without the linear branch; and a
taste."""

from __future__ import annotations

from .evaluation import evaluate
from .generation import generate_text
from .table import format_results

__all__ = ["evaluate", "format_results", "generate_text"]
