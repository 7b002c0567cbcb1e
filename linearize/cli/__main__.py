"""`python -m linearize.cli`, as accelerate's launcher starts it."""

from . import run

run()
