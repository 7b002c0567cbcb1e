"""Starts that follow from the teacher's attention in closed form, mixer by mixer.

Half-lives from the mean attention distance; Based's projections from second moments; a feature map's temperature from a
grid; the gain by weighted least squares on the log of the far mass; the scales of an unnormalised mixer by least
squares on the teacher's output. Shapes as in statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..modeling import LinearizeAttention
from ..modeling.based import Based
from ..modeling.bend import Bend
from ..modeling.decay import DecayingMixer
from ..modeling.feature_maps import Hedgehog
from ..modeling.gated_delta import GatedDelta
from ..modeling.join_reference import log_mass
from ..modeling.joins import NormalizedMixer, UnnormalizedMixer
from ..modeling.linear import LinearAttention
from ..surgery.starts import based_projections
from .capture import Seen
from .statistics import HeadStatistics, far_from, logits_of, probabilities

TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
# Channels whose share in the gain is uncertain stay at zero.
RIDGE = 1e-2


def heads_of(attention: LinearizeAttention) -> list[int]:
    """The query heads that the mixer computes, in its order."""
    size = attention.anatomy.group_size
    return [group * size + member for group in attention.mixer_groups for member in range(size)]


def per_state(attention: LinearizeAttention, value: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of `value` [H] over the query heads of each of the mixer's states."""
    heads = heads_of(attention)
    value, weight = value[heads].float(), weight[heads].float().clamp(min=1e-6)
    share = len(heads) // attention.mixer.num_states
    value, weight = value.unflatten(0, (-1, share)), weight.unflatten(0, (-1, share))
    return (value * weight).sum(1) / weight.sum(1)


@torch.no_grad()
def start_from_statistics(attention: LinearizeAttention, found: HeadStatistics) -> None:
    """Half-lives, the delta rule's beta, Based's projections."""
    mixer = attention.mixer
    device = attention.device
    if isinstance(mixer, DecayingMixer):
        half_lives = per_state(attention, found.half_lives(), found.far_mass)
        mixer.set_half_lives(half_lives.to(device))
    if isinstance(mixer, GatedDelta):
        # a head that looks at few keys wants them whole
        spread = per_state(attention, found.entropy, torch.ones_like(found.entropy)).exp()
        beta = (0.7 - 0.1 * spread.log2().clamp(0, 8) / 2).clamp(0.3, 0.7)
        mixer.beta_bias.copy_(torch.logit(beta))
    if isinstance(mixer, Based):
        based_projections(attention, mixer, found.moment_q, found.moment_k)


@torch.no_grad()
def start_from_batch(attention: LinearizeAttention, seen: Seen) -> None:
    """What needs the queries and keys themselves: temperatures, gains, scales."""
    mixer = attention.mixer
    if isinstance(mixer, NormalizedMixer):
        _fit_temperature(attention, mixer, seen)
        if mixer.window:
            _fit_gain(attention, mixer, seen)
    elif isinstance(mixer, UnnormalizedMixer):
        if mixer.weighed:
            _fit_gain(attention, mixer, seen)
        _fit_scales(attention, mixer, seen)


