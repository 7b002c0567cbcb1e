"""The verbs `plan` and `convert`: surgery, scores and calibrated starts, on models in memory and on folders."""

from .calibrated import convert
from .folder import convert_folder
from .plan import Plan, plan

__all__ = ["Plan", "convert", "convert_folder", "plan"]
