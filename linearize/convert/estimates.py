"""What a conversion and its distillation would need: bytes by arithmetic, hours by a stated rate."""

from __future__ import annotations

from typing import Any

from ..distill.memory import training_flops, training_memory

GIB = 2**30
BATCH, LENGTH, TOKENS = 1, 2048, 20_000_000
SUSTAINED_FLOPS = 200e12  # a bf16 training step of this kind on one H100-class GPU


def convert_estimate(parameters: int, new_parameters: int, attention: int, element: int) -> dict[str, Any]:
    """From file to file, conversion holds the attention of two layers, of `attention` parameters each, and wide copies
    of it; loaded, one copy of the weights. `element` is a weight's bytes."""
    size = parameters * element + new_parameters * (4 - element)
    return {
        "memory_bytes": attention * (2 * element + 4 + 2 * 8) + GIB // 2,
        "memory_bytes_loaded": size + GIB // 2,
        "seconds": round(2 * size / 500e6 + 5, 1),
        "assumes": "a layer at a time and 0.5 GiB of program; 500 MB/s of disk, read and write",
    }


def distill_estimate(facts: dict[str, int], intermediate: int | None) -> dict[str, Any]:
    """Memory and time of each stage; `facts` has parameters, new_parameters, hidden, layers and vocab."""
    stages: dict[str, Any] = {}
    for name, stage, rank in (
        ("transfer", "transfer", None),
        ("logits with LoRA of rank 16", "logits", 16),
        ("logits on all parameters", "logits", None),
    ):
        need = training_memory(
            **facts, batch=BATCH, length=LENGTH, stage=stage, lora_rank=rank, intermediate=intermediate
        )
        flops = training_flops(**facts, tokens=TOKENS, length=LENGTH, stage=stage, lora_rank=rank)
        stages[name] = {
            "memory_bytes": need["total"],
            "fits_80_gb": need["total"] < 80e9,
            "hours_20m_tokens": round(flops / SUSTAINED_FLOPS / 3600, 2),
            "parts": need,
        }
    return {
        "batch": BATCH,
        "length": LENGTH,
        "assumes": f"gradient checkpointing, bf16 weights, fp32 AdamW, {SUSTAINED_FLOPS / 1e12:.0f} TFLOP/s sustained",
        "stages": stages,
    }
