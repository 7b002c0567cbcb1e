"""Starts of a mixer's new parameters from the teacher's weights alone, without data.

The input of an attention layer is normalised, x = gain z + shift with E[z z^T] = I to first order, and the second
moments of q, k and v follow from the projections. Where no norm comes before it, x = size z.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modeling import LinearizeAttention
from ..modeling.based import Based
from ..modeling.decay import DecayingMixer
from ..modeling.joins import UnnormalizedMixer
from ..modeling.projections import rotate

# Positions over which rotated second moments are averaged, in tokens: past a window, up to a usual context.
POSITIONS = torch.arange(0, 2048, 37)
Q, K, V = range(3)


def start_from_weights(
    attention: LinearizeAttention, norm: nn.Module | None, inv_freq: Tensor | None, size: float = 1.0
) -> None:
    """Sets what the weights determine: Based's projections, decays where ALiBi tells them, and the scale of an
    unnormalised linear branch.

    Args:
        attention: a swapped module with the teacher's projections already in it.
        norm: what normalises its input, of any kind; None where nothing does, or it is not known.
        inv_freq: [rotary_dim / 2], rotary frequencies; None where nothing rotates.
        size: root mean square of its input, where there is no `norm`.
    """
    mixer = attention.mixer
    if isinstance(mixer, Based):
        moments = [second_moment(attention, which, norm, inv_freq, size) for which in (Q, K)]
        based_projections(attention, mixer, *moments)
    if isinstance(mixer, DecayingMixer) and attention.anatomy.alibi:
        mixer.set_half_lives(alibi_half_lives(attention).to(attention.device))
    if isinstance(mixer, UnnormalizedMixer):
        _start_scale(attention, mixer, norm, size)


def alibi_half_lives(attention: LinearizeAttention) -> Tensor:
    """Half-lives [num_states] in tokens: under ALiBi a key's weight, e^(-slope d), halves in ln 2 / slope. Heads that
    share a state get their geometric mean."""
    anatomy = attention.anatomy
    size = anatomy.group_size
    slopes = torch.tensor(anatomy.alibi).unflatten(0, (-1, size))[attention.mixer_groups].flatten()
    return (math.log(2) / slopes).log().unflatten(0, (attention.mixer.num_states, -1)).mean(1).exp()


def _gain_and_shift(norm: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm, of the shape of `like` and in fp64 on the CPU.

    A norm is affine in the normalised input, however its gain is written (w, 1 + w, one a head): so it is given +-1,
    which has mean 0 and mean square 1 already.
    """
    signs = torch.ones_like(like)
    signs[..., 1::2] = -1
    up, down = norm(signs).detach().cpu().double(), norm(-signs).detach().cpu().double()
    return (up - down) / 2 * signs.cpu().double(), (up + down) / 2


@torch.no_grad()
def second_moment(
    attention: LinearizeAttention, which: int, norm: nn.Module | None, inv_freq: Tensor | None, size: float = 1.0
) -> Tensor:
    """E[y y^T] of each head's projected, normalised and rotated channels, [heads, D, D] in fp64, on the CPU; y is q, k
    or v as `which` says, the rest as in `start_from_weights`."""
    anatomy = attention.anatomy
    weight, bias = (tensor.detach().cpu().double() for tensor in attention.matrices()[which])
    if norm is None:
        weight = weight * size
    else:
        wide = copy.deepcopy(norm).float()
        gain, shift = _gain_and_shift(wide, torch.ones(1, 1, anatomy.hidden_size, device=attention.device))
        weight, bias = weight * gain.view(-1), bias + weight @ shift.view(-1)
    moment = weight @ weight.mT + bias.unsqueeze(-1) * bias.unsqueeze(-2)
    if which != V and anatomy.norms:
        moment = _normalized(attention, anatomy.norms[which], moment)
    return moment if which == V or inv_freq is None else _rotated(attention, moment, inv_freq)


