"""Whether a student goes on as its teacher does: greedy continuations, token by token, made with the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS, NEW_TOKENS = 64, 32


def prompts_of(ids: Tensor, count: int, *, length: int = PROMPT_TOKENS, every: int = 256) -> Tensor:
    """The first `length` tokens of each of the first `count` passages of `every` tokens of `ids` [T]: [N, length]."""
    passages = min(count, len(ids) // every)
    if not passages and count:  # too little text for one passage: it may still make a prompt
        return ids[None, :length] if len(ids) >= length else ids.new_zeros(0, length)
    return ids[: passages * every].reshape(passages, every)[:, :length]


def continuations(model: Any, prompts: Tensor, new_tokens: int, batch_size: int) -> Tensor:
    """Greedy tokens after prompts [N, T], as `generate` gives them with its cache; no end token is taken: [N,
    new_tokens]."""
    device = next(model.parameters()).device
    found = [
        model.generate(
            input_ids=rows.to(device),
            attention_mask=torch.ones_like(rows, device=device),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )[:, rows.shape[1] :].cpu()
        for rows in prompts.split(batch_size)
    ]
    return torch.cat(found)


def agreement(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """How far continuations [N, K] of a student are its teacher's.

    Returns:
        `prompts` N and `new_tokens` K; `same_prefix`, the share of the tokens before the first that differs;
        `same_tokens`, the share of equal tokens wherever they stand.
    """
    same = student == teacher
    return {
        "prompts": len(same),
        "new_tokens": same.shape[1],
        "same_prefix": float(same.long().cumprod(1).double().mean()),
        "same_tokens": float(same.double().mean()),
    }
