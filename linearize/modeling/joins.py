"""The two ways in which a mixer's linear branch and its window become one output: a shared denominator, or scales.

Shapes: q [B, T, H, D], the linear branch's `out` [B, T, H, V] and normaliser z [B, T, H], the window's output `near`
[B, T, H, V] and log-sum-exp `lse` [B, T, H], `far` [1 or B, T], how many keys the linear branch has of those before a
query. None stands for a branch that is off.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .dispatch import join_norm, join_share
from .join_reference import log_mass
from .mixer import Mixer
from .reference import widen
from .step_reference import KEY_GAIN_LIMIT


class NormalizedMixer(Mixer):
    """Mixers whose weights sum to one. With a window, near and far keys share one denominator:

        o = (sum_near e^s v + e^g sum_far phi.phi v) / (sum_near e^s + e^g sum_far phi.phi),   g = c + w . q

    The gain g is learned a head and starts at the constant `START_GAIN`: a feature map fits the shape of exp(s), not
    its size, and the mass far from a query is to first order exponential in q. With w = 0 it is LoLCATs' window factor
    (2410.10254). Likewise each key has a learned log-weight u . k, zero at the start: exp(s) weighs keys by how they
    lie along the mean query, which bounded features cannot say.
    """

    START_GAIN: ClassVar[float] = -2.0

    def __init__(self, *, gains: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain: nn.Parameter | None = None
        self.gain_q: nn.Parameter | None = None
        self.gain_k: nn.Parameter | None = None
        if self.window:
            self.gain = nn.Parameter(torch.empty(self.num_heads))
            if gains:
                self.gain_q = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        if gains:
            self.gain_k = nn.Parameter(torch.empty(self.num_states, self.head_dim))

    def reset_parameters(self) -> None:
        if self.gain is not None:
            init.constant_(self.gain, self.START_GAIN)
        for gain in (self.gain_q, self.gain_k):
            if gain is not None:
                init.zeros_(gain)

    def weigh_keys(self, k: Tensor, key_weight: Tensor | None) -> Tensor | None:
        """Weight of each key [B, T, G]: the learned one where it may be seen, 0 elsewhere."""
        if self.gain_k is None:
            return key_weight
        k = widen(k)
        learned = (k * self.gain_k.to(k.dtype)).sum(-1) * self.scale
        learned = learned.clamp(-KEY_GAIN_LIMIT, KEY_GAIN_LIMIT).exp()
        return learned if key_weight is None else learned * key_weight

    def join(
        self,
        q: Tensor,
        out: Tensor | None,
        z: Tensor | None,
        near: Tensor | None,
        lse: Tensor | None,
        far: Tensor | None,
    ) -> Tensor:
        if out is None or z is None:
            assert near is not None
            return near
        # No far key yet, or a map that gave nothing: the far side weighs nothing.
        if near is None or lse is None:
            return join_share(out, z, None, None)
        assert self.gain is not None
        gain = self.gain.to(z.dtype)
        if self.gain_q is not None:
            gain = gain + (q.to(z.dtype) * self.gain_q.to(z.dtype)).sum(-1) * self.scale
        return join_share(out, z, near, lse - gain)

    def window_gains(self) -> dict[str, Tensor | None]:
        return {"gain": self.gain, "gain_q": self.gain_q, "gain_k": self.gain_k}

    def step_weight(self, k: Tensor, weight: Tensor | None) -> Tensor | None:
        """Weight of a token's key [B, G] from k [B, G, D]; a window has weighed it already."""
        if weight is not None:
            return weight
        weighed = self.weigh_keys(k.unsqueeze(1), None)
        return None if weighed is None else weighed.squeeze(1)


