"""What a swapped module keeps of the teacher's attention: its projections, norms, rotation, as its anatomy says.

The teacher module's own children are taken over under their names, so that every tensor keeps its name and its layout:
fused projections stay fused, and norms are computed by the teacher's own code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .bend import Bend
from .configuration_linearize import AttentionAnatomy
from .reference import widen


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, how: str = "half", wide: bool = False) -> Tensor:
    """Rotary embedding of the first `rotary_dim` channels of x [B, T, heads, D]; cos and sin [B, T, rotary_dim or
    half of it].

    `how` and `wide` as in `AttentionAnatomy.rotary` and `rotary_wide`.
    """
    if how == "pairs_of_halves":
        cos, sin = (angles[..., : rotary_dim // 2].repeat_interleave(2, dim=-1) for angles in (cos, sin))
    if cos.shape[-1] < rotary_dim:  # some families give each angle once
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if wide:
        turned = widen(turned)
    if how == "half":
        first, second = turned.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    turned = turned * cos + across * sin
    if wide:
        turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


def weight_and_bias(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[rows, inputs] and [rows] of y = x weight^T + bias, of a linear layer or GPT-2's Conv1D."""
    weight, bias = projection.get_parameter("weight"), getattr(projection, "bias", None)
    return (weight.T if isinstance(projection, Conv1D) else weight), bias


class Projections(nn.Module):
    """The parts of a teacher's attention module that `anatomy` names.

    Args:
        anatomy: what the module is made of.
        parts: the teacher's module; its projections and norms become this module's, the very same objects.
    """

    def __init__(self, anatomy: AttentionAnatomy, parts: nn.Module) -> None:
        super().__init__()
        self.anatomy, self.path = anatomy, anatomy.path
        for name in (*anatomy.inputs, *anatomy.norms, anatomy.output):
            self.add_module(name, parts.get_submodule(name))
        if anatomy.null_logits:
            self.register_parameter(anatomy.null_logits, parts.get_parameter(anatomy.null_logits))
        self._slopes: dict[torch.device, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return next(getattr(self, self.anatomy.output).parameters()).device

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D] of hidden_states [B, T, hidden], normalised and rotated.

        Raises:
            ValueError: the layer rotates, and `position_embeddings` (cos, sin) are missing.
        """
        anatomy = self.anatomy
        q, k, v = self.split([getattr(self, name)(hidden_states) for name in anatomy.inputs])
        if anatomy.norms:
            norm_q, norm_k = anatomy.norms
            q, k = self.normalize(norm_q, q), self.normalize(norm_k, k)
        if anatomy.rotary_dim:
            if position_embeddings is None:
                raise ValueError(f"{self.path} rotates its queries and keys: pass position_embeddings (cos, sin)")
            cos, sin = position_embeddings
            q, k = (rotate(x, cos, sin, anatomy.rotary_dim, anatomy.rotary, anatomy.rotary_wide) for x in (q, k))
        return q, k, v

    def bend(self, device: torch.device) -> Bend:
        """What the logits of the heads are besides scale q.k, on `device`."""
        anatomy = self.anatomy
        slopes: Tensor | None = None
        if anatomy.alibi:
            if device not in self._slopes:
                with torch.inference_mode(False):  # kept, and a tensor made in inference mode could not train later
                    self._slopes[device] = torch.tensor(anatomy.alibi, device=device)
            slopes = self._slopes[device]
        null = self.get_parameter(anatomy.null_logits) if anatomy.null_logits else None
        return Bend(anatomy.logit_cap or 0.0, slopes, null)

    def split(self, made: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, D], k and v [..., G, D] of what the `inputs` made, [..., rows] each."""
        anatomy = self.anatomy
        groups, dim, size = anatomy.num_kv_heads, anatomy.head_dim, anatomy.group_size
        if anatomy.rows == "groups":
            fused = made[0].unflatten(-1, (groups, size + 2, dim))
            return fused[..., :size, :].flatten(-3, -2), fused[..., size, :], fused[..., size + 1, :]
        if anatomy.rows == "blocks":
            q, k, v = made[0].split([anatomy.num_heads * dim, groups * dim, groups * dim], dim=-1)
        else:
            q, k, v = made
        return q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim)), v.unflatten(-1, (-1, dim))

    def normalize(self, name: str, x: Tensor) -> Tensor:
        """x [B, T, heads, D] through one of the anatomy's `norms`."""
        norm = getattr(self, name)
        if self.anatomy.norm_over == "channels":
            return norm(x.flatten(-2)).unflatten(-1, (-1, self.anatomy.head_dim))
        if self.anatomy.norm_over == "head_first":
            return norm(x.transpose(1, 2)).transpose(1, 2)
        return norm(x)

    def put_out(self, heads: Tensor) -> Tensor:
        """[B, T, hidden] of the heads' outputs [B, T, H, D]."""
        return getattr(self, self.anatomy.output)(heads.flatten(2))

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Of q, k and v what projects to them: weight [heads, D, hidden] and bias [heads, D]."""
        found = [weight_and_bias(getattr(self, name)) for name in self.anatomy.inputs]
        weights = self.split([weight.T for weight, _ in found])
        made = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in found]
        biases = self.split(made)
        return [(weight.movedim(0, -1), bias) for weight, bias in zip(weights, biases, strict=True)]
