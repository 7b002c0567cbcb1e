"""What is measured on the teacher before training: which heads matter, and where the mixers start."""

from .calibration import CalibrateOptions, Calibration, calibrate
from .scores import METHODS, Scores, measure
from .text import PASSAGE, passages_on, sequences

__all__ = [
    "METHODS",
    "PASSAGE",
    "CalibrateOptions",
    "Calibration",
    "Scores",
    "calibrate",
    "measure",
    "passages_on",
    "sequences",
]
