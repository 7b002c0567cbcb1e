"""Local tasks: answers that are generated, and choices that are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..room import check_room, room_of
from .generation import end_tokens
from .scoring import Scorer

NEW_TOKENS = 24


def contained(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int, bar: Any) -> dict[str, Any]:
    """Share of the items of which an answer is contained, whatever its case, in the 24 greedy tokens after the context
    and the question, put through the chat template where the tokenizer has one."""
    prompts = [_prompt(tokenizer, row) for row in rows]
    _check_room(room_of(model), max(map(len, prompts)) + NEW_TOKENS - 1)
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    found = 0
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in part)
        ids = torch.full((len(part), longest), pad)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(part):  # pads on the left: a cache takes no others
            ids[line, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[line, longest - len(prompts[index]) :] = 1
        texts = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=ends,
            pad_token_id=pad,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )[:, longest:]
        for index, tokens in zip(part, texts, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).lower()
            found += any(answer.lower() in text for answer in rows[index]["answers"])
        bar.update(len(part))
    return {"score": found / len(rows)}


def _prompt(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    text = f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def likeliest(
    scorer: Scorer,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    bar: Any,
    room: int | None = None,
) -> dict[str, Any]:
    """Share of the items whose right choice has the highest log-likelihood after the context, and, as `normalised`, the
    highest log-likelihood a character of the choice."""
    pairs = [_choice(tokenizer, row["context"], choice) for row in rows for choice in row["choices"]]
    _check_room(room, max(len(tokens) for tokens, _ in pairs))
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))
    logs = torch.zeros(len(pairs), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(pairs[index][0]) for index in part)
        # Pads on the right: what comes later changes nothing before it.
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        for line, index in enumerate(part):
            ids[line, : len(pairs[index][0])] = torch.tensor(pairs[index][0])
        hidden = scorer.run(ids)
        for line, index in enumerate(part):
            tokens, first = pairs[index]
            logs[index] = _log_likelihood(scorer, hidden[line], tokens, first)
        bar.update(len(part))
    right = normalised = at = 0
    for row in rows:
        own = logs[at : at + len(row["choices"])]
        lengths = torch.tensor([len(choice) for choice in row["choices"]], dtype=torch.float64)
        right += int(own.argmax()) == row["gold"]
        normalised += int((own / lengths).argmax()) == row["gold"]
        at += len(row["choices"])
    return {"score": right / len(rows), "normalised": normalised / len(rows)}


def _check_room(room: int | None, tokens: int) -> None:
    check_room(room, "the longest item of --tasks", tokens, "take it out of the file")


def _choice(tokenizer: Any, context: str, choice: str) -> tuple[list[int], int]:
    """Tokens of both together, and where the choice's begin; the first token of all is never one of them."""
    whole, before = tokenizer(context + choice)["input_ids"], tokenizer(context)["input_ids"]
    first = 0
    while first < min(len(before), len(whole) - 1) and before[first] == whole[first]:
        first += 1
    if first == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start if start is not None else 0, *whole], 1
    return whole, first


def _log_likelihood(scorer: Scorer, hidden: Tensor, tokens: list[int], first: int) -> float:
    """Of tokens[first:] after those before them; hidden [T, X] may go on behind them."""
    log = torch.log_softmax(scorer.head(hidden[first - 1 : len(tokens) - 1]).float(), dim=-1)
    targets = torch.tensor(tokens[first:], device=log.device)
    return float(log.gather(1, targets[:, None]).double().sum())
