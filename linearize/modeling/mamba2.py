"""Mamba-2's state-space dual as a mixer: x <- v, B <- k, C <- q. Source: Dao and Gu 2024 (2405.21060)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .decay import DecayingMixer
from .mixer import Gates, project_gate, register
from .reference import LinearState


@register("mamba2")
class Mamba2(DecayingMixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t k_t v_t^T, o_t = q_t^T S_t + D dt_t v_t; one group a key head.

    dt = softplus(x W + b) starts at 1 for every token (W zero), as another value would rescale v; A = -ln 2 /
    half-life; D = 0. Beside a window all of it runs on the delayed keys and values, the skip D too: what lies nearer is
    the window's.
    """

    summary = "Mamba-2 (SSD): a scalar decay a token and head, with a step size dt"
    needs_hidden = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.hidden_size is not None
        self.dt_weight = nn.Parameter(torch.empty(self.num_states, self.hidden_size))
        self.dt_bias = nn.Parameter(torch.empty(self.num_states))
        self.A_log = nn.Parameter(torch.empty(self.num_states))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.zeros_(self.dt_weight)
        init.constant_(self.dt_bias, math.log(math.expm1(1)))  # softplus gives 1
        init.zeros_(self.D)

    def set_decays(self, half_lives: Tensor) -> None:
        with torch.no_grad():
            init.copy_(self.A_log, (math.log(2) / half_lives).log())

    def gate_size(self) -> int:
        return 2 * self.num_states  # decay and step

    def gates(self, k: Tensor, x: Tensor | None) -> Gates:
        if x is None:
            raise ValueError("mamba2 computes its step sizes from the layer's input: pass x, [B, T, hidden]")
        step = project_gate(x, self.dt_weight)
        dt = F.softplus(step + self.dt_bias.to(step.dtype))
        return Gates(log_decay=-dt * self.A_log.to(step.dtype).exp(), value_scale=dt)

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        key_weight: Tensor | None,
        **state: Any,
    ) -> tuple[Tensor, Tensor | None, LinearState | None]:
        out, z, final = super().linear(q, k, v, log_decay, key_weight, **state)
        seen = v if key_weight is None else v * key_weight.to(v.dtype).unsqueeze(-1)
        skip = seen.repeat_interleave(self.num_heads // self.num_states, dim=2).to(out.dtype)
        return out + self.D.to(out.dtype).unsqueeze(-1) * skip, z, final

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        return super().step(q, k, v, kv, k_state, skip=self.D, **token)
