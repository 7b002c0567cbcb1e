"""The model families that are known by name. What their attention is made of is read off their modules (anatomy.py)
and proven (proof.py), so a family that is not here converts too, if it is made of parts that are known (parts.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family, by its `model_type` in config.json, and what its modules do not show.

    `rotates` is an attribute of the attention module: where it is there and false (0, None), the layer does not rotate.
    """

    model_type: str
    name: str
    summary: str
    rotates: str = "use_rope"


FAMILIES: dict[str, Family] = {
    model_type: Family(model_type=model_type, name=name, summary=summary, **fields)
    for model_type, name, summary, fields in (
        ("cohere", "Cohere", "Command R: neighbouring channels rotate", {}),
        ("cohere2", "Cohere 2", "Command R7B: its full layers have no positions", {"rotates": "sliding_window"}),
        ("falcon", "Falcon", "Falcon with rotary positions (ALiBi not yet)", {}),
        ("gemma", "Gemma", "Gemma 1", {}),
        ("gemma3_text", "Gemma 3", "Gemma 3's text models: local and global layers, norms on queries and keys", {}),
        ("gpt2", "GPT-2", "GPT-2, with learned positions", {}),
        ("gpt_neox", "GPT-NeoX", "GPT-NeoX and Pythia", {}),
        ("granite", "Granite", "Granite 3, dense", {}),
        ("llama", "Llama", "Llama 2 and 3, and what shares their layout (SmolLM2, TinyLlama, ...)", {}),
        ("mistral", "Mistral", "Mistral; its sliding window holds in kept heads", {}),
        ("mixtral", "Mixtral", "Mixtral; its experts stay", {}),
        ("olmo2", "OLMo 2", "OLMo 2, with norms over all channels of queries and keys", {}),
        ("opt", "OPT", "OPT, with learned positions", {}),
        ("phi", "Phi", "Phi 1 to 2", {}),
        ("phi3", "Phi-3", "Phi-3, 3.5 and 4, with a fused projection", {}),
        ("qwen2", "Qwen2", "Qwen2 and 2.5, with biases on q, k and v", {}),
        ("qwen3", "Qwen3", "Qwen3, with norms on queries and keys", {}),
        ("qwen3_moe", "Qwen3-MoE", "Qwen3's mixtures of experts; its experts stay", {}),
        ("smollm3", "SmolLM3", "SmolLM3: every fourth layer has no positions", {}),
        ("stablelm", "StableLM", "StableLM 2 and its kin", {}),
        ("starcoder2", "StarCoder2", "StarCoder2", {}),
    )
}
