"""Teachers in GGUF files, through transformers: config, dequantised weights and tokenizer."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .checkpoint_files import GgufHeader, check_gguf
from .errors import UserError
from .load_errors import said_clearly

_GGML_BF16 = 30


def gguf_config(path: Path) -> PreTrainedConfig:
    """The config that the file's metadata describe. Raises UserError for a damaged file."""
    return copy.deepcopy(_cached_gguf_config(path.resolve(), path.stat().st_mtime_ns))


@lru_cache(maxsize=4)  # transformers reads the vocabulary anew each time, which takes seconds
def _cached_gguf_config(path: Path, modified: int) -> PreTrainedConfig:
    check_gguf(path)
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    config.__dict__.pop("_model_name_or_path", None)  # the file's title, which is no path
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if config.architectures is None and kind is not None:
        config.architectures = [kind.__name__]
    return config


def load_gguf(path: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """The dequantised model, in eval mode; "auto" is fp32, or bf16 where the file is. Raises UserError."""
    header = check_gguf(path)
    if dtype == "auto":
        dtype = torch.bfloat16 if _GGML_BF16 in header.types.values() else torch.float32
    with said_clearly("loading", str(path)):
        config = gguf_config(path)
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            config=copy.deepcopy(config),
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        loaded, info = found
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"{path} lacks {len(missing)} tensors of a {header.architecture} model ({missing[0]}, ...)")
        return _plain(loaded, config)


def gguf_tokenizer(path: Path) -> Any:
    """The file's tokenizer, with the special tokens and the chat template that the file gives."""
    header = check_gguf(path)
    with said_clearly("reading the tokenizer of", str(path)):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return _with_special_tokens(tokenizer, header)


def _plain(loaded: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The same tensors, not copied, in a model that can be saved: transformers refuses one it holds
    quantised."""
    config.dtype = loaded.dtype
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for name, buffer in loaded.named_buffers():  # those that no checkpoint holds, such as rotary frequencies
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(leaf, buffer, persistent=leaf not in module._non_persistent_buffers_set)
    model.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.generation_config = loaded.generation_config
    model.name_or_path = config.name_or_path
    return model.eval()


def _with_special_tokens(tokenizer: Any, header: GgufHeader) -> Any:
    """Special tokens as the file gives them: transformers 5.17 gets the end token of Llama files wrong."""
    tokenizer.clean_up_tokenization_spaces = False  # 5.17 turns it on, and BPE text loses spaces by it
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and getattr(tokenizer, f"{ours}_token_id") != index and index < len(tokenizer):
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(index))
    return tokenizer
