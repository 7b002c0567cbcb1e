"""A windowed mixer against its definition, pair by pair: which keys are near, which are far, and how the two join."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error, shake

from linearize.modeling.linear import LinearAttention
from linearize.modeling.retention import Retention

W, S, T = 6, 2, 30


def heads_and_places(mixer):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, T, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    wide_k, wide_v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    is_sink = (torch.arange(T) < S)[None]
    near = (distance >= 0) & ((distance < W) | is_sink)
    far = (distance >= W) & ~is_sink
    scores = torch.einsum("bihd,bjhd->bhij", q, wide_k) * mixer.scale
    features = torch.einsum("bihf,bjhf->bhij", mixer.map_q(q), mixer.map_k(k).repeat_interleave(2, 2))
    return q, k, v, wide_k, wide_v, distance, near, far, scores, features


@pytest.mark.parametrize("gains", [True, False])
@torch.no_grad()
def test_near_and_far_keys_share_one_denominator(gains):
    mixer = LinearAttention(num_heads=4, num_kv_heads=2, head_dim=8, window=W, sinks=S, gains=gains).double()
    shake_parameters(mixer)
    q, k, v, wide_k, wide_v, _, near, far, scores, features = heads_and_places(mixer)
    gain = mixer.gain[None, :, None].expand(1, 4, T).clone()
    key_weight = torch.ones(1, 4, T, dtype=torch.float64)
    if gains:
        gain += torch.einsum("bihd,hd->bhi", q, mixer.gain_q) * mixer.scale
        wide_gain = mixer.gain_k.repeat_interleave(2, 0)
        key_weight = (torch.einsum("bjhd,hd->bhj", wide_k, wide_gain) * mixer.scale).exp()
    weights = scores.exp() * near + gain.exp()[..., None] * features * key_weight[:, :, None] * far
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), wide_v)
    assert relative_error(mixer(q, k, v), expected) < 1e-10


@torch.no_grad()
def test_a_decaying_branch_is_normed_and_added():
    mixer = Retention(num_heads=4, num_kv_heads=2, head_dim=8, window=W, sinks=S).double()
    shake_parameters(mixer)
    q, k, v, _, wide_v, distance, near, far, scores, features = heads_and_places(mixer)
    log_gamma = -math.log(2) / mixer.log_half_life.exp().repeat_interleave(2)
    decay = (log_gamma[:, None, None] * (distance - W).clamp(min=0)).exp()
    out = torch.einsum("bhij,bjhv->bihv", features * decay * far, wide_v)
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + mixer.EPS) * mixer.norm_weight
    window = torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~near, float("-inf")).softmax(-1), wide_v)
    expected = mixer.window_scale[:, None] * window + mixer.linear_scale[:, None] * normed
    assert relative_error(mixer(q, k, v), expected) < 1e-10


@torch.no_grad()
def test_a_decaying_branch_weighs_what_its_state_holds():
    mixer = Retention(num_heads=4, num_kv_heads=2, head_dim=8, window=W, sinks=S, gains=True).double()
    shake_parameters(mixer)
    q, k, v, _, wide_v, distance, near, far, scores, features = heads_and_places(mixer)
    log_gamma = -math.log(2) / mixer.log_half_life.exp().repeat_interleave(2)
    decay = (log_gamma[:, None, None] * (distance - W).clamp(min=0)).exp()
    out = torch.einsum("bhij,bjhv->bihv", features * decay * far, wide_v)
    branch = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + mixer.EPS) * mixer.norm_weight
    branch = branch * mixer.linear_scale[:, None]
    exps = scores.exp() * near
    window = torch.einsum("bhij,bjhv->bihv", exps, wide_v)
    horizon = mixer.log_horizon.exp()
    mass = (horizon * (1 - (-far.sum(-1)[:, None] / horizon).exp())).T
    mass = mass * (mixer.gain[:, None] + torch.einsum("bihd,hd->bhi", q, mixer.gain_q) * mixer.scale).exp()
    mass, total = (x.transpose(1, 2).unsqueeze(-1) for x in (mass, exps.sum(-1)))
    assert relative_error(mixer(q, k, v), (window + mass * branch) / (total + mass)) < 1e-10


def shake_parameters(mixer: torch.nn.Module) -> None:
    shake(torch.nn.ModuleDict({"mixer": mixer}))
