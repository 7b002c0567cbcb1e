"""Caches that stand as if a long context had been read, so that decoding after 128k tokens can be timed at once.

Softmax keys and values are random: attention takes the same time over any numbers. A mixer's state has one size at any
length, so a short context is read into it and its count of tokens is set. Positions follow from the count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..modeling import LinearizeForCausalLM
from ..modeling.cache import CACHE, MixerCacheLayer

_KEPT = ("softmax_k", "softmax_v")  # how a mixer's cache names the keys and values of heads that stayed softmax
_COUNTS = ("length", "softmax_length")  # and its counts of tokens
_BEYOND_WINDOW = 32

Fresh = Callable[[], Cache]


class PreallocatedLayer(DynamicLayer):
    """Keys and values in one buffer, read as views of what is filled.

    transformers' default layer copies everything it holds for each new token, and its static layer is read whole and
    under a mask, which keeps PyTorch's attention from sharing grouped heads: neither is the best that softmax can do.
    """

    is_croppable = False  # or `generate` may run a step too far, to take it back

    def __init__(self, like: DynamicLayer, past: int, room: int) -> None:
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.lazy_initialization(like.keys, like.values)
        self.buffers = (_random(like.keys, past + room), _random(like.values, past + room))
        self.past = past
        self.rewind()

    def rewind(self) -> None:
        self._show(self.past)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self._show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        return self.length


def _random(like: Tensor, length: int) -> Tensor:
    """[B, heads, length, D] of `like`'s other sizes."""
    return torch.empty(*like.shape[:2], length, like.shape[3], dtype=like.dtype, device=like.device).normal_()


@torch.no_grad()
def filled(model: Any, batch: int, past: int, room: int, *, static: bool = False) -> Fresh:
    """A function that gives a cache with `past` tokens in it and room for as many more, anew at each call.

    Args:
        model: a softmax model, or a converted one.
        static: transformers' static cache, which `generate` compiles for on a GPU.
    """
    short = min(past, _short(model))
    if short == 0 and not static and isinstance(model, LinearizeForCausalLM):
        return lambda: DynamicCache(config=model.config)
    cache: Cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=past + room)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, max(short, 1)), device=model.device)
    model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    if static:
        return _static(cache, past)
    layers = [_stretched(layer, past, room) for layer in cache.layers]

    def fresh() -> Cache:
        new = DynamicCache(config=model.config)
        new.layers = [_again(layer) for layer in layers]
        return new

    return fresh


def _short(model: Any) -> int:
    """Tokens that bring every part of a mixer's state into use."""
    if not isinstance(model, LinearizeForCausalLM):
        return 1
    return _BEYOND_WINDOW + max((m.mixer.window + m.mixer.sinks for _, m in model.mixer_layers()), default=0)


def _stretched(layer: Any, past: int, room: int) -> Any:
    """`layer` after a short context as it would be after `past` tokens."""
    if isinstance(layer, MixerCacheLayer):
        for name in _KEPT:
            if (held := layer.get(name)) is not None and held.shape[2] < past:
                layer.tensors[name] = torch.cat([held, _random(held, past - held.shape[2])], dim=2)
        for name in _COUNTS:
            if (count := layer.get(name)) is not None:
                layer.tensors[name] = torch.full_like(count, past)
        layer.seen = past
        return layer
    if isinstance(layer, DynamicSlidingWindowLayer):
        assert layer.keys is not None and layer.values is not None
        seen = min(past, layer.sliding_window - 1)
        layer.keys, layer.values = _random(layer.keys, seen), _random(layer.values, seen)
        layer.cumulative_length = past
        return layer
    return PreallocatedLayer(layer, past, room)


def _again(layer: Any) -> Any:
    """`layer` as it was: decoding may write into a state's tensors, and never changes those of a sliding window."""
    if isinstance(layer, PreallocatedLayer):
        layer.rewind()
        return layer
    new = copy.copy(layer)
    if isinstance(layer, MixerCacheLayer):
        new.tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    return new


def _static(cache: Cache, past: int) -> Fresh:
    """`cache` itself every time, its tensors where they are: a compiled step holds on to them."""
    layers: list[Any] = cache.layers
    states: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        if not isinstance(layer, MixerCacheLayer):
            layer.keys.normal_()
            layer.values.normal_()
            continue
        if past == 0:
            layer.reset()
        for name, tensor in layer.tensors.items():
            if name in _KEPT:
                tensor.normal_()
            else:
                if name in _COUNTS:
                    tensor.fill_(past)
                states.append((tensor, tensor.clone()))

    def fresh() -> Cache:
        for tensor, start in states:
            tensor.copy_(start)
        for layer in layers:
            for counter in ("count", "cumulative_length"):
                if isinstance(count := getattr(layer, counter, None), Tensor):
                    count.fill_(past)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = past
        return cache

    return fresh


def cache_bytes(cache: Cache, tokens: int) -> tuple[int, int]:
    """Bytes of constant state, and of keys and values, that `cache` holds for `tokens` tokens."""
    state = kv = 0
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, MixerCacheLayer):
            for name, tensor in layer.tensors.items():
                if name in _KEPT:
                    kv += _bytes(tensor[:, :, :tokens])
                else:
                    state += _bytes(tensor)
        elif layer.is_initialized:
            kv += _bytes(layer.keys[:, :, :tokens]) + _bytes(layer.values[:, :, :tokens])
    return state, kv


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
