"""A converted model: the teacher's own transformers class, with its softmax attention swapped for linear-time mixers.

This folder imports torch and transformers alone, because it is copied beside the weights as remote code.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import LinearizeAttention
from .based import Based
from .cache import CACHE, CACHES, MixerCacheLayer
from .configuration_linearize import AttentionAnatomy, LinearizeConfig
from .decoding import GraphedDecoding
from .gated_delta import GatedDelta
from .generation import StatefulGeneration
from .gla import GLA
from .layout import forget_layout, refuse, restarts
from .linear import LinearAttention
from .mamba2 import Mamba2
from .retention import Retention

# Of load_adapter's arguments, those that say where the adapter's files are.
_DOWNLOAD = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
AUTO_MAP = {
    "AutoConfig": "configuration_linearize.LinearizeConfig",
    "AutoModelForCausalLM": "modeling_linearize.LinearizeForCausalLM",
}
PADDING_MASK = "linearize"


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The 2D padding mask as it came: swapped layers need no T x T mask, and must not pay for one."""
    return attention_mask


ALL_MASK_ATTENTION_FUNCTIONS.register(PADDING_MASK, _padding_mask)


def _is_static(cache: Any) -> bool:
    return cache is not None and any(
        layer.is_static if isinstance(layer, MixerCacheLayer) else isinstance(layer, StaticLayer)
        for layer in getattr(cache, "layers", ())
    )


