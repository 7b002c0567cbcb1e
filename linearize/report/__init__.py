"""One page with pictures about a converted model: what it is, what was done, what it cost."""

from .report import report

__all__ = ["report"]
