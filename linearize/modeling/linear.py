"""Linear attention with a feature map: o_t = sum_j phi(q_t).phi(k_j) v_j / sum_j phi(q_t).phi(k_j).

Source: Katharopoulos et al. 2020 (2006.16236); with Hedgehog maps and a window it is LoLCATs' layer (2410.10254).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dispatch import linear_step
from .feature_maps import make_feature_map
from .joins import NormalizedMixer
from .mixer import register, simple_linear
from .reference import LinearState


@register("linear")
class LinearAttention(NormalizedMixer):
    """Linear attention; see `Mixer` for the common arguments.

    Args:
        feature_map: "hedgehog", "t2r" or "elu" (positive features, or the normaliser has no meaning).
    """

    summary = "linear attention with a feature map (hedgehog, t2r, elu), normalised"

    def __init__(self, *, feature_map: str = "hedgehog", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if feature_map == "identity":
            raise ValueError("--feature-map identity gives negative weights, which linear attention cannot normalise")
        self.map_q = make_feature_map(feature_map, self.num_heads, self.head_dim)
        self.map_k = make_feature_map(feature_map, self.num_states, self.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.map_q.reset_parameters()
        self.map_k.reset_parameters()

    def state_shape(self) -> dict[str, tuple[int, ...]]:
        size = self.map_k.size
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
        return simple_linear(self.map_q(q), self.map_k(k), v, weight, normalizer=True, **state)

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        token["weight"] = self.step_weight(k, token.get("weight"))
        (q, feature), (k, _) = self.map_q.step(q), self.map_k.step(k)
        return linear_step(q, k, v, kv, k_state, feature=feature, join="share", **token)[0]
