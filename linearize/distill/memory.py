"""What a training stage needs, in bytes and operations, by arithmetic alone: no weights, no device.

Symbols: P teacher's parameters, N new ones, L layers, h hidden size, i MLP width, V vocabulary, r LoRA rank,
B sequences of T tokens in a forward pass, C tokens of a chunk of logits, n parameters that train.
Teacher and student are bf16, what trains is fp32 with AdamW's two fp32 moments, as trainer.py has it.
"""

from __future__ import annotations

from ..errors import UsageError

TRAINED_BYTES = 4 + 4 + 8  # fp32 value, gradient, two moments
# Bytes per token and hidden channel of one swapped attention layer's graph: autograd of the pure-torch
# mixers saves 35 (retention) to 75 (based) with a window of 64; as much again is alive while they run.
MIXER_BYTES = 150
# The rest of a decoder layer: norms, residuals, projections in bf16, some of them widened to fp32.
LAYER_BYTES = 24
# fp32 arrays of C x V alive in a chunk's backward: both logits, both log-probabilities, products, gradient.
HEAD_ARRAYS = 7
# Mixer operations per token and hidden channel: window scores and values, chunk scores and values, states.
MIXER_FLOPS = 2048


def lora_parameters(*, hidden: int, layers: int, rank: int, intermediate: int | None = None) -> int:
    """LoRA on every linear layer of the decoder: L r (8 h + 3 (h + i)), keys as wide as queries."""
    width = intermediate or 4 * hidden
    return layers * rank * (8 * hidden + 3 * (hidden + width))


def training_memory(
    *,
    parameters: int,
    new_parameters: int,
    hidden: int,
    layers: int,
    vocab: int,
    batch: int,
    length: int,
    stage: str,
    lora_rank: int | None = None,
    intermediate: int | None = None,
    chunk: int = 1024,
) -> dict[str, int]:
    """Peak bytes on the training device, by part and in `total`.

    `stage`: "transfer", "logits" (all parameters, or LoRA with `lora_rank`), "finetune" (LoRA, no teacher).

        teacher       2 P
        student       2 P + 4 N; what trains of it is counted in `trained`
        trained       16 n: n = N (transfer), N + LoRA (with a rank), P + N (logits on all parameters)
        activations   transfer: one layer's graph and the teacher's one layer, B T (150 h + 24 h + 6 i)
                      else also a checkpoint a layer and final states, B T h (2 L + 12)
        head          0 for transfer, else 7 arrays of min(C, B T) x V fp32

    Raises UsageError for an unknown stage.
    """
    if stage not in ("transfer", "logits", "finetune"):
        raise UsageError(f"stage must be transfer, logits or finetune, got {stage!r}")
    width = intermediate or 4 * hidden
    tokens = batch * length
    lora = lora_parameters(hidden=hidden, layers=layers, rank=lora_rank, intermediate=width) if lora_rank else 0
    everything = stage == "logits" and not lora_rank
    trained = parameters + new_parameters if everything else new_parameters + lora
    activations = graph_bytes(hidden=hidden, layers=1, tokens=tokens, intermediate=intermediate)
    head = 0
    if stage != "transfer":
        # the residual stream is fp32 where the embeddings train
        activations += tokens * hidden * (layers * (4 if everything else 2) + 12)
        head = HEAD_ARRAYS * 4 * min(chunk, tokens) * vocab
    memory = {
        "teacher": 0 if stage == "finetune" else 2 * parameters,
        "student": 0 if everything else 2 * parameters,
        "trained": TRAINED_BYTES * trained,
        "activations": activations,
        "head": head,
    }
    return memory | {"total": sum(memory.values())}


def graph_bytes(*, hidden: int, layers: int, tokens: int, intermediate: int | None = None) -> int:
    """What backward needs of all L layers without checkpoints: L B T (150 h + 24 h + 6 i)."""
    return layers * tokens * (hidden * (MIXER_BYTES + LAYER_BYTES) + 6 * (intermediate or 4 * hidden))


def training_flops(
    *,
    parameters: int,
    new_parameters: int,
    hidden: int,
    layers: int,
    vocab: int,
    tokens: int,
    length: int,
    stage: str,
    lora_rank: int | None = None,
) -> int:
    """Floating-point operations of a stage over `tokens`: 2 a weight and token forward, twice that backward.

    A teacher's forward is 2 (P - V h) + 2 L h T a token (causal softmax), and 2 V h for its logits. A swapped
    layer takes 2048 h for its mixer in place of the softmax. Transfer: the teacher without its head, and the
    student's projections forward (8 h^2 a layer), backward through the output projection alone (2 h^2).
    Logits and finetune: the student forward twice (checkpointing), backward once for activations, and once
    more for weights where all train.

    Raises UsageError for an unknown stage.
    """
    if stage not in ("transfer", "logits", "finetune"):
        raise UsageError(f"stage must be transfer, logits or finetune, got {stage!r}")
    head = 2 * vocab * hidden
    body = 2 * (parameters - vocab * hidden)
    softmax = 2 * layers * hidden * length
    mixer = MIXER_FLOPS * hidden * layers
    if stage == "transfer":
        per_token = body + softmax + layers * 10 * hidden**2 + 3 * mixer
    else:
        passes = 4 if stage == "logits" and not lora_rank else 3
        per_token = passes * (body + head) + 4 * mixer
        if stage == "logits":
            per_token += body + softmax + 2 * head  # the teacher's chunks of logits are recomputed too
        if lora_rank:
            per_token += 2 * 4 * lora_parameters(hidden=hidden, layers=layers, rank=lora_rank)
    return int(tokens * (per_token + 2 * new_parameters))
