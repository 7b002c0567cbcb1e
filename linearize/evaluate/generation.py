"""A taste of a model: text that goes on from a prompt."""

from __future__ import annotations

from typing import Any, TextIO

import torch
from transformers import TextStreamer

from ..errors import UsageError, UserError, one_line
from ..room import check_room, room_of


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    stream: TextIO | None = None,
) -> str:
    """What the model says after `prompt`, without the prompt and without special tokens.

    Args:
        chat: put the prompt through the chat template, as a user's message.
        temperature: sample at it, drawing from `seed`; None or 0 takes the likeliest token each time.
        stream: write the text here too, as it comes.

    Raises:
        UsageError: a number out of range, more tokens than the model has learned positions for, or an empty prompt for
            a tokenizer that has no token to begin with.
        UserError: `chat` without a chat template.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and temperature < 0:
        raise UsageError(f"--temperature must be zero or more, got {temperature}")
    device = next(model.parameters()).device
    ids = _prompt_ids(tokenizer, prompt, chat).to(device)
    _check_room(room_of(model), ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=end_tokens(model, tokenizer),
                pad_token_id=pad,
                streamer=None if stream is None else _Stream(tokenizer, stream),
                **options,
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"the model does not generate ({type(error).__name__}: {one_line(error, 300)}): its "
                "generation_config.json, config.json or tokenizer may be damaged; LINEARIZE_DEBUG=1 shows where"
            ) from error
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def _check_room(room: int | None, prompt: int, new: int) -> None:
    if room is None:
        return
    check_room(room, "PROMPT", prompt, "shorten it")
    # The last of the new tokens is not read.
    what = f"--max-new-tokens {new} after a PROMPT of {prompt}"
    check_room(room, what, prompt + new - 1, f"give at most {room - prompt + 1}")


class _Stream(TextStreamer):
    """Writes to a file what transformers' streamer prints."""

    def __init__(self, tokenizer: Any, file: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.file = file

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.file.write(text + ("\n" if stream_end else ""))
        self.file.flush()


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """[1, T]"""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("--chat: the model's tokenizer has no chat template; leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # A chat template writes its special tokens itself.
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UsageError("PROMPT is empty, and the tokenizer has no token to begin with; give a prompt")
        ids = [first]
    return torch.tensor([ids])


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Those of the model's generation config, and the tokenizer's: either may be the one that it was taught."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends or None
