"""The gated delta rule: a state that forgets, and that replaces what a key held.

Source: Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet, 2412.06464).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .decay import DecayingMixer
from .dispatch import delta_rule, linear_step
from .mixer import Gates, project_gate, register
from .reference import LinearState, widen
from .step_reference import activate


def unit(x: Tensor) -> Tensor:
    """x at length 1 along its channels, in its dtype; a zero stays zero."""
    y = widen(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


@register("gated_delta")
class GatedDelta(DecayingMixer):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t^T S_t, queries and keys L2-normalised.

    beta = sigmoid(x W + b) starts at a half for every token; log a = -exp(A_log) softplus(x W_dt + dt_bias) starts at
    the half-lives with A = 1, so that the bias carries them and the token can change the decay by orders of magnitude
    (with dt = 1, as in Mamba-2, only linearly). All weights on x start at zero.

    Args:
        feature_map: applied before the normalisation; positive features would make all keys alike, so "identity".
    """

    summary = "gated delta rule: a decay a token, and keys that overwrite what they held"
    needs_hidden = True

    def __init__(self, *, feature_map: str = "identity", **kwargs: Any) -> None:
        super().__init__(feature_map=feature_map, **kwargs)
        assert self.hidden_size is not None
        self.beta_weight = nn.Parameter(torch.empty(self.num_states, self.hidden_size))
        self.beta_bias = nn.Parameter(torch.empty(self.num_states))
        self.dt_weight = nn.Parameter(torch.empty(self.num_states, self.hidden_size))
        self.dt_bias = nn.Parameter(torch.empty(self.num_states))
        self.A_log = nn.Parameter(torch.empty(self.num_states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in (self.beta_weight, self.beta_bias, self.dt_weight, self.A_log):
            init.zeros_(parameter)

    def set_decays(self, half_lives: Tensor) -> None:
        # softplus(bias) = ln 2 / half-life, A = 1
        bias = torch.expm1(math.log(2) / half_lives.double()).log().to(half_lives.dtype)
        with torch.no_grad():
            init.copy_(self.dt_bias, bias)
            init.zeros_(self.A_log)

    def gate_size(self) -> int:
        return 2 * self.num_states  # decay and beta

    def gates(self, k: Tensor, x: Tensor | None) -> Gates:
        if x is None:
            raise ValueError("gated_delta computes its gates from the layer's input: pass x, [B, T, hidden]")
        beta, step = project_gate(x, torch.cat([self.beta_weight, self.dt_weight])).chunk(2, dim=-1)
        beta = torch.sigmoid(beta + self.beta_bias.to(beta.dtype))
        step = F.softplus(step + self.dt_bias.to(step.dtype))
        return Gates(log_decay=-step * self.A_log.to(step.dtype).exp(), beta=beta)

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        key_weight: Tensor | None,
        *,
        beta: Tensor | None = None,
        **state: Any,
    ) -> tuple[Tensor, Tensor | None, LinearState | None]:
        assert beta is not None  # 0 already at keys that may not be seen
        q, k = unit(self.map_q(q)), unit(self.map_k(k))
        out, final = delta_rule(q, k, v, beta=beta, log_decay=log_decay, **state)
        return out, None, final

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        if not self.weighed:
            token.pop("lse", None)
        (q, feature), (k, _) = self.map_q.step(q), self.map_k.step(k)
        if feature != "none":  # the step does one thing to q and k: after another map than the identity, the length
            q, k = activate(widen(q), feature), activate(widen(k), feature)
        return linear_step(q, k, v, kv, feature="unit", **self.step_norm(), **token)[0]
