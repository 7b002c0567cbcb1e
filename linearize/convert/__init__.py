"""The surgery: from a teacher's anatomy to a plan, from the plan to a student."""

from .plan import Plan, plan, student_config
from .swap import convert, is_converted

__all__ = ["Plan", "convert", "is_converted", "plan", "student_config"]
