"""The module that takes a softmax attention's place: its projections, kept, around a mixer and the heads left softmax.

A layer's query heads are a partition. Heads in `softmax_heads` run causal softmax with a KV cache for their key groups
alone; the others run the mixer with its state. Where one key group has heads of both kinds, both are computed for the
group and each head takes its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cache import MixerCacheLayer, mixer_cache_layer
from .configuration_linearize import AttentionAnatomy
from .kept import kept_softmax
from .layout import Layout, read_layout
from .mixer import MIXERS, Mixer
from .reference import widen


class HeadRMSNorm(nn.Module):
    """RMS norm over each head's channels (Qwen3's q_norm and k_norm)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = widen(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding of the first `rotary_dim` channels of x [B, T, heads, D]; cos and sin [B, T, rotary_dim]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


class LinearizeAttention(nn.Module):
    """Drop-in for a transformers attention module.

    Args:
        anatomy: what the teacher's module is made of.
        layer_idx: the layer's index in the cache.
        mixer: a name in `MIXERS`.
        softmax_heads: query heads that stay softmax.
        mixer_options: keyword arguments of the mixer.
    """

    def __init__(
        self,
        anatomy: AttentionAnatomy,
        layer_idx: int,
        mixer: str,
        softmax_heads: list[int],
        mixer_options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.anatomy, self.layer_idx, self.path = anatomy, layer_idx, anatomy.path
        heads, groups, dim, hidden = (
            anatomy.num_heads,
            anatomy.num_kv_heads,
            anatomy.head_dim,
            anatomy.hidden_size,
        )
        self.q_proj = nn.Linear(hidden, heads * dim, bias=anatomy.q_bias)
        self.k_proj = nn.Linear(hidden, groups * dim, bias=anatomy.k_bias)
        self.v_proj = nn.Linear(hidden, groups * dim, bias=anatomy.v_bias)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=anatomy.o_bias)
        eps = anatomy.qk_norm_eps
        self.q_norm = None if eps is None else HeadRMSNorm(dim, eps)
        self.k_norm = None if eps is None else HeadRMSNorm(dim, eps)

        kept = set(softmax_heads)
        if not kept <= set(range(heads)) or len(kept) == heads:
            raise ValueError(f"{self.path}: softmax_heads {sorted(kept)} must leave out some of the {heads} heads")
        size = anatomy.group_size
        by_group = [[h in kept for h in range(g * size, (g + 1) * size)] for g in range(groups)]
        self.softmax_heads = sorted(kept)
        self.softmax_groups = [g for g, flags in enumerate(by_group) if any(flags)]
        self.mixer_groups = [g for g, flags in enumerate(by_group) if not all(flags)]
        self._indices: dict[tuple[str, torch.device], Tensor] = {}
        self.mixer: Mixer = MIXERS[mixer](
            num_heads=len(self.mixer_groups) * size,
            num_kv_heads=len(self.mixer_groups),
            head_dim=dim,
            hidden_size=hidden,
            scale=anatomy.scale,
            **mixer_options,
        )

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes a token that the kept heads' KV cache grows by."""
        return 2 * len(self.softmax_groups) * self.anatomy.head_dim * element_size

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to [B, T, hidden], and None where transformers' attention gives its weights.

        Packed documents are told by `position_ids` that restart, or by `cu_seq_lens_q` as transformers' flattening
        collator gives it.

        Raises:
            ValueError: packed documents together with a cache.
        """
        batch, tokens, _ = hidden_states.shape
        q, k, v = self.project(hidden_states, position_embeddings)
        cache = mixer_cache_layer(past_key_values, self.layer_idx)
        if (bounds := kwargs.get("cu_seq_lens_q")) is not None and batch == 1:
            layout = Layout(cu_seqlens=bounds.long())
        else:
            past = cache.places_before(tokens) if cache is not None and cache.is_static else None
            layout = read_layout(attention_mask, position_ids, batch, tokens, past)
        if not self.softmax_heads:
            out = self.mixer(q, k, v, hidden_states, layout=layout, cache=cache)
        else:
            out = self._partition(q, k, v, hidden_states, layout, cache)
        if cache is not None:
            cache.advance(tokens, q.device)
        return self.o_proj(out.flatten(2)), None

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D] of hidden_states [B, T, hidden], normalised and rotated.

        Raises:
            ValueError: the layer rotates, and `position_embeddings` (cos, sin) are missing.
        """
        anatomy = self.anatomy
        q = self.q_proj(hidden_states).unflatten(-1, (anatomy.num_heads, anatomy.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (anatomy.num_kv_heads, anatomy.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (anatomy.num_kv_heads, anatomy.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if anatomy.rotary_dim:
            if position_embeddings is None:
                raise ValueError(f"{self.path} rotates its queries and keys: pass position_embeddings (cos, sin)")
            cos, sin = position_embeddings
            q, k = rotate(q, cos, sin, anatomy.rotary_dim), rotate(k, cos, sin, anatomy.rotary_dim)
        return q, k, v

    def _index(self, name: str, groups: list[int], per_group: int, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._indices:
            entries = [g * per_group + r for g in groups for r in range(per_group)]
            with torch.inference_mode(False):  # kept, and a tensor made in inference mode could not train later
                self._indices[key] = torch.tensor(entries, device=device)
        return self._indices[key]

    def _partition(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, layout: Layout, cache: MixerCacheLayer | None
    ) -> Tensor:
        size, device = self.anatomy.group_size, q.device
        soft_g = self._index("softmax_groups", self.softmax_groups, 1, device)
        soft_h = self._index("softmax_group_heads", self.softmax_groups, size, device)
        mix_g = self._index("mixer_groups", self.mixer_groups, 1, device)
        mix_h = self._index("mixer_group_heads", self.mixer_groups, size, device)
        mixed = self.mixer(q[:, :, mix_h], k[:, :, mix_g], v[:, :, mix_g], x, layout=layout, cache=cache)
        kept = kept_softmax(
            q[:, :, soft_h],
            k[:, :, soft_g],
            v[:, :, soft_g],
            scale=self.anatomy.scale,
            window=self.anatomy.window,
            layout=layout,
            cache=cache,
        )
        out = torch.zeros_like(q).index_copy(2, mix_h, mixed.to(q.dtype))
        kept_all = torch.zeros_like(q).index_copy(2, soft_h, kept.to(q.dtype))
        is_soft = self._index("is_softmax", [int(h in self.softmax_heads) for h in range(q.shape[2])], 1, device)
        return torch.where((is_soft > 0)[:, None], kept_all, out)