def _mixed(attention: LinearizeAttention, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H', D], k and v [B, T, S, D] of the mixer's own heads and states."""
    groups = attention.mixer_groups
    k, v = seen.k[:, :, groups], seen.v[:, :, groups]
    repeat = attention.mixer.num_states // len(groups)
    return seen.q[:, :, heads_of(attention)], k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)


def _bend(attention: LinearizeAttention, seen: Seen) -> Bend:
    """That of the mixer's own heads."""
    return seen.bend.of(torch.tensor(heads_of(attention), device=seen.q.device))


def _weights(mixer: NormalizedMixer, q: Tensor, k: Tensor) -> Callable[[int], Tensor]:
    """The linear branch's weights of row b, [H', T, T], before gains."""
    repeat = mixer.num_heads // mixer.num_states
    if isinstance(mixer, Based):
        left = torch.einsum("bthd,hdr->bthr", q.float(), mixer.proj_q.float()) * mixer.scale
        right = torch.einsum("bthd,hdr->bthr", k.float(), mixer.proj_k.float())
    else:
        assert isinstance(mixer, LinearAttention)
        left, right = mixer.map_q(q).float(), mixer.map_k(k).float()
    right = right.repeat_interleave(repeat, dim=2)

    def row(b: int) -> Tensor:
        product = torch.einsum("ihr,jhr->hij", left[b], right[b])
        return 1 + product + product.square() / 2 if isinstance(mixer, Based) else product

    return row


def _far_logits(attention: LinearizeAttention, seen: Seen, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of row b and the mixer's heads: all logits [H', T, T], those of far keys, -inf elsewhere, and which are far."""
    mixer = attention.mixer
    scores = logits_of(attention.anatomy, seen, b)[heads_of(attention)]
    far = far_from(scores.shape[-1], mixer.window, mixer.sinks, scores.device) & scores.isfinite()
    return scores, scores.masked_fill(~far, float("-inf")), far


def _fit_temperature(attention: LinearizeAttention, mixer: NormalizedMixer, seen: Seen) -> None:
    """The temperature, one a state, at which the branch's weights are nearest to the teacher's over far keys, in KL
    weighted by their mass."""
    if isinstance(mixer, LinearAttention):
        if not isinstance(mixer.map_q, Hedgehog) or not isinstance(mixer.map_k, Hedgehog):
            return
        scaled = [mixer.map_q.weight, mixer.map_k.weight]
    elif isinstance(mixer, Based):
        scaled = [mixer.proj_q, mixer.proj_k]
    else:
        return
    starts: list[Tensor] = [parameter.detach().clone() for parameter in scaled]
    q, k, _ = _mixed(attention, seen)
    losses = []
    for temperature in TEMPERATURES:
        for parameter, start in zip(scaled, starts, strict=True):
            parameter.copy_(start * temperature)
        weights = _weights(mixer, q, k)
        total = torch.zeros(mixer.num_heads, device=q.device)
        for b in range(len(q)):
            far = _far_logits(attention, seen, b)[2]
            p = probabilities(attention.anatomy, seen, b)[heads_of(attention)] * far
            w = (weights(b) * far).clamp(min=0)
            log = (w.clamp(min=1e-20)).log() - w.sum(-1, keepdim=True).clamp(min=1e-20).log()
            total -= (p * log).sum((1, 2))
        losses.append(total.unflatten(0, (mixer.num_states, -1)).sum(1))
    best = torch.tensor(TEMPERATURES, device=q.device)[torch.stack(losses).argmin(0)]
    repeat = mixer.num_heads // mixer.num_states
    for parameter, start, factor in zip(scaled, starts, (best.repeat_interleave(repeat), best), strict=True):
        parameter.copy_(start * factor[:, None, None])


def _masses(mixer: NormalizedMixer | UnnormalizedMixer, q: Tensor, k: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The far side's mass before the gain, [H', T] of row b, given which keys are far, [H', T, T]: the weights' sum, or
    how many keys a decaying state holds."""
    if isinstance(mixer, NormalizedMixer):
        weights = _weights(mixer, q, k)
        return lambda b, far: (weights(b) * far).sum(-1)
    assert mixer.log_horizon is not None
    count = far_from(q.shape[1], mixer.window, mixer.sinks, q.device).sum(-1, keepdim=True)
    held = log_mass(count, mixer.log_horizon).exp().T
    return lambda b, far: held


def _fit_gain(attention: LinearizeAttention, mixer: NormalizedMixer | UnnormalizedMixer, seen: Seen) -> None:
    """g = c + w . q with e^g z the teacher's far mass: least squares on its log, a token weighing as its share of far
    mass is open, m (1 - m)."""
    assert mixer.gain is not None
    q, k, _ = _mixed(attention, seen)
    masses = _masses(mixer, q, k)
    bend = _bend(attention, seen)
    size = mixer.head_dim + 1 if mixer.gain_q is not None else 1
    normal = torch.zeros(mixer.num_heads, size, size, dtype=torch.float64, device=q.device)
    right = torch.zeros(mixer.num_heads, size, dtype=torch.float64, device=q.device)
    for b in range(len(q)):
        scores, far_scores, far = _far_logits(attention, seen, b)
        mass = far_scores.logsumexp(-1)  # [H', T]
        found = masses(b, far)
        total = scores.logsumexp(-1)
        if bend.null is not None:
            total = torch.logaddexp(total, bend.null.to(total.dtype)[:, None])
        share = (mass - total).exp()
        use = far.any(-1) & (found > 1e-20) & mass.isfinite()
        weight = torch.where(use, share * (1 - share) + 1e-4, 0.0).double()
        target = torch.where(use, mass - found.clamp(min=1e-20).log(), 0.0).double()
        given = torch.ones(*target.shape, 1, dtype=torch.float64, device=q.device)
        if size > 1:
            given = torch.cat([given, q[b].transpose(0, 1).double() * mixer.scale], -1)
        normal += torch.einsum("htx,ht,hty->hxy", given, weight, given)
        right += torch.einsum("htx,ht,ht->hx", given, weight, target)
    ridge = normal.diagonal(dim1=-2, dim2=-1).clone()
    ridge[:, 0] *= 1e-6
    normal = normal + torch.diag_embed(RIDGE * ridge + 1e-8)
    solution = torch.linalg.solve(normal, right)
    mixer.gain.copy_(solution[:, 0])
    if mixer.gain_q is not None:
        mixer.gain_q.copy_(solution[:, 1:])


def _fit_scales(attention: LinearizeAttention, mixer: UnnormalizedMixer, seen: Seen) -> None:
    """The scales of the branches that are added, least squares on the teacher's output, a head at a time: b of the
    linear one, and a of the window where the far mass does not weigh it."""
    q, k, v = _mixed(attention, seen)
    target, bend = _teacher_output(attention, seen), _bend(attention, seen)
    whole = mixer(q, k, v, seen.x, bend=bend).float()
    kept = mixer.linear_scale.clone()
    mixer.linear_scale.zero_()
    rest = mixer(q, k, v, seen.x, bend=bend).float() if mixer.window else torch.zeros_like(whole)
    mixer.linear_scale.copy_(kept)
    parts = [whole - rest]
    if mixer.window_scale is not None:
        parts.append(rest)
    else:
        target = target - rest
    given = torch.stack(parts, -1)  # [B, T, H', V, n]
    normal = torch.einsum("bthvx,bthvy->hxy", given, given).double()
    right = torch.einsum("bthvx,bthv->hx", given, target).double()
    normal = normal + torch.diag_embed(1e-6 * normal.diagonal(dim1=-2, dim2=-1) + 1e-12)
    solution = torch.linalg.solve(normal, right).float()
    mixer.linear_scale.mul_(solution[:, 0])
    if mixer.window_scale is not None:
        mixer.window_scale.mul_(solution[:, 1])


def _teacher_output(attention: LinearizeAttention, seen: Seen) -> Tensor:
    """The teacher's output of the mixer's heads, [B, T, H', V] in fp32."""
    heads, size = heads_of(attention), attention.anatomy.group_size
    rows = []
    for b, v in enumerate(seen.v):
        p = probabilities(attention.anatomy, seen, b)
        rows.append(torch.einsum("hij,jhv->ihv", p, v.float().repeat_interleave(size, dim=1)))
    return torch.stack(rows)[:, :, heads]
