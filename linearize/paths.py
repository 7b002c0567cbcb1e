"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` for a home folder; one of a user that there is not stays as it is, and is not found, where
    `Path.expanduser` raises."""
    return Path(os.path.expanduser(path))
