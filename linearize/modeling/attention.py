"""The module that takes a softmax attention's place: its projections, kept, around a mixer and the heads left softmax.

A layer's query heads are a partition. Heads in `softmax_heads` run causal softmax with a KV cache for their key groups
alone; the others run the mixer with its state. Where one key group has heads of both kinds, both are computed for the
group and each head takes its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bend import Bend
from .cache import MixerCacheLayer, mixer_cache_layer
from .configuration_linearize import AttentionAnatomy
from .kept import kept_softmax, kept_window
from .layout import Layout, read_layout
from .mixer import MIXERS, Mixer
from .projections import Projections


class Pick(NamedTuple):
    """Heads to pick, no head twice, and for every head that there is where it then stands, past the end for none."""

    heads: Tensor
    place: Tensor


class Routes(NamedTuple):
    """The query heads and key groups that the mixer and the kept heads read, and each query head's output among the
    mixer's, followed by the kept heads'."""

    mixer_heads: Pick
    mixer_groups: Pick
    soft_heads: Pick
    soft_groups: Pick
    outputs: Pick


class _Picked(torch.autograd.Function):
    """x [B, T, H, D] at `heads`. Its gradient is picked too, where indexing would add up what never meets: slower,
    and inductor's vectorised sums of it crash on CPUs (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(2, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,), grad = ctx.saved_tensors, grads[0]
        return torch.cat([grad, torch.zeros_like(grad[:, :, :1])], dim=2).index_select(2, place), None, None


def picked(x: Tensor, pick: Pick) -> Tensor:
    """x [B, T, H, D] with the heads of `pick` alone, in its order."""
    return _Picked.apply(x, *pick)


