"""What a swapped layer carries from one forward to the next: states of constant size, and keys of kept heads.

A `MixerCacheLayer` takes the place of the stock layer in whatever transformers cache the caller brought (a
`DynamicCache` is what `generate` makes), so that every model of the ecosystem's way of passing caches works.

Its tensors are made once and then written in place, without a look at their values, so that a CUDA graph or a compiled
decoding step finds them where they were. The keys of a window lie in a ring: slot j holds the newest token whose place
in its document is j modulo W, however it came there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, QuantizedCache, StaticLayer

# What a model's cache is called, as an argument and in an output: `cache` from transformers 5.24 on.
_prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
CACHE = "cache" if "cache" in _prepare.parameters else "past_key_values"
# The argument that is the cache, by the names that transformers' attention modules give it.
CACHES = ("cache", "past_key_values", "layer_past")


class MixerCacheLayer(CacheLayerMixin):
    """State of one swapped layer: `tensors` by name, all batch first, and the count of tokens so far, pads included.

    Args:
        max_cache_len: tokens that a static cache was made for; None in a cache that grows. A static cache counts in a
            tensor, which compiled code needs, and holds that many keys of kept heads.
        counter: the layer that counts for all of a static cache; None: this one does.
        layers: all layers of a cache that offloads keys; None in one that does not.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        max_cache_len: int | None = None,
        counter: MixerCacheLayer | None = None,
        layers: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.counter = counter
        self.layers = layers
        self.seen = 0  # of a cache that grows
        self.padded = False  # whether kept heads must mind pads
        self.count: Tensor | None = None  # of a static one

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "this cache was filled by a converted model, whose swapped layers keep a state and no keys and values; "
            "pass a fresh cache to another model"
        )

    @property
    def is_static(self) -> bool:
        return self.max_cache_len is not None

    @property
    def is_constant(self) -> bool:
        """Whether its tensors stay as large as they are: keys of heads that see everything grow, but in a static
        cache."""
        return self.is_static or "softmax_k" not in self.tensors

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def put(self, name: str, value: Tensor) -> Tensor:
        """Writes `value` where the tensor `name` stands, or makes that tensor; returns the tensor."""
        old = self.tensors.get(name)
        if old is not None and old.shape == value.shape and old.device == value.device and _writable(old):
            return old.copy_(value)
        made = value.clone(memory_format=torch.contiguous_format)  # a view would keep what it is a view of
        self._keep_address(made)
        self.tensors[name] = made
        return made

    def can_step(self, device: torch.device) -> bool:
        """Whether one token more can be written in place: states are there, on `device`, and no gradient is asked."""
        if "kv" not in self.tensors or torch.is_grad_enabled():
            return False
        return all(tensor.device == device and _writable(tensor) for tensor in self.tensors.values())

    def advance(self, tokens: int, device: torch.device) -> None:
        """Counts tokens that the layer has taken."""
        self.is_initialized = True
        if not self.is_static:
            self.seen += tokens
        elif self.counter is None:
            if self.count is None:
                self.count = torch.zeros((), dtype=torch.long, device=device)
                self._keep_address(self.count)
            self.count.add_(tokens)

    def _keep_address(self, tensor: Tensor) -> None:
        if self.is_static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)  # or the compiled step's CUDA graph would copy it in and out

    def get_seq_length(self) -> Any:
        """Tokens so far; a tensor in a static cache, as transformers' own static layers give it."""
        if not self.is_static:
            return self.seen
        length = (self.counter or self).count
        return 0 if length is None else length

    def places_before(self, tokens: int) -> Any:
        """Where the `tokens` of this forward begin, asked inside it: the layer that counts has counted them already by
        the time that a later one asks."""
        length = self.get_seq_length()
        return length if self.counter is None else length - tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length if self.max_cache_len is None else self.max_cache_len), 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else -1

    def bytes(self) -> int:
        """Bytes that the state keeps in memory, those of the storage behind a view included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def _apply(self, function: Any) -> None:
        self.tensors = {name: function(tensor).contiguous() for name, tensor in self.tensors.items()}

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Fetches the next layer's keys: a cache asks for the layer after the one that runs, which may be this, whose
        state stays where it is."""
        layers = self.layers or []
        at = layers.index(self) if layers else 0
        for layer in layers[at + 1 :] + layers[:at]:
            if layer.keys is not None and layer.keys.device != layer.device:
                return layer.prefetch()

    def reset(self) -> None:
        """Forgets everything; a static layer keeps its tensors, all zero."""
        if self.is_static:
            for tensor in self.tensors.values():
                tensor.zero_()
            if self.count is not None:
                self.count.zero_()
        else:
            self.tensors, self.seen, self.padded = {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "the state of a linear-time layer cannot go back, so its cache cannot be cropped: keep a copy.deepcopy "
                "of the cache from before the tokens that you may want removed"
            )


