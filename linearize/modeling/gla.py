"""Gated linear attention: a decay a key channel, computed from the token. Source: Yang et al. 2023 (2312.06635)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .decay import DecayingMixer
from .mixer import Gates, project_gate, register


@register("gla")
class GLA(DecayingMixer):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, alpha_t = sigmoid(x W_down W_up + b)^(1/16).

    W_up starts at zero, so that b alone sets the half-lives and the gate learns to depend on the token.

    Args:
        gate_rank: inner width of the gate's low-rank projection.
    """

    summary = "gated linear attention: a learned decay a key channel and token"
    needs_hidden = True
    TEMPERATURE = 16.0

    def __init__(self, *, gate_rank: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if gate_rank < 1:
            raise ValueError(f"--mixer-option gate_rank must be at least 1, got {gate_rank}")
        assert self.hidden_size is not None
        self.gate_down = nn.Parameter(torch.empty(gate_rank, self.hidden_size))
        self.gate_up = nn.Parameter(torch.empty(self.num_states * self.map_k.size, gate_rank))
        self.gate_bias = nn.Parameter(torch.empty(self.num_states * self.map_k.size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.gate_down, std=self.gate_down.shape[1] ** -0.5)
        init.zeros_(self.gate_up)

    def set_decays(self, half_lives: Tensor) -> None:
        # logsigmoid(b) / 16 = -ln 2 / half-life
        target = -self.TEMPERATURE * math.log(2) / half_lives.double()
        bias = (target - torch.log(-torch.expm1(target))).to(half_lives.dtype)
        with torch.no_grad():
            init.copy_(self.gate_bias, bias.repeat_interleave(self.map_k.size))

    def gate_size(self) -> int:
        return self.num_states * self.map_k.size

    def gates(self, k: Tensor, x: Tensor | None) -> Gates:
        if x is None:
            raise ValueError("gla computes its gates from the layer's input: pass x, [B, T, hidden]")
        gate = project_gate(project_gate(x, self.gate_down), self.gate_up, self.gate_bias)
        return Gates(log_decay=F.logsigmoid(gate).unflatten(-1, (self.num_states, -1)) / self.TEMPERATURE)
