"""What a swapped layer carries from one forward to the next: states of constant size, and keys of kept heads.

A `MixerCacheLayer` takes the place of the stock layer in whatever transformers cache the caller brought (a
`DynamicCache` is what `generate` makes), so that every model of the ecosystem's way of passing caches works.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, QuantizedCache, StaticLayer


class MixerCacheLayer(CacheLayerMixin):
    """State of one swapped layer: `tensors` by name, all batch first, and `seen`, the tokens so far, pads included."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a swapped layer writes its own state; it has no keys and values for `Cache.update`")

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else -1

    def bytes(self) -> int:
        """Bytes that the state keeps in memory, those of the storage behind a view included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def _apply(self, function: Any) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """States move back to the device in the layer's own forward, which knows it."""

    def reset(self) -> None:
        self.tensors, self.seen = {}, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "the state of a linear-time layer cannot go back: assisted decoding and cropping need a softmax model"
        )


def mixer_cache_layer(cache: Cache | None, index: int) -> MixerCacheLayer | None:
    """The `MixerCacheLayer` at `index`, put in place of the stock layer on first use.

    Raises:
        ValueError: the cache is quantised or static, or its layer already holds another model's keys.
    """
    if cache is None:
        return None
    if isinstance(cache, QuantizedCache):
        raise ValueError("a quantised cache holds keys and values only; a converted model keeps recurrent states")
    layers: list[Any] = cache.layers
    if any(isinstance(layer, StaticLayer) for layer in layers):
        raise ValueError("a static cache is not supported: the state is constant already; use the default cache")
    while len(layers) <= index:
        layers.append(MixerCacheLayer())
    layer = layers[index]
    if isinstance(layer, MixerCacheLayer):
        return layer
    if layer.is_initialized and layer.get_seq_length() > 0:
        raise ValueError(f"layer {index} of the cache holds another model's keys; pass a fresh cache")
    fresh = MixerCacheLayer()
    layers[index] = fresh
    return fresh


def append(layer: MixerCacheLayer, name: str, new: Tensor, dim: int) -> Tensor:
    """Grows the tensor `name` of `layer` by `new` along `dim` and returns the whole."""
    old = layer.tensors.get(name)
    whole = new if old is None else torch.cat([old.to(new.device), new], dim=dim)
    layer.tensors[name] = whole
    return whole
