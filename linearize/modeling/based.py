"""Based: linear attention with the second-order Taylor expansion of exp on a small projection of q and k.

Source: Arora et al. 2024 (2402.18668). The window beside it is Based's own sliding-window attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .dispatch import linear_step, taylor_attention
from .joins import NormalizedMixer
from .mixer import register
from .reference import LinearState, widen


@register("based")
class Based(NormalizedMixer):
    """Weights 1 + s + s^2 / 2 with s = (q P_q) . (k P_k) * scale; see `Mixer` for the common arguments.

    Args:
        feature_dim: channels d of the projection; the state holds 1 + d + d (d + 1) / 2 keys (153 for 16).
    """

    START_GAIN = -7.0  # the expansion is coarse far from zero, so untrained it should say little beside a window
    summary = "Based: second-order Taylor linear attention on a 16-channel projection, normalised"

    def __init__(self, *, feature_dim: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= feature_dim <= self.head_dim:
            raise ValueError(f"--feature-dim must be from 1 to the head's {self.head_dim} channels, got {feature_dim}")
        self.feature_dim = feature_dim
        self.proj_q = nn.Parameter(torch.empty(self.num_heads, self.head_dim, feature_dim))
        self.proj_k = nn.Parameter(torch.empty(self.num_states, self.head_dim, feature_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for weight in (self.proj_q, self.proj_k):
                init.copy_(weight, torch.eye(self.head_dim, self.feature_dim).expand_as(weight))

    def state_shape(self) -> dict[str, tuple[int, ...]]:
        size = 1 + self.feature_dim + self.feature_dim * (self.feature_dim + 1) // 2
        return {"kv": (self.num_states, size, self.head_dim), "k": (self.num_states, size)}

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        key_weight: Tensor | None,
        **state: Any,
    ) -> tuple[Tensor, Tensor | None, LinearState | None]:
        weight = self.weigh_keys(k, key_weight)
        q = widen(torch.einsum("bthd,hdr->bthr", q, self.proj_q.to(q.dtype))) * self.scale
        k = widen(torch.einsum("bthd,hdr->bthr", k, self.proj_k.to(k.dtype)))
        return taylor_attention(q, k, v, key_weight=weight, **state)

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        token["weight"] = self.step_weight(k, token.get("weight"))
        q = torch.einsum("bhd,hdr->bhr", q.to(self.proj_q.dtype), self.proj_q)
        k = torch.einsum("bhd,hdr->bhr", k.to(self.proj_k.dtype), self.proj_k)
        return linear_step(q, k, v, kv, k_state, feature="taylor", q_scale=self.scale, join="share", **token)[0]
