"""Conversations as training text: the tokenizer's chat template, and which tokens an assistant would have to
say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import UserError

_MARKED = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Conversation:
    """Token ids of a rendered conversation, and for each whether it belongs to an assistant's answer."""

    ids: list[int]
    answer: list[bool]


def render(messages: Any, tokenizer: Any, where: str) -> Conversation:
    """`messages` (a list of {"role", "content"}) through the chat template, with the assistants' tokens
    marked.

    An answer goes from what follows the generation prompt to its end token, that included. A template that
    marks answers itself ({% generation %}) is believed. `where` names the row in errors.

    Raises:
        UserError: no chat template, messages that are none, or a template whose answers cannot be found.
    """
    _check(messages, tokenizer, where)
    try:
        if _MARKED.search(_template(tokenizer)):
            found = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return Conversation(list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]])
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = _answer_spans(messages, text, tokenizer, where)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except UserError:
        raise
    except Exception as error:  # jinja's, or what a template raises for roles that it does not take
        raise UserError(f"{where}: the chat template cannot render its messages: {error}") from error
    # A token across the edge of an answer is no part of it: after the prompt, the model never says it.
    # Tokens of spaces alone may have offsets of no width.
    answer = [any(a <= s < b and e <= b for a, b in spans) for s, e in encoded["offset_mapping"]]
    return Conversation(list(encoded["input_ids"]), answer)


def _check(messages: Any, tokenizer: Any, where: str) -> None:
    if not _template(tokenizer):
        raise UserError(
            f"{where} is a conversation, and the tokenizer has no chat template: take an instruction-tuned "
            "model, or "
            "give plain text and name its field with --text-field"
        )
    entries = messages if isinstance(messages, list) else []
    if not entries or not all(isinstance(entry, dict) and {"role", "content"} <= set(entry) for entry in entries):
        raise UserError(f"{where}: messages must be a list of objects with role and content")


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template.get("default", "") if isinstance(template, dict) else template


def _answer_spans(messages: list[dict[str, Any]], text: str, tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Start and end of each assistant's answer in `text`, in characters."""
    spans: list[tuple[int, int]] = []
    end = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        content = str(message["content"] or "").strip()
        # Some templates render a turn otherwise once others follow, or add a system prompt to the whole.
        start = len(before) if text.startswith(before) and len(before) >= end else text.find(content, end)
        plain = start >= 0 and text.startswith(after)
        end = len(after) if plain else text.find(content, max(start, 0)) + len(content)
        end = _end_token(text, start, end, tokenizer.eos_token)
        if start < 0 or (content and end <= start):
            raise UserError(f"{where}: the chat template changes answer {index}, so its tokens cannot be told apart")
        spans.append((start, end))
    return spans


def _end_token(text: str, start: int, end: int, eos: str | None) -> int:
    """`end` moved to just after the answer's end token: forward over one that follows, back over what comes
    after."""
    if not eos:
        return end
    if text.startswith(eos, end):
        return end + len(eos)
    last = text.rfind(eos, start, end)
    return last + len(eos) if last >= 0 else end
