"""Tiny configs of the families that convert, of those that do not yet, and of some that nobody listed.

All have 2 layers of 4 query heads over 64 channels, weights large enough that attention is far from even, and a
vocabulary of 128. The variants of a family that its attention depends on stand beside it, as "family+variant".
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
USUAL = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": False}
LOCAL = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = {name: value for name, value in SIZES.items() if name != "initializer_range"}
OPT |= {"ffn_dim": 96, "init_std": 0.2}
BLOOM = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
# Rotary frequencies that follow the text's length.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
# Ministral 3 scales its queries by position; not with these.
FLAT = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# model_type+variant: the config's class, and what differs from USUAL, or all of it
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", USUAL),
    "llama+dynamic": ("LlamaConfig", {**USUAL, "rope_parameters": DYNAMIC}),
    "mistral": ("MistralConfig", {**USUAL, "sliding_window": 12}),
    "mixtral": ("MixtralConfig", {**USUAL, **EXPERTS, "sliding_window": None}),
    "qwen2": ("Qwen2Config", USUAL),
    "qwen3": ("Qwen3Config", {**USUAL, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**USUAL, **QWEN_EXPERTS, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**USUAL, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**USUAL, **LOCAL, "head_dim": 16, "attn_logit_softcapping": 5.0}),
    "gemma3_text": ("Gemma3TextConfig", {**USUAL, **LOCAL, "head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma3_text+wide": ("Gemma3TextConfig", {**USUAL, **LOCAL, "num_key_value_heads": 1, "head_dim": 256}),  # the 1B's
    "phi": ("PhiConfig", {**USUAL, "partial_rotary_factor": 0.5}),
    "phi+norms": ("PhiConfig", {**USUAL, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("Phi3Config", USUAL),
    "phi3+long": ("Phi3Config", {**USUAL, "rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2+scales": ("GPT2Config", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 96}),
    "opt": ("OPTConfig", {**OPT, "word_embed_proj_dim": 64}),
    "opt+after": ("OPTConfig", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "falcon": ("FalconConfig", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}),
    "falcon+one": ("FalconConfig", {**SIZES, "multi_query": True, "bias": False}),
    "falcon+each": ("FalconConfig", {**SIZES, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon+alibi": ("FalconConfig", {**SIZES, "alibi": True, "multi_query": False, "bias": True}),
    "bloom": ("BloomConfig", BLOOM),
    "stablelm": ("StableLmConfig", {**USUAL, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm+norms": ("StableLmConfig", {**USUAL, "qk_layernorm": True, "use_parallel_residual": True}),
    "olmo2": ("Olmo2Config", USUAL),
    "smollm3": ("SmolLM3Config", {**USUAL, "no_rope_layers": [1, 0]}),
    "granite": ("GraniteConfig", {**USUAL, "attention_multiplier": 0.3, "logits_scaling": 3.0}),
    "gpt_oss": ("GptOssConfig", {**USUAL, **LOCAL, **EXPERTS, "head_dim": 16, "rope_parameters": YARN}),
    "cohere": ("CohereConfig", USUAL),
    "cohere+norms": ("CohereConfig", {**USUAL, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**USUAL, **LOCAL}),
    "starcoder2": ("Starcoder2Config", {**USUAL, "sliding_window": None}),
}
# Families that nobody listed, made of the same parts.
UNLISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("OlmoConfig", USUAL),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "glm": ("GlmConfig", {**USUAL, "head_dim": 16}),
    "ministral3": ("Ministral3Config", {**USUAL, "rope_parameters": FLAT}),
    "persimmon": ("PersimmonConfig", {**SIZES, "intermediate_size": 96}),
}
# Families that are refused, with what the message names.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mpt": ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 2}, "Wqkv (Linear)"),
    "bitnet": ("BitNetConfig", USUAL, "attn_sub_norm"),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]]},
        "attn (GPTNeoAttention)",
    ),
    "gemma3": ("Gemma3Config", {}, "several parts (text_config, vision_config)"),
    "gemma3n": ("Gemma3nConfig", {}, "here a 'gemma3n_text'"),
    "llava": ("LlavaConfig", {}, "here a 'llama'"),
    "mamba": ("MambaConfig", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}, "mixer (MambaMixer)"),
}


def config_of(name: str) -> PreTrainedConfig:
    kind, fields = {**CONVERTED, **UNLISTED, **REFUSED}[name][:2]
    return getattr(transformers, kind)(**copy.deepcopy(fields))


def teacher_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random teacher whose norms, biases and anything else that starts at nothing are off their starts."""
    torch.manual_seed(0)
    config = config_of(name)
    how = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path or path.endswith(("bias", "sinks")):
                parameter.add_(
                    (2.0 if path.endswith("sinks") else 0.3)
                    * torch.randn(parameter.shape, generator=generator).to(parameter)
                )
    return model
