"""Decoding as one CUDA graph: `generate` records the step of one token and replays it for every further one.

At one token a launch costs more than its work, and Python more than the launch. A swapped layer's state stands at fixed
addresses and is written in place, so a step can be recorded; what grows cannot. With the `DynamicCache` that `generate`
makes, the model's own forward is recorded. With `cache_implementation="static"` the forward is compiled first, as
transformers does it, and the compiled step is recorded in place of the graphs that torch.compile would make of it: a
replay does not look at guards.

Quietly, nothing is recorded where it would not be right: off CUDA, in training mode, over several devices or with
hooks, where a softmax layer's or kept heads' keys grow with the text, in beam search, and when attentions or hidden
states are asked for. `generate(..., disable_compile=True)`, `model.decode_graphs = False` and the
environment's `LINEARIZE_CUDA_GRAPHS=0` switch it off. A graph lives as long as the call of `generate`, and writes the
tensors of that call's cache.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_masks_for_generate

from .cache import CACHE, MixerCacheLayer
from .recording import record, records_on

# `generate` asks twice, one after the other in one thread: the answer to the first, until the second.
_asked = threading.local()
# torch.compile's modes that make CUDA graphs, and what they are without.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class GraphedDecoding:
    """Mixin of a model, before transformers' own: what `generate` calls for a token's forward records it.

    `decode_graphs` is the model's switch.
    """

    decode_graphs = True

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', without a mask for a token that was added: it is no pad, and swapped layers ask no more."""
        added = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        if added and kwargs.get(CACHE) is not None and self._all_swapped():
            kwargs["attention_mask"] = None
        if kwargs.get(CACHE) is None:
            kwargs["next_sequence_length"] = None  # Phi-3's class drops a cache, and in 5.17 forgets to read all anew
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def create_masks_for_generate(self, *, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """What transformers makes of a 2D mask ahead of a step with a static cache: nothing here, where the pads must
        stay to be seen or no layer would look at more."""
        if inputs_embeds.shape[1] > 1 or self._all_swapped():
            return attention_mask
        return create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """No keys are made ahead of a prompt in pieces: a swapped layer would not use them."""

    def _all_swapped(self) -> bool:
        config: Any = self.config  # type: ignore[attr-defined]
        return len(config.swapped()) == len(config.layers)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        # `generate` asks this, and on a yes takes its forward from `get_compiled_call`.
        compiles = super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]
        records = not generation_config.disable_compile and self._stays_as_large(model_kwargs.get(CACHE))
        _asked.answer = (compiles, records and can_record(self))  # type: ignore[arg-type]
        return any(_asked.answer)

    def _stays_as_large(self, cache: Cache | None) -> bool:
        """Whether no layer of `cache` will grow with the text, nor count its tokens in Python."""
        if cache is None:
            return False
        static = any(isinstance(layer, StaticLayer) or getattr(layer, "is_static", False) for layer in cache.layers)
        config: Any = self.config  # type: ignore[attr-defined]
        for index, layer in enumerate(config.layers):
            if index not in config.swapped():
                if index >= len(cache.layers) or type(cache.layers[index]) is not StaticLayer:
                    return False
            elif layer.get("softmax_heads") and not static:
                return False
        return True

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The forward for `generate`'s steps: compiled, recorded as a CUDA graph, or both."""
        compiles, records = vars(_asked).pop("answer", (True, False))
        if not records:
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        if not compiles:
            return GraphedForward(self, self)  # type: ignore[arg-type]
        config = copy.copy(compile_config or self._default_compile_config())  # type: ignore[attr-defined]
        if config.backend != "inductor" or config.mode not in WITHOUT_GRAPHS or config.options:
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        config.mode = WITHOUT_GRAPHS[config.mode]
        # Two plain steps: the second finds what the first made another way, a recording must not.
        return GraphedForward(super().get_compiled_call(config), self, plain_steps=2)  # type: ignore[misc, arg-type]


def can_record(model: nn.Module) -> bool:
    """Whether the model's step may be recorded, and is the same kernels for every token: switched on, for inference,
    on one CUDA device, without hooks."""
    if not getattr(model, "decode_graphs", False) or os.environ.get("LINEARIZE_CUDA_GRAPHS", "1") == "0":
        return False
    if "forward" in vars(model) or model._compiled_call_impl is not None:
        return False  # who compiled it may have graphs of their own
    devices = {parameter.device for parameter in model.parameters()}
    if model.training or len(devices) != 1 or not records_on(devices.pop()):
        return False
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") for module in model.modules()
    )