def _normalized(attention: LinearizeAttention, name: str, moment: Tensor) -> Tensor:
    heads, dim = moment.shape[:2]
    dtype = next((parameter.dtype for parameter in attention.get_submodule(name).parameters()), torch.float32)
    like = torch.ones(1, 1, heads, dim, dtype=dtype, device=attention.device)
    gain, shift = _gain_and_shift(lambda signs: attention.normalize(name, signs), like)
    gain, shift = gain[0, 0], shift[0, 0]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    if attention.anatomy.norm_over == "channels":
        size = size.mean().expand(heads)
    moment = moment / size[:, None, None] * gain.unsqueeze(-1) * gain.unsqueeze(-2)
    return moment + shift.unsqueeze(-1) * shift.unsqueeze(-2)


def _rotated(attention: LinearizeAttention, moment: Tensor, inv_freq: Tensor) -> Tensor:
    """The mean over positions: y = c x + s (J x), channel by channel, with J what turns one half into the other."""
    anatomy = attention.anatomy
    dim, turning = moment.shape[-1], anatomy.rotary_dim
    angle = POSITIONS[:, None].double() * inv_freq.cpu().double()
    angle = angle.repeat_interleave(2, -1) if anatomy.rotary == "pairs" else torch.cat([angle, angle], -1)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x[None, :, None], cos[None], sin[None], turning, anatomy.rotary)[0, :, 0]

    ones = torch.ones(dim, turning, dtype=torch.float64)
    across = turned(torch.eye(dim, dtype=torch.float64), 0 * ones, ones)  # row i is J e_i
    across[turning:] = 0
    c = turned(torch.ones(len(angle), dim, dtype=torch.float64), angle.cos(), 0 * angle)
    s = turned(across.sum(-1).expand(len(angle), dim), 0 * angle, angle.sin())
    left, right = across.mT @ moment, moment @ across
    parts = (c, c, moment), (s, c, left), (c, s, right), (s, s, left @ across)
    return sum((one.mT @ other / len(angle) * part for one, other, part in parts), torch.zeros_like(moment))


def _square_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


@torch.no_grad()
def based_projections(attention: LinearizeAttention, mixer: Based, moment_q: Tensor, moment_k: Tensor) -> None:
    """The d-channel projections that keep most of the logits' energy, from second moments [H, D, D] and [G, D, D].

    With q = Cq^1/2 a and k = Ck^1/2 b, whitened a and b, s = a^T M b with M = Cq^1/2 Ck^1/2, and the best rank-d
    approximation keeps M's leading right singular vectors V (those of all query heads that share the key head,
    stacked): k -> V^T Ck^-1/2 k, q -> V^T Ck^1/2 q. They are the eigenvectors of M^T M = Ck^1/2 Cq Ck^1/2.
    """
    anatomy = attention.anatomy
    size = anatomy.group_size
    root_k = _square_root(moment_k)
    per_query = mixer.num_states == mixer.num_heads
    for slot, group in enumerate(attention.mixer_groups):
        heads = range(group * size, (group + 1) * size)
        shared = [list(heads)] if not per_query else [[head] for head in heads]
        for member, members in enumerate(shared):
            squares, vectors = torch.linalg.eigh(root_k[group] @ moment_q[members].sum(0) @ root_k[group])
            values, basis = squares.clamp(min=0).sqrt().flip(0), vectors.flip(-1)[:, : mixer.feature_dim]  # [D, d]
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
def _start_scale(attention: LinearizeAttention, mixer: UnnormalizedMixer, norm: nn.Module | None, size: float) -> None:
    """The normalised linear branch starts at a share of the values' own size: half, or a fiftieth where it is added to
    a window and not weighed against it."""
    values = second_moment(attention, V, norm, None, size).diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()
    share = 0.5 if mixer.weighed or not mixer.window else 0.02
    kept = values[attention.mixer_groups].repeat_interleave(attention.anatomy.group_size)
    mixer.linear_scale.copy_(share * kept)
