"""What the decaying mixers share: half-lives, and a linear branch on feature-mapped queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dispatch import linear_step
from .feature_maps import make_feature_map
from .joins import UnnormalizedMixer
from .mixer import simple_linear
from .reference import LinearState

SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 16.0, 4096.0


def default_half_lives(heads: int) -> Tensor:
    """Half-lives in tokens, [heads], log-spaced from 16 to 4096."""
    if heads == 1:
        return torch.tensor([math.sqrt(SHORTEST_HALF_LIFE * LONGEST_HALF_LIFE)])
    return torch.logspace(math.log10(SHORTEST_HALF_LIFE), math.log10(LONGEST_HALF_LIFE), heads)


class DecayingMixer(UnnormalizedMixer):
    """A mixer whose state forgets; see `Mixer` for the common arguments.

    Args:
        feature_map: of queries and keys. Raw q.k weights can be negative, so "softmax" (over a head's channels, as in
            LIGER) is the default and "identity" is there for who wants them.
    """

    def __init__(self, *, feature_map: str = "softmax", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.map_q = make_feature_map(feature_map, self.num_heads, self.head_dim)
        self.map_k = make_feature_map(feature_map, self.num_states, self.head_dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.map_q.reset_parameters()
        self.map_k.reset_parameters()
        self.set_half_lives(default_half_lives(self.num_states))

    def set_half_lives(self, half_lives: Tensor) -> None:
        """Starts the decays so that a key's weight halves in `half_lives` [num_states] tokens, and the horizons."""
        self.set_decays(half_lives)
        self.set_horizon(half_lives)

    def set_decays(self, half_lives: Tensor) -> None:
        """Starts the decays alone."""
        raise NotImplementedError

    def gate_size(self) -> int:
        return self.num_states

    def state_shape(self) -> dict[str, tuple[int, ...]]:
        return {"kv": (self.num_states, self.map_k.size, self.head_dim)}

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        key_weight: Tensor | None,
        **state: Any,
    ) -> tuple[Tensor, Tensor | None, LinearState | None]:
        return simple_linear(self.map_q(q), self.map_k(k), v, key_weight, log_decay=log_decay, **state)

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        if not self.weighed:
            token.pop("lse", None)  # the two sides are added, not weighed against each other
        (q, feature), (k, _) = self.map_q.step(q), self.map_k.step(k)
        return linear_step(q, k, v, kv, feature=feature, **self.step_norm(), **token)[0]
