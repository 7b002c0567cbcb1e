"""How figures, versions and sources are worded in every table."""

from __future__ import annotations

from typing import Any


def figure(value: float | None) -> str:
    """Three digits; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def spaced(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def installed(*runs: dict[str, Any]) -> str:
    """The versions that timings depend on, of every run that is in the file."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name in ("torch", "triton", "transformers", "fla-core", "mamba_ssm"):
            if name in run["versions"]:
                found.setdefault(name, {})[run["versions"][name]] = None
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items())


def size(number: float) -> str:
    return f"{number / 2**20:.1f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"
