"""Feature maps phi for linear attention: phi(q) . phi(k) stands in for exp(q . k).

Each is an `nn.Module` over [B, T, heads, head_dim] with weights of its own for every head, and says how many features
it gives (`size`). `FEATURE_MAPS` is the registry; a new one is a class and a line.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .reference import widen


class FeatureMap(nn.Module):
    """Base: `forward` takes [B, T, heads, head_dim] and gives [B, T, heads, size] in the same dtype."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    @property
    def size(self) -> int:
        return self.head_dim

    def reset_parameters(self) -> None:
        """The start that needs neither data nor the teacher's weights."""

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        """For one token, x [B, heads, head_dim]: what a `feature` of the recurrent step turns into this map's features,
        and that feature's name (see step_reference.py). This way, through `forward`, is the one for weights that are
        offloaded: accelerate brings them for a module's call alone."""
        return self(x.unsqueeze(1)).squeeze(1), "none"


class Hedgehog(FeatureMap):
    """concat(softmax(x W), softmax(-x W)), W the identity at the start. Source: Zhang et al. 2024 (2402.04347)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.reset_parameters()

    @property
    def size(self) -> int:
        return 2 * self.head_dim

    def reset_parameters(self) -> None:
        with torch.no_grad():
            init.copy_(self.weight, torch.eye(self.head_dim).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = widen(torch.einsum("bthd,hde->bthe", x, self.weight.to(x.dtype)))
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).to(x.dtype)

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        if self.weight.is_meta:
            return super().step(x)
        return torch.einsum("bhd,hde->bhe", x.to(self.weight.dtype), self.weight), "hedgehog"


class T2R(FeatureMap):
    """ReLU(x W + b), W the identity and b zero at the start. Source: Kasai et al. 2021 (2103.13076)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            init.copy_(self.weight, torch.eye(self.head_dim).expand_as(self.weight))
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthd,hde->bthe", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)
        return F.relu(y)

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        if self.weight.is_meta:
            return super().step(x)
        return torch.einsum("bhd,hde->bhe", x.to(self.weight.dtype), self.weight) + self.bias, "relu"


class Elu(FeatureMap):
    """elu(x) + 1, without weights. Source: Katharopoulos et al. 2020 (2006.16236)."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.elu(widen(x)) + 1).to(x.dtype)

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "elu"


class Softmax(FeatureMap):
    """softmax over the features, without weights. Source: Lan et al. 2025 (LIGER, 2503.01496)."""

    def forward(self, x: Tensor) -> Tensor:
        return widen(x).softmax(-1).to(x.dtype)

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "softmax"


class Identity(FeatureMap):
    """x itself: weights q . k can be negative, so only the mixers that normalise their output take it."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "none"


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "elu": Elu,
    "softmax": Softmax,
    "identity": Identity,
}


def make_feature_map(name: str, num_heads: int, head_dim: int) -> FeatureMap:
    """The named map.

    Raises:
        ValueError: no such map; names those there are.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"--feature-map {name!r} is unknown; there are {', '.join(sorted(FEATURE_MAPS))}")
    return FEATURE_MAPS[name](num_heads, head_dim)
