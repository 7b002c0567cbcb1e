"""What `generate` may do with a state that cannot go back; the rest is refused before it could give wrong tokens.

A swapped layer keeps no keys to cut off, to quantise or to lay out in pages. So nothing that rejects tokens after the
forward saw them (assisted decoding, prompt lookup), no quantised cache, and no continuous batching, whose forward hands
an attention layer its pages and no state. A model with every layer left softmax does all of these.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from .cache import CACHE


class StatefulGeneration:
    """Mixin of a model, before transformers' own `GenerationMixin`; `_is_stateful` says whether a layer has a state."""

    _is_stateful: bool
    _parent_class: type[PreTrainedModel]

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_stateful and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted generation is not supported: the state of a linear-time layer cannot go back over tokens "
                "that are rejected. Leave out assistant_model, prompt_lookup_num_tokens and the like"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_stateful and generation_config.is_assistant:
            raise ValueError(
                "assistant_model is a converted model: the state of a linear-time layer cannot go back over tokens of "
                "its that are rejected. Pass a softmax model as the assistant, its teacher for one"
            )
        if self._is_stateful and generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation='quantized': the state of a linear-time layer has no keys to quantise, and does "
                "not grow. Leave cache_implementation out, or pass 'static'"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', where every layer is softmax.

        Raises:
            ValueError: a layer is not.
        """
        if self._is_stateful:
            raise ValueError(
                "continuous batching (generate_batch, cache_implementation='paged', transformers serve "
                "--continuous-batching) keeps pages of keys, and a linear-time layer has a state instead. "
                "Call generate on a batch padded on the left"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', which starts from `inputs_embeds` where this names them.

        Raises:
            ValueError: the cache that `generate` was given holds all of the prompt, or more.
        """
        for name in {"cache", "past_key_values"} & kwargs.keys() - {CACHE}:
            given = kwargs.pop(name)  # by the name of another release
            kwargs[CACHE] = given if kwargs.get(CACHE) is None else kwargs[CACHE]
        length = kwargs.get("next_sequence_length")
        if self._is_stateful and length is not None and length <= 0:
            raise ValueError(
                f"{CACHE}: the cache holds {kwargs[CACHE].get_seq_length()} tokens, and nothing of the prompt "
                "comes after them: a linear-time layer cannot go back. Pass the tokens that follow too, or a cache "
                "that was made of fewer"
            )
        own = _overridden(self._parent_class)  # type: ignore[arg-type]
        prepare = super().prepare_inputs_for_generation if own is None else functools.partial(own, self)  # type: ignore[misc]
        return prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


@functools.cache
def _overridden(parent: type[GenerationMixin]) -> Callable[..., Any] | None:
    """The teacher class's own `prepare_inputs_for_generation`, whose `super()` is then this model's; None where it is
    transformers'. Phi-3's forgets a cache when the text grows past the length at which its frequencies change."""
    function = parent.prepare_inputs_for_generation
    if function is GenerationMixin.prepare_inputs_for_generation:
        return None
    function = inspect.unwrap(function)
    code = function.__code__
    cells = tuple(
        CellType(StatefulGeneration) if name == "__class__" else cell
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    )
    made = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
