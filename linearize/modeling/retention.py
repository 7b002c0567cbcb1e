"""Retention: a state that decays by a constant a head. Source: Sun et al. 2023 (RetNet, 2307.08621)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .decay import DecayingMixer
from .mixer import Gates, register
from .reference import widen


@register("retention")
class Retention(DecayingMixer):
    """S_t = gamma S_{t-1} + k_t v_t^T with gamma = 2^(-1 / half-life), learned through log(half-life)."""

    summary = "retention: one constant decay a head"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log_half_life = nn.Parameter(torch.empty(self.num_states))
        self.reset_parameters()

    def set_decays(self, half_lives: Tensor) -> None:
        with torch.no_grad():
            init.copy_(self.log_half_life, half_lives.log())

    def gates(self, k: Tensor, x: Tensor | None) -> Gates:
        log_decay = -math.log(2) * (-widen(self.log_half_life)).exp()
        return Gates(log_decay=log_decay.expand(*k.shape[:2], -1))