def parent_class(config: LinearizeConfig) -> type[PreTrainedModel]:
    """transformers' causal language model class of the teacher."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping[type(config.parent_config)]


class LinearizeForCausalLM(StatefulGeneration, GraphedDecoding, PreTrainedModel, GenerationMixin):
    """The teacher's class with swapped attention; modules and tensors keep the teacher's names.

    Its children are the teacher class's own, and `forward` is that class's, run on this module.
    """

    config_class = LinearizeConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [*CACHES]  # noqa: RUF012
    # Few parameters, and decays that bf16 would round away.
    _keep_in_fp32_modules_strict = ["mixer"]  # noqa: RUF012
    _parent_class: type[PreTrainedModel]
    keep_scores: Any = None  # what `convert` measured
    calibration: Any = None

    def __init__(self, config: LinearizeConfig) -> None:
        asked = config._attn_implementation_internal
        super().__init__(config)
        parent_type = parent_class(config)
        assert config.parent_config is not None
        if config.parent_config._attn_implementation_internal == PADDING_MASK:  # from a model that was built before
            config.parent_config._attn_implementation_internal = None
        if asked is None and getattr(config.parent_config, "attn_logit_softcapping", None):
            asked = config._attn_implementation_internal = "eager"  # sdpa bounds no logits, and older releases take it
        if asked is not None:
            config.parent_config._attn_implementation_internal = config._attn_implementation_internal
        parent = parent_type(config.parent_config)
        own = self.__dict__
        for name, value in parent.__dict__.items():
            # What the parent keeps beside its modules (vocab_size, router factors, ...); its config stays ours.
            if name not in own and not name.startswith("_"):
                own[name] = value
        for name, child in parent.named_children():
            self.add_module(name, child)
        self._parent_class = parent_type
        self._is_stateful = bool(config.swapped())
        for attribute in (
            "_tied_weights_keys",
            "_no_split_modules",
            "_keep_in_fp32_modules",
            "_supports_sdpa",
            "base_model_prefix",
        ):
            setattr(self, attribute, getattr(parent_type, attribute, None))
        for index in config.swapped():
            layer = config.layers[index]
            anatomy = AttentionAnatomy(**layer["anatomy"])
            attention = LinearizeAttention(
                anatomy,
                self.get_submodule(anatomy.path),
                index,
                layer["mixer"],
                layer.get("softmax_heads", []),
                config.mixer_options,
                layer.get("softmax_window"),
                layer.get("softmax_sinks", 0),
            )
            self.set_submodule(anatomy.path, attention)
        self._use_padding_mask()
        self.post_init()

    def _use_padding_mask(self) -> None:
        """Where no layer reads a T x T mask, none is built. Set late: transformers checks the name at building."""
        if len(self.config.swapped()) == len(self.config.layers):
            base: Any = self.base_model
            base.config._attn_implementation_internal = PADDING_MASK

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', for the layers that stayed softmax."""
        super().set_attn_implementation(*args, **kwargs)
        self._use_padding_mask()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Methods and properties of the teacher's class that its forward relies on.
            parent = self.__dict__.get("_parent_class")
            if parent is None or name.startswith("__") or not hasattr(parent, name):
                raise
            attribute = getattr(parent, name)
            return attribute.__get__(self) if hasattr(attribute, "__get__") else attribute

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The teacher class's forward, arguments and all. With a cache, pads must be on the left.

        The cache is `cache`, as transformers calls it from 5.24 on, or `past_key_values`, its name before, in every
        release; the output has it by the name of the release.

        `output_attentions` gives what transformers' own hybrids give: one entry [B, H, T, T] for each layer that
        attends by softmax alone, in their order, with the "eager" attention implementation. A swapped layer makes no
        such matrix, for the heads in it that stayed softmax either.

        Raises:
            ValueError: a cache by both names; a static cache with whole layers of softmax under ALiBi; where a layer
                has a state, a cache together with packed documents or pads on the right, pads between tokens,
                or a 4D mask.
        """
        if CACHE != "cache" and cache is not None and not isinstance(cache, Cache):
            kwargs["cache"], cache = cache, None  # pages of continuous batching, which go to whole layers of softmax
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
        cache = past_key_values if cache is None else cache
        if self._has_softmax_under_alibi() and _is_static(cache):
            raise ValueError(
                "a static cache cannot serve the layers that stayed softmax whole, whose ALiBi is made for the text so "
                "far: leave cache_implementation out, or keep heads of layers and none whole"
            )
        if self._is_stateful:
            tokens = input_ids if input_ids is not None else inputs_embeds
            length = 0 if tokens is None else tokens.shape[1]
            attention_mask = self._mask_of_pads(attention_mask, position_ids, cache, use_cache, length)
            if use_cache is None and cache is None and attention_mask is None and restarts(position_ids):
                use_cache = False  # nobody asked for one, and documents that are packed have none
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)
        try:
            outputs = self._parent_class.forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE: cache},
                **kwargs,
            )
        finally:
            forget_layout()
        if getattr(outputs, "attentions", None):
            outputs.attentions = tuple(weights for weights in outputs.attentions if weights is not None)
        return outputs

    def _mask_of_pads(
        self, attention_mask: Any, position_ids: Tensor | None, cache: Any, use_cache: bool | None, length: int
    ) -> Any:
        """What the parent is given for `attention_mask`. Raises ValueError for a mask that no state can follow."""
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() == 4):
            # `generate` makes these of a mask of pads for a static cache; a token that it adds is never a pad.
            if length != 1 or not _is_static(cache):
                raise ValueError(
                    "attention_mask has 4 dimensions: a linear layer cannot follow any mask; pass a 2D mask of pads, "
                    "or position_ids that restart at each document"
                )
        elif attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask.bool()
            if cache is not None or (use_cache and length > 1):
                if mask.shape[1] > 1:
                    refuse(
                        (mask[:, :-1] & ~mask[:, 1:]).any(),
                        "attention_mask has pads on the right: pad on the left to use a cache",
                    )
            else:
                refuse(
                    ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any(),
                    "attention_mask has pads between a row's tokens: pad on one side",
                )
                if position_ids is not None and not torch.compiler.is_compiling() and bool(mask.all()):
                    return None  # transformers looks for packed documents only where there is no mask
        return attention_mask

    def _has_softmax_under_alibi(self) -> bool:
        whole = len(self.config.swapped()) < len(self.config.layers)
        family = sys.modules[self._parent_class.__module__]
        return whole and hasattr(family, "build_alibi_tensor") and bool(getattr(self.config, "alibi", True))

    def mixer_layers(self) -> list[tuple[int, LinearizeAttention]]:
        """The swapped attention modules with their layer's index."""
        return [(module.layer_idx, module) for module in self.modules() if isinstance(module, LinearizeAttention)]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Gives what no checkpoint holds its start; tensors that were loaded are flagged, and stay."""
        # transformers hands the modules of a sub-model to the sub-model's own class, which knows no mixers.
        for _, attention in self.mixer_layers():
            attention.mixer.reset_parameters()
            null = attention.bend(attention.device).null
            if null is not None:
                init.zeros_(null)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        self._parent_class._init_weights(self, module)

    def load_adapter(
        self, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; then what the adapter saved whole (`modules_to_save`), which 5.17 leaves out."""
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        adapter: Any = self.peft_config[adapter_name or "default"]
        if peft_model_id is not None and adapter.modules_to_save:
            from peft import load_peft_weights, set_peft_model_state_dict

            config = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
            given = {**config, **(kwargs.get("adapter_kwargs") or {}), **kwargs}
            where = {name: given[name] for name in _DOWNLOAD if given.get(name) is not None}
            weights = load_peft_weights(peft_model_id, device=str(self.device), **where)
            own = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            set_peft_model_state_dict(self, own, adapter_name or "default")
        return info

    def enable_adapters(self) -> None:
        """As transformers'; and what the adapter trained whole, which it switches off and not on again."""
        super().enable_adapters()
        from peft.utils import ModulesToSaveWrapper

        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(enabled=True)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves weights and config, and this folder's code beside them, for who has no linearize installed; with an
        adapter (`add_adapter`) the adapter alone, as transformers does."""
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, *args, **kwargs)
        self.config.auto_map = dict(AUTO_MAP)
        # Before the weights, so that `push_to_hub=True` uploads the code with them.
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for source in Path(__file__).parent.glob("*.py"):
            if source.name != "__init__.py":
                shutil.copyfile(source, folder / source.name)
        super().save_pretrained(save_directory, *args, **kwargs)


# Importing a mixer's file registers it; remote code is found through plain imports of siblings alone.
__all__ = [
    "GLA",
    "Based",
    "GatedDelta",
    "LinearAttention",
    "LinearizeForCausalLM",
    "Mamba2",
    "Retention",
    "parent_class",
]