class UnnormalizedMixer(Mixer):
    """Mixers with a decaying state, whose weights sum to nothing in particular. With a window o = a * window +
    b * norm(linear), a and b learned a head; or with `gains`, weighed by the far keys' mass:

        o = (1 - m) window + m b norm(linear),   m = n e^g / (n e^g + sum_near e^s),   g = c + w . q

    where n = h (1 - e^(-t / h)) is how many of the t far keys the state still holds: the far side weighs as much as
    softmax would give that many keys of the mean weight e^g. c, w, the horizon h and b are learned a head; `norm` is an
    RMS norm over a head's channels with a learned weight, so that a state's size does not matter.

    Args:
        gains: weigh the two sides by m. It must start from data, as `convert --calibrate` does: heads' masses lie ten
            nats and more apart, and from a start that is far off the two constants learn faster.
    """

    START_LINEAR: ClassVar[float] = 0.02
    START_GAIN: ClassVar[float] = -6.0
    EPS: ClassVar[float] = 1e-6

    def __init__(self, *, gains: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm_weight = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.linear_scale = nn.Parameter(torch.empty(self.num_heads))
        self.weighed = gains and self.window > 0
        self.gain: nn.Parameter | None = None
        self.gain_q: nn.Parameter | None = None
        self.log_horizon: nn.Parameter | None = None
        self.window_scale: nn.Parameter | None = None
        if self.weighed:
            self.gain = nn.Parameter(torch.empty(self.num_heads))
            self.gain_q = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
            self.log_horizon = nn.Parameter(torch.empty(self.num_heads))
        elif self.window:
            self.window_scale = nn.Parameter(torch.empty(self.num_heads))

    def reset_parameters(self) -> None:
        init.ones_(self.norm_weight)
        init.constant_(self.linear_scale, self.START_LINEAR)
        if self.window_scale is not None:
            init.ones_(self.window_scale)
        if self.gain is not None and self.gain_q is not None:
            init.constant_(self.gain, self.START_GAIN)
            init.zeros_(self.gain_q)

    def set_horizon(self, half_lives: Tensor) -> None:
        """Starts the horizons from the states' half-lives [num_states] in tokens."""
        if self.log_horizon is not None:
            horizon = (half_lives / math.log(2)).log().repeat_interleave(self.num_heads // self.num_states)
            with torch.no_grad():
                init.copy_(self.log_horizon, horizon)

    def join(
        self,
        q: Tensor,
        out: Tensor | None,
        z: Tensor | None,
        near: Tensor | None,
        lse: Tensor | None,
        far: Tensor | None,
    ) -> Tensor:
        if out is None:
            assert near is not None
            return near if self.window_scale is None else widen(near) * self.window_scale.unsqueeze(-1)
        if not self.weighed or near is None or lse is None or far is None:
            return join_norm(out, near, self.norm_weight, self.linear_scale, self.window_scale, self.EPS)
        odds = self.odds(q, lse, far)
        branch = join_norm(out, None, self.norm_weight, self.linear_scale, None, self.EPS)
        return join_share(branch, torch.ones_like(odds), near, odds)

    def odds(self, q: Tensor, lse: Tensor, far: Tensor) -> Tensor:
        """Log-odds of the window against the far side, log (1 - m) / m, [B, T, H]."""
        assert self.gain is not None and self.gain_q is not None and self.log_horizon is not None
        gain = self.gain.to(lse.dtype)
        gain = gain + (q.to(lse.dtype) * self.gain_q.to(lse.dtype)).sum(-1) * self.scale
        return lse - gain - log_mass(far.unsqueeze(-1), self.log_horizon).to(lse.dtype)

    def window_gains(self) -> dict[str, Tensor | None]:
        return {"gain": self.gain, "gain_q": self.gain_q, "log_horizon": self.log_horizon}

    def step_norm(self) -> dict[str, Any]:
        """The join of `linear_step`."""
        return {
            "join": "norm",
            "norm_weight": self.norm_weight,
            "linear_scale": self.linear_scale,
            "window_scale": self.window_scale,
            "eps": self.EPS,
        }
