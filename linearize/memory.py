"""How much memory the host has."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FACTS, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that can be had, by this process's container where it has a limit."""
    try:
        # what is cached of files is given up when it is asked for, and does not count as free by sysconf
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _FACTS.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    # a system that does not say: half of what there is
    free = float(found[1]) * 1024 if found else _pages("SC_PHYS_PAGES") / 2
    return min(free, _container("memory.max") - _container("memory.current", 0.0))


def whole_memory() -> float:
    """Bytes in all, without end where the system does not say."""
    return min(_pages("SC_PHYS_PAGES"), _container("memory.max"))


def _container(name: str, unknown: float = float("inf")) -> float:
    """What a container's limit (cgroup 2) or use is; `max` is none."""
    try:
        return float((_CONTAINER / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return unknown


def _pages(name: str) -> float:
    try:
        return float(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
