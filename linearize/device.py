"""Where a model runs when nobody says."""

from __future__ import annotations

import torch


def chosen_device(device: str | None) -> str:
    """`device`, or by default the accelerator that is there, else the CPU."""
    if device is not None:
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"