def _writable(tensor: Tensor) -> bool:
    """Whether `tensor` may be written in place: a gradient may need it, and inference tensors stay in that mode."""
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return True
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def mixer_cache_layer(cache: Cache | None, index: int) -> MixerCacheLayer | None:
    """The `MixerCacheLayer` at `index`, put in place of the stock layer on first use.

    Raises:
        ValueError: the cache is quantised, or its layer already holds another model's keys.
    """
    if cache is None:
        return None
    if isinstance(cache, QuantizedCache):
        raise ValueError(
            "a quantised cache holds keys and values only, and a converted model keeps recurrent states: pass a "
            "DynamicCache or a StaticCache"
        )
    layers: list[Any] = cache.layers
    offloaded = layers if getattr(cache, "offloading", False) else None
    while len(layers) <= index:
        layers.append(MixerCacheLayer(layers=offloaded))
    layer = layers[index]
    if isinstance(layer, MixerCacheLayer):
        return layer
    if layer.is_initialized and layer.get_seq_length() > 0:
        raise ValueError(f"layer {index} of the cache holds another model's keys; pass a fresh cache")
    fresh = MixerCacheLayer(layers=offloaded)
    if isinstance(layer, StaticLayer):
        # The length that was asked for; a sliding layer's own is cut to its window.
        length = max(getattr(other, "max_cache_len", None) or 0 for other in layers)
        counter = next((other for other in layers if isinstance(other, MixerCacheLayer)), None)
        fresh = MixerCacheLayer(max_cache_len=length, counter=counter, layers=offloaded)
    layers[index] = fresh
    return fresh


def append(layer: MixerCacheLayer, name: str, new: Tensor, dim: int) -> Tensor:
    """Grows the tensor `name` of `layer` by `new` along `dim` and returns the whole."""
    old = layer.tensors.get(name)
    whole = new if old is None else torch.cat([old.to(new.device), new], dim=dim)
    layer.tensors[name] = whole
    return whole


def _slots(places: Tensor, ring: Tensor) -> Tensor:
    """Index for `gather` and `scatter` along dim 1 of `ring`, from slots [B, n]."""
    return places.view(*places.shape, *[1] * (ring.dim() - 2)).expand(-1, -1, *ring.shape[2:])


def unroll(ring: Tensor, length: Tensor) -> Tensor:
    """The tokens of `ring` [B, W, ...] from oldest to newest, for documents of `length` [B] tokens; those at places
    below 0 never were, and hold anything."""
    window = ring.shape[1]
    order = (length.unsqueeze(1) + torch.arange(window, device=ring.device)).remainder(window)
    return ring.gather(1, _slots(order, ring))


def roll(ring: Tensor | None, new: Tensor, start: Tensor, window: int) -> Tensor:
    """The ring [B, W, ...] after `new` [B, T, ...], whose first token's place is `start` [B], below 0 for pads."""
    tokens = new.shape[1]
    last = (start + tokens - 1).unsqueeze(1)
    slots = torch.arange(window, device=new.device)
    place = last - (last - slots).remainder(window)  # of the newest token of each slot, [B, W]
    found = place >= start.clamp(min=0).unsqueeze(1)
    picked = new.gather(1, _slots((place - start.unsqueeze(1)).clamp(0, tokens - 1), new))
    kept = torch.zeros_like(picked) if ring is None else ring.to(new)
    return torch.where(found.view(*found.shape, *[1] * (new.dim() - 2)), picked, kept)
