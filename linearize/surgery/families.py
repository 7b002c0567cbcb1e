"""The model families that are known by name. What their attention is made of is read off their modules (anatomy.py)
and proven (proof.py), so a family that is not here converts too, if it is made of parts that are known (parts.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family, and what its modules do not show.

    `rotates` is an attribute of the attention module: where it is there and false (0, None), the layer does not rotate.
    """

    summary: str
    rotates: str = "use_rope"


# By `model_type` in config.json.
FAMILIES: dict[str, Family] = {
    "bloom": Family(summary="BLOOM, with ALiBi, whose slopes start the decays"),
    "cohere": Family(summary="Command R: neighbouring channels rotate"),
    "cohere2": Family(summary="Command R7B: its full layers have no positions", rotates="sliding_window"),
    "falcon": Family(summary="Falcon, with rotary positions or ALiBi"),
    "gemma": Family(summary="Gemma 1"),
    "gemma2": Family(summary="Gemma 2: local and global layers, bounded logits"),
    "gemma3_text": Family(summary="Gemma 3's text models: local and global layers, norms on queries and keys"),
    "gpt2": Family(summary="GPT-2, with learned positions"),
    "gpt_neox": Family(summary="GPT-NeoX and Pythia"),
    "gpt_oss": Family(summary="gpt-oss: local and global layers, a learned logit a head beside its keys'"),
    "granite": Family(summary="Granite 3, dense"),
    "llama": Family(summary="Llama 2 and 3, and what shares their layout (SmolLM2, TinyLlama, ...)"),
    "mistral": Family(summary="Mistral; its sliding window holds in kept heads"),
    "mixtral": Family(summary="Mixtral; its experts stay"),
    "olmo2": Family(summary="OLMo 2, with norms over all channels of queries and keys"),
    "opt": Family(summary="OPT, with learned positions"),
    "phi": Family(summary="Phi 1 to 2"),
    "phi3": Family(summary="Phi-3, 3.5 and 4, with a fused projection"),
    "qwen2": Family(summary="Qwen2 and 2.5, with biases on q, k and v"),
    "qwen3": Family(summary="Qwen3, with norms on queries and keys"),
    "qwen3_moe": Family(summary="Qwen3's mixtures of experts; its experts stay"),
    "smollm3": Family(summary="SmolLM3: every fourth layer has no positions"),
    "stablelm": Family(summary="StableLM 2 and its kin"),
    "starcoder2": Family(summary="StarCoder2"),
}