class GraphedForward:
    """A model's forward for one call of `generate`: steps of one token are recorded and replayed, all else runs as is.

    The first `plain_steps` run plainly, so that kernels are loaded and states are there; the next one is recorded.
    Steps are `step`'s, which may be the compiled model, and pieces of a prompt `model`'s.
    """

    def __init__(self, step: Callable[..., Any], model: Callable[..., Any], plain_steps: int = 1) -> None:
        self.step, self.model, self.plain_steps = step, model, plain_steps
        self.graph: DecodeGraph | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not _is_step(inputs):
            return self.model(**inputs)
        if self.plain_steps > 0:
            self.plain_steps -= 1
            return self.step(**inputs)
        if self.graph is None or not self.graph.fits(inputs):
            self.graph = None
            try:
                self.graph = DecodeGraph(self.step, inputs)
            except RuntimeError as error:
                warnings.warn(f"decoding without a CUDA graph, which is slower: {error}", stacklevel=2)
                self.plain_steps = 1 << 62
                return self.step(**inputs)
        return self.graph(inputs)


def _is_step(inputs: dict[str, Any]) -> bool:
    """Whether `inputs` are one token a row with its place and a cache of constant size, and all that changes between
    steps are values of tensors."""
    ids, places, cache = inputs.get("input_ids"), inputs.get("position_ids"), inputs.get(CACHE)
    if ids is None or ids.shape[1:] != (1,) or places is None or cache is None or torch.is_grad_enabled():
        return False
    if inputs.get("output_attentions") or inputs.get("output_hidden_states") or inputs.get("use_cache") is False:
        return False
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return False  # as long as the text
    return all(layer.is_constant if isinstance(layer, MixerCacheLayer) else type(layer) is StaticLayer
               for layer in cache.layers)  # fmt: skip


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors among `inputs`, those of a dict of masks too, and everything else but the cache."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            tensors |= {f"{name}.{key}": entry for key, entry in value.items() if entry is not None}
        elif name != CACHE:
            others[name] = value
    return tensors, others


def _merge(inputs: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`inputs` with `tensors` in place of its own."""
    merged = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            merged[name] = tensors[name]
        elif isinstance(value, dict):
            merged[name] = {key: tensors.get(f"{name}.{key}") for key in value}
    return merged


def _states(cache: Cache) -> list[dict[str, Tensor]]:
    """The tensors that a step writes, by layer and name."""
    layers: list[Any] = cache.layers
    return [
        dict(layer.tensors) if isinstance(layer, MixerCacheLayer) else {"keys": layer.keys, "values": layer.values}
        for layer in layers
    ]


class DecodeGraph:
    """One step of a model on the tensors of one cache; `inputs` are the forward's arguments for one token.

    Raises:
        RuntimeError: the step cannot be recorded; the cache is as it was.
    """

    def __init__(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> None:
        cache = inputs[CACHE]
        tensors, self.others = _split(inputs)
        self.given = {name: tensor.clone() for name, tensor in tensors.items()}
        self.states = _states(cache)
        ours = [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]
        seen = [layer.seen for layer in ours]
        try:
            self.replay, out = record(lambda: forward(**_merge(inputs, self.given)), self.given["input_ids"].device)
            if not self._stands(cache):
                raise RuntimeError("the step made its state anew")
        finally:
            # Nothing has run: the step is yet to be counted, and states are those that were there.
            for layer, count in zip(ours, seen, strict=True):
                layer.seen = count
            for layer, state in zip(cache.layers, self.states, strict=True):
                if isinstance(layer, MixerCacheLayer):
                    layer.tensors = state
        self.output_type, self.logits = type(out), out.logits

    def _stands(self, cache: Cache) -> bool:
        now = _states(cache)
        return len(now) == len(self.states) and all(
            a.keys() == b.keys() and all(a[name] is b[name] for name in a)
            for a, b in zip(now, self.states, strict=True)
        )

    def fits(self, inputs: dict[str, Any]) -> bool:
        """Whether the step of `inputs` is the one that was recorded."""
        tensors, others = _split(inputs)
        return (
            {name: tensor.shape for name, tensor in tensors.items()}
            == {name: tensor.shape for name, tensor in self.given.items()}
            and others == self.others
            and self._stands(inputs[CACHE])
        )

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """Runs the step. The next one overwrites the logits."""
        for name, tensor in _split(inputs)[0].items():
            self.given[name].copy_(tensor)
        self.replay()
        cache = inputs[CACHE]
        for layer in cache.layers:
            if isinstance(layer, MixerCacheLayer):
                layer.seen += 1
        return self.output_type(logits=self.logits, **{CACHE: cache})
