"""How much memory the host has."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FACTS = Path("/proc/meminfo")


def free_memory() -> float:
    """Bytes that can be had, without end where the system does not say."""
    try:
        # what is cached of files is given up when it is asked for, and does not count as free by sysconf
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _FACTS.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return float(found[1]) * 1024 if found else _pages("SC_AVPHYS_PAGES")


def whole_memory() -> float:
    """Bytes in all, without end where the system does not say."""
    return _pages("SC_PHYS_PAGES")


def _pages(name: str) -> float:
    try:
        return float(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
