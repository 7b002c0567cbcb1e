"""Starts of a mixer's new parameters from the teacher's weights alone, without data.

The input of an attention layer is RMS-normalised, so to first order E[x x^T] = diag(g^2) with g the norm's gain, and
the second moments of q, k and v follow from the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling import LinearizeAttention
from ..modeling.attention import rotate
from ..modeling.based import Based
from ..modeling.joins import UnnormalizedMixer

# Positions over which rotated second moments are averaged, in tokens: past a window, up to a usual context.
POSITIONS = torch.arange(0, 2048, 37)


def start_from_weights(attention: LinearizeAttention, gain: Tensor | None, inv_freq: Tensor | None) -> None:
    """Sets what the weights determine: Based's projections, and the scale of an unnormalised linear branch.

    Args:
        attention: a swapped module with the teacher's projections already in it.
        gain: [hidden], the weight of the norm before it; None for ones.
        inv_freq: [rotary_dim / 2], rotary frequencies; None where nothing rotates.
    """
    mixer = attention.mixer
    if isinstance(mixer, Based):
        _start_based(attention, mixer, gain, inv_freq)
    if isinstance(mixer, UnnormalizedMixer):
        _start_scale(attention, mixer, gain)


def _second_moment(
    projection: nn.Linear, norm: nn.Module | None, heads: int, gain: Tensor | None, inv_freq: Tensor | None
) -> Tensor:
    """E[y y^T] of each head's projected, normalised and rotated channels, [heads, D, D] in fp64, on the CPU."""
    weight = projection.weight.detach().cpu().double()
    if gain is not None:
        weight = weight * gain.detach().cpu().double()
    weight = weight.unflatten(0, (heads, -1))
    moment = weight @ weight.mT
    if projection.bias is not None:
        bias = projection.bias.detach().cpu().double().unflatten(0, (heads, -1))
        moment = moment + bias.unsqueeze(-1) * bias.unsqueeze(-2)
    if norm is not None:
        scale = norm.get_parameter("weight").detach().cpu().double()
        size = moment.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()[:, None, None]
        moment = moment / size.square() * scale.unsqueeze(-1) * scale
    if inv_freq is None:
        return moment
    angle = POSITIONS[:, None].double() * inv_freq.cpu().double()
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    identity = torch.eye(moment.shape[-1], dtype=torch.float64)
    # Rows of turned[p] are the rotated basis: y at position p is y0 @ turned[p].
    basis = identity.expand(1, len(POSITIONS), -1, -1)
    turned = rotate(basis, cos[None], sin[None], cos.shape[-1])[0]
    return torch.einsum("pai,hab,pbj->hij", turned, moment, turned) / len(POSITIONS)


def _square_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _start_based(attention: LinearizeAttention, mixer: Based, gain: Tensor | None, inv_freq: Tensor | None) -> None:
    anatomy = attention.anatomy
    moment_q = _second_moment(attention.q_proj, attention.q_norm, anatomy.num_heads, gain, inv_freq)
    moment_k = _second_moment(attention.k_proj, attention.k_norm, anatomy.num_kv_heads, gain, inv_freq)
    based_projections(attention, mixer, moment_q, moment_k)


@torch.no_grad()
def based_projections(attention: LinearizeAttention, mixer: Based, moment_q: Tensor, moment_k: Tensor) -> None:
    """The d-channel projections that keep most of the logits' energy, from second moments [H, D, D] and [G, D, D].

    With q = Cq^1/2 a and k = Ck^1/2 b, whitened a and b, s = a^T M b with M = Cq^1/2 Ck^1/2, and the best rank-d
    approximation keeps M's leading right singular vectors V (those of all query heads that share the key head,
    stacked): k -> V^T Ck^-1/2 k, q -> V^T Ck^1/2 q.
    """
    anatomy = attention.anatomy
    size = anatomy.group_size
    root_q, root_k = _square_root(moment_q), _square_root(moment_k)
    per_query = mixer.num_states == mixer.num_heads
    for slot, group in enumerate(attention.mixer_groups):
        heads = range(group * size, (group + 1) * size)
        shared = [list(heads)] if not per_query else [[head] for head in heads]
        for member, members in enumerate(shared):
            stacked = torch.cat([root_q[head] @ root_k[group] for head in members])
            _, values, right = torch.linalg.svd(stacked, full_matrices=False)
            basis = right[: mixer.feature_dim].mT  # [D, d]
            inverse = torch.linalg.pinv(root_k[group], rcond=1e-6, hermitian=True)
            # Logits of a standard deviation above 1 leave the expansion's range, so they are cooled to it; and both
            # sides share the scale.
            deviation = float(values.square().sum().sqrt()) * anatomy.scale / len(members) ** 0.5
            cool = min(1.0, 1.0 / deviation) ** 0.5
            balance = values[: mixer.feature_dim].sqrt() / len(members) ** 0.25
            state = slot if not per_query else slot * size + member
            key_map, query_map = inverse @ basis * balance, root_k[group] @ basis / balance
            mixer.proj_k[state] = (key_map * cool).to(mixer.proj_k)
            for head in members:
                mixer.proj_q[slot * size + head - group * size] = (query_map * cool).to(mixer.proj_q)


@torch.no_grad()
def _start_scale(attention: LinearizeAttention, mixer: UnnormalizedMixer, gain: Tensor | None) -> None:
    """The normalised linear branch starts at a share of the values' own size: half, or a fiftieth where it is added to
    a window and not weighed against it."""
    weight = attention.v_proj.weight.detach().float()
    if gain is not None:
        weight = weight * gain.detach().float()
    size = weight.unflatten(0, (attention.anatomy.num_kv_heads, -1)).square().sum(-1).mean(-1).sqrt()
    share = 0.5 if mixer.weighed or not mixer.window else 0.02
    kept = size[attention.mixer_groups].repeat_interleave(attention.anatomy.group_size)
    mixer.linear_scale.copy_(share * kept)
