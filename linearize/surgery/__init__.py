"""Surgery on models in memory: what a teacher's attention is made of, and a student with swapped attention."""

from .student import student_config
from .swap import swap

__all__ = ["student_config", "swap"]
