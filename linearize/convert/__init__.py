"""The surgery: from a teacher's anatomy to a plan, from the plan to a student."""

from .calibrated import convert
from .folder import convert_folder
from .plan import Plan, plan, student_config

__all__ = ["Plan", "convert", "convert_folder", "plan", "student_config"]
