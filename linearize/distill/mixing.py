"""Mixing-matrix matching: each swapped layer learns its teacher's attention weights (MOHAWK's first stage, 2408.10189).

A mixer's matrix M [B, H, T, T] is read off by running it with values that are columns of the identity, D at a time:
out_i = sum_j M_ij v_j. Mixers that put an RMS norm on their linear branch are not linear in their values; given the
values that the layer has, they are, row by row: o_i = (a_i near_ij + b_i linear_ij / rms_i) v_j. So `linear` and `near`
are read before the join, and rms, a and b come from the real values. The norm's weight on single channels stands at its
mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..modeling.joins import UnnormalizedMixer
from ..modeling.layout import Layout
from .layer_pass import Pair, attention_pairs
from .losses import widened
from .transfer import LayerTrainer


@contextmanager
def eager_attention(teacher: Any) -> Iterator[None]:
    """Inside, the teacher's attention modules return their weights."""
    before = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    try:
        yield
    finally:
        teacher.set_attn_implementation(before)


class _Joined(NamedTuple):
    """The linear branch and the window of one call, [B, T, H, D] or None, and their log-odds where these weigh them."""

    linear: Tensor | None
    near: Tensor | None
    odds: Tensor | None


@contextmanager
def _before_the_join(mixer: UnnormalizedMixer, seen: list[_Joined]) -> Iterator[None]:
    """Collects what each call of the mixer joins."""

    def join(
        q: Tensor, out: Tensor | None, z: Tensor | None, near: Tensor | None, lse: Tensor | None, far: Tensor | None
    ) -> Tensor:
        weighed = mixer.weighed and out is not None
        odds = mixer.odds(widened(q), lse, far) if weighed and lse is not None and far is not None else None
        seen.append(_Joined(out, near, odds))
        whole = out if out is not None else near
        assert whole is not None
        return whole

    mixer.join = join  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer.join


def _repeated(layout: Layout, times: int, tokens: int) -> Layout:
    """The layout of a batch of `tokens` in all, repeated along its rows."""
    bounds, real = layout.cu_seqlens, layout.real
    if bounds is not None:
        starts = torch.arange(times, device=bounds.device).unsqueeze(1) * tokens
        bounds = torch.cat([(bounds[:-1] + starts).flatten(), bounds.new_tensor([times * tokens])])
    return Layout(real=None if real is None else real.repeat(times, 1), cu_seqlens=bounds)


def mixing_matrix(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """M [B, H, T, T] of the heads that a swapped attention module mixes, on the input of its forward; rows are queries.

    Memory is quadratic in T, and the mixer runs over T / D times the batch, wide: a weight in bf16 has three digits.
    """
    mixer = attention.mixer
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = mixer.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    joined: list[_Joined] = []
    by_parts = isinstance(mixer, UnnormalizedMixer)
    try:
        with _before_the_join(mixer, joined) if by_parts else torch.enable_grad():
            attention(*args, **kwargs)
    finally:
        handle.remove()
    (q, k, v, x), layout, bend = calls[0][0], calls[0][1]["layout"], calls[0][1]["bend"]
    q, k, x = widened(q), widened(k), widened(x)
    batch, tokens, groups, dim = v.shape
    blocks = -(-tokens // dim)
    identity = torch.eye(blocks * dim, device=q.device, dtype=q.dtype)[:tokens].view(tokens, blocks, dim)
    columns = identity.transpose(0, 1)[:, None, :, None].expand(blocks, batch, tokens, groups, dim).flatten(0, 1)
    q, k, x = (tensor.repeat(blocks, *[1] * (tensor.dim() - 1)) for tensor in (q, k, x))
    layout = _repeated(layout, blocks, batch * tokens)
    heads = q.shape[2]

    def matrix(weights: Tensor) -> Tensor:
        weights = widened(weights).reshape(blocks, batch, tokens, heads, dim)
        return weights.permute(1, 3, 2, 0, 4).flatten(3)[..., :tokens]

    if not by_parts:
        return matrix(mixer(q, k, columns, x, layout=layout, bend=bend))
    with _before_the_join(mixer, joined):
        mixer(q, k, columns, x, layout=layout, bend=bend)
    (values, _, odds), (linear, near, _) = joined

    def of_queries(weights: Tensor) -> Tensor:  # to [B, H, T, 1]
        return weights.reshape(batch, tokens, heads).transpose(1, 2).unsqueeze(-1)

    total = q.new_zeros(batch, heads, tokens, tokens)
    if linear is not None and values is not None:
        size = torch.rsqrt(widened(values).square().mean(-1) + mixer.EPS)
        size = size * mixer.linear_scale * mixer.norm_weight.mean(-1)
        total = total + of_queries(size if odds is None else size * torch.sigmoid(-odds)) * matrix(linear)
    if near is not None:
        scale = torch.ones_like(mixer.linear_scale) if mixer.window_scale is None else mixer.window_scale
        share = scale[:, None, None] if odds is None else of_queries(torch.sigmoid(odds))
        total = total + share * matrix(near)
    return total


def mixing_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """|M - A|_F / |A|_F, a mean over sequences and heads, from [B, H, T, T]; `valid` [B, T] leaves queries out."""
    if valid is not None:
        student, teacher = student * valid[:, None, :, None], teacher * valid[:, None, :, None]
    tiny = torch.finfo(student.dtype).tiny
    error = (student - teacher).square().sum((-2, -1)).clamp_min(tiny).sqrt()
    return (error / teacher.square().sum((-2, -1)).clamp_min(tiny).sqrt()).mean()


class MixingTrainer(LayerTrainer):
    """Matches attention weights; logs `layers`, the relative Frobenius distance in each swapped layer."""

    title = "mixing"

    def pairs_of(self, student: Any, teacher: Any) -> dict[int, Pair]:
        return attention_pairs(student, teacher)

    def layer_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, valid: Tensor | None
    ) -> Tensor:
        weights = output[1]
        if weights is None:
            raise UserError("the teacher does not give its attention weights, which this stage matches; use 'blocks'")
        weights = weights.index_select(1, module.routes(weights.device).mixer_heads.heads)
        ours = mixing_matrix(module, args, kwargs)
        with self.autocast(False):
            return mixing_loss(ours, widened(weights).to(ours.dtype), valid) * self.share
