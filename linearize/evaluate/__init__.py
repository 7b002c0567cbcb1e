"""How near a student is to its teacher: perplexity, KL, recall, retrieval, agreement and tasks, the same with either
branch off; several students side by side; and a taste."""

from __future__ import annotations

from .evaluation import evaluate
from .generation import generate_text
from .several import evaluate_each, side_by_side
from .table import format_results

__all__ = ["evaluate", "evaluate_each", "format_results", "generate_text", "side_by_side"]