class LinearizeAttention(Projections):
    """Drop-in for a transformers attention module.

    Args:
        anatomy: what the teacher's module is made of.
        parts: the teacher's module, whose projections and norms this one takes over.
        layer_idx: the layer's index in the cache.
        mixer: a name in `MIXERS`.
        softmax_heads: query heads that stay softmax.
        mixer_options: keyword arguments of the mixer.
        softmax_window: keys that the kept heads see, None for as many as the teacher's heads do.
        softmax_sinks: first keys of a document that they see besides, where that is fewer than the teacher's see.
    """

    def __init__(
        self,
        anatomy: AttentionAnatomy,
        parts: nn.Module,
        layer_idx: int,
        mixer: str,
        softmax_heads: list[int],
        mixer_options: dict[str, Any],
        softmax_window: int | None = None,
        softmax_sinks: int = 0,
    ) -> None:
        super().__init__(anatomy, parts)
        self.layer_idx = layer_idx
        heads, groups = anatomy.num_heads, anatomy.num_kv_heads
        kept = set(softmax_heads)
        if not kept <= set(range(heads)) or len(kept) == heads:
            raise ValueError(f"{self.path}: softmax_heads {sorted(kept)} must leave out some of the {heads} heads")
        size = anatomy.group_size
        by_group = [[h in kept for h in range(g * size, (g + 1) * size)] for g in range(groups)]
        self.softmax_heads = sorted(kept)
        self.softmax_groups = [g for g, flags in enumerate(by_group) if any(flags)]
        self.mixer_groups = [g for g, flags in enumerate(by_group) if not all(flags)]
        self.is_hybrid = bool(kept)
        # The teacher's own window is the teacher's attention whole, and has no sinks.
        narrowed = softmax_window is not None and (anatomy.window is None or softmax_window < anatomy.window)
        self.softmax_window = softmax_window if narrowed else anatomy.window
        self.softmax_sinks = softmax_sinks if narrowed else 0
        self._routes: dict[torch.device, Routes] = {}
        self.mixer: Mixer = MIXERS[mixer](
            num_heads=len(self.mixer_groups) * size,
            num_kv_heads=len(self.mixer_groups),
            head_dim=anatomy.head_dim,
            hidden_size=anatomy.hidden_size,
            scale=anatomy.scale,
            **mixer_options,
        )

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes a token that the kept heads' KV cache grows by: none where a window bounds it."""
        return 0 if self.softmax_window else self._kept_bytes(element_size)

    def state_bytes(self, element_size: int = 2) -> int:
        """Bytes of one sequence that do not grow with it: the mixer's, and bounded keys and values of kept heads."""
        size = self.mixer.state_bytes(element_size)
        if self.is_hybrid and self.softmax_window:
            size += 8 + (self.softmax_window + self.softmax_sinks) * self._kept_bytes(element_size)
        return size

    def _kept_bytes(self, element_size: int) -> int:
        return 2 * len(self.softmax_groups) * self.anatomy.head_dim * element_size

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to [B, T, hidden], and None where transformers' attention gives its weights.

        `past_key_values` and `layer_past` are what other releases and some families call `cache`; `residual` is added
        where the anatomy says so.

        Packed documents are told by `position_ids` that restart, or by `cu_seq_lens_q` as transformers' flattening
        collator gives it.

        Raises:
            ValueError: packed documents together with a cache, or a cache of another number of rows.
        """
        batch, tokens, _ = hidden_states.shape
        q, k, v = self.project(hidden_states, position_embeddings)
        for other in (past_key_values, layer_past):
            cache = other if cache is None else cache
        layer = mixer_cache_layer(cache, self.layer_idx)
        if layer is not None and layer.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache holds {layer.batch_size} rows, and the input has {batch}: repeat or pick its rows by "
                "batch_repeat_interleave or batch_select_indices"
            )
        if (bounds := kwargs.get("cu_seq_lens_q")) is not None and batch == 1:
            layout = Layout(cu_seqlens=bounds.long())
        else:
            past = layer.places_before(tokens) if layer is not None and layer.is_static else None
            layout = read_layout(attention_mask, position_ids, batch, tokens, past)
        bend = self.bend(q.device)
        if not self.is_hybrid:
            out = self.mixer(q, k, v, hidden_states, layout=layout, cache=layer, bend=bend)
        else:
            out = self._partition(q, k, v, hidden_states, layout, layer, bend)
        if layer is not None:
            layer.advance(tokens, q.device)
        out = self.put_out(out)
        return (out if residual is None or not self.anatomy.adds_residual else out + residual), None

    def routes(self, device: torch.device) -> Routes:
        """Which heads go where, on `device`; made once. One compiled program serves layers of other heads then: it
        is given these tensors, where lists would be part of it."""
        if device not in self._routes:
            size = self.anatomy.group_size

            def pick(index: list[int], count: int) -> Pick:
                place = [index.index(entry) if entry in index else len(index) for entry in range(count)]
                with torch.inference_mode(False):  # kept, and a tensor made in inference mode could not train later
                    return Pick(torch.tensor(index, device=device), torch.tensor(place, device=device))

            heads, groups = self.anatomy.num_heads, self.anatomy.num_kv_heads
            mixed = [g * size + r for g in self.mixer_groups for r in range(size)]
            soft = [g * size + r for g in self.softmax_groups for r in range(size)]
            kept = set(self.softmax_heads)
            outputs = [len(mixed) + soft.index(head) if head in kept else mixed.index(head) for head in range(heads)]
            self._routes[device] = Routes(
                mixer_heads=pick(mixed, heads),
                mixer_groups=pick(self.mixer_groups, groups),
                soft_heads=pick(soft, heads),
                soft_groups=pick(self.softmax_groups, groups),
                outputs=pick(outputs, len(mixed) + len(soft)),
            )
        return self._routes[device]

    def _partition(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, layout: Layout, cache: MixerCacheLayer | None, bend: Bend
    ) -> Tensor:
        routes = self.routes(q.device)
        mixed = self.mixer(
            picked(q, routes.mixer_heads),
            picked(k, routes.mixer_groups),
            picked(v, routes.mixer_groups),
            x,
            layout=layout,
            cache=cache,
            bend=bend.of(routes.mixer_heads.heads),
        )
        bend = bend.of(routes.soft_heads.heads)
        soft = [
            picked(x, pick) for x, pick in ((q, routes.soft_heads), (k, routes.soft_groups), (v, routes.soft_groups))
        ]
        scale, window, sinks = self.anatomy.scale, self.softmax_window, self.softmax_sinks
        if window is None:
            kept = kept_softmax(*soft, scale=scale, layout=layout, cache=cache, bend=bend)
        else:
            kept = kept_window(*soft, scale=scale, window=window, sinks=sinks, layout=layout, cache=cache, bend=bend)
        return picked(torch.cat([mixed.to(q.dtype), kept.to(q.dtype)], dim=2), routes.outputs)
