"""How much memory is free."""

from __future__ import annotations

import os


def free_memory() -> float:
    """Bytes of it on the host; without end where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
