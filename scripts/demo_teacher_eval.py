"""What the demo teacher is measured by: loss on held-out text, and on both copies of a repeated passage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

PASSAGE, PASSAGES = 256, 64


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, T] -> cross entropy of the tokens 1..T-1 [B, T-1], nats."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, length: int) -> float:
    """Mean cross entropy (nats a token) of ids [N] in windows of `length`, each starting from nothing.

    Every token but the first of all is predicted once.
    """
    windows = [ids[at : at + length + 1] for at in range(0, len(ids) - 1, length)]
    full = [window for window in windows if len(window) == length + 1]
    batches = [torch.stack(full[at : at + 16]) for at in range(0, len(full), 16)]
    batches += [window[None] for window in windows[len(full) :]]
    return torch.cat([token_losses(model, batch).flatten() for batch in batches]).mean().item()


def passages(ids: torch.Tensor, end: int) -> torch.Tensor:
    """[PASSAGES, PASSAGE] passages spread over `ids`, each inside one document."""
    starts = torch.linspace(0, len(ids) - PASSAGE - 1, 8 * PASSAGES).long().tolist()
    inside = [ids[at : at + PASSAGE] for at in starts if not (ids[at : at + PASSAGE] == end).any()]
    chosen = torch.linspace(0, len(inside) - 1, PASSAGES).round().long().tolist()
    return torch.stack([inside[index] for index in chosen])


def copy_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, float]:
    """Mean loss on the first and the second copy when each passage stands twice with nothing between.

    ids [N, P]; the first copy's first token has nothing before it and is not counted, the second copy's is.
    """
    size = ids.shape[1]
    losses = torch.cat([token_losses(model, part.repeat(1, 2)) for part in ids.split(16)])
    return losses[:, : size - 1].mean().item(), losses[:, size - 1 :].mean().item()
