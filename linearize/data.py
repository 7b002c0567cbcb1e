"""Packing: from documents to training sequences of one length, and to the plain token streams of evaluation.

Shapes: L tokens in a sequence, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .chat import render
from .errors import UsageError, UserError
from .memory import whole_memory
from .rows import MESSAGES, Row, Rows, TextSource, field_of, load_rows

__all__ = ["PackedDataset", "TextSource", "load_rows", "pack", "read_tokens"]

IGNORE = -100
# Longer documents are tokenised in pieces, so that a corpus in one file need not be tokenised whole.
_PIECE = 200_000  # characters
_BATCH = 250_000  # characters in one call of the tokenizer
_BYTES = 5  # of a packed token: its id, and whether a document starts
_STREAM_BUFFER = 1000  # documents that a streamed data set is shuffled among


@dataclass(frozen=True)
class _Document:
    ids: np.ndarray  # int32
    answer: np.ndarray | None = None  # bool; None where every token is learned


class PackedDataset(Dataset):
    """Sequences of L tokens, in an order that the seed decides.

    Items: `input_ids` and `labels`, LongTensor [L]; and where documents are isolated `position_ids`,
    LongTensor [L], restarting at 0 with each document. Labels are not shifted, and -100 where nothing is to
    be learned: outside an assistant's answers, on padding, and on a document's first token where documents
    are isolated.
    """

    def __init__(self, ids: Tensor, *, starts: Tensor | None, learned: Tensor | None, facts: dict[str, Any]) -> None:
        self._ids, self._starts, self._learned = ids, starts, learned
        self._facts = facts

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self._ids[index].long()
        labels = ids.clone()
        if self._learned is not None:
            labels[~self._learned[index]] = IGNORE
        if self._starts is None:
            return {"input_ids": ids, "labels": labels}
        starts = self._starts[index]
        labels[starts] = IGNORE
        at = torch.arange(len(ids))
        positions = at - torch.where(starts, at, 0).cummax(0).values
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    @property
    def length(self) -> int:
        """L."""
        return self._ids.shape[1]

    @property
    def tokens(self) -> int:
        """N * L, padding included."""
        return self._ids.numel()

    @property
    def epochs(self) -> float | None:
        """How often the documents were gone through; None for a stream that was not read to its end."""
        return self._facts["epochs"]

    def facts(self) -> dict[str, Any]:
        """What was packed, as plain data for `linearize.json`."""
        return dict(self._facts)


def pack(
    data: str | TextSource | Rows | Iterable[Row],
    tokenizer: Any,
    *,
    length: int,
    tokens: int | None = None,
    seed: int = 0,
    isolate: bool = False,
    text_field: str = "text",
) -> PackedDataset:
    """Documents in an order drawn from `seed`, as sequences of `length` tokens.

    Text: documents joined by the end token and cut to `length`; the rest that fills no sequence is dropped.
    Conversations (rows with `messages`): isolated always, rendered by the chat template, labels on the
    answers alone; one that does not fit into what is left of a sequence begins the next (the gap is padded),
    and one longer than a sequence is cut off at its end.

    `tokens` caps the total (rounded down to whole sequences); documents are tokenised only until there are
    enough, and gone through again, in another order, when they are too few. Without `tokens` they are gone
    through once. `isolate` restarts positions with each document.

    Raises:
        UsageError: `tokens` below `length`. UserError: see `load_rows`; no end token; too little text for one
        sequence.
    """
    if length < 2:
        raise UsageError(f"--max-length must be at least 2, got {length}")
    if tokens is not None and tokens < length:
        raise UsageError(f"--tokens {tokens} is less than one sequence of --max-length {length}")
    if tokens is not None and tokens * _BYTES > whole_memory():
        raise UserError(
            f"--tokens {tokens:,}: packed, they take {tokens * _BYTES / 2**30:,.1f} GiB of memory, and this machine "
            f"has {whole_memory() / 2**30:,.1f} GiB; give fewer"
        )
    name, rows = _open(data, text_field, streaming=tokens is not None)
    stream = _Stream(rows, tokenizer, seed=seed, text_field=text_field, name=name, repeat=tokens is not None)
    stream.least = 1 if stream.conversations else length
    room = None if tokens is None else tokens // length
    layout = _lay_conversations if stream.conversations else _lay_text
    ids, starts, learned = layout(stream, length, room)
    facts = {
        "dataset": name.removeprefix("--dataset: "),
        "documents": stream.documents,
        "sequences": len(ids),
        "max_length": length,
        "tokens": ids.size,
        "epochs": stream.epochs(),
        "seed": seed,
    }
    keep_starts = isolate or stream.conversations
    return PackedDataset(
        torch.from_numpy(ids),
        starts=torch.from_numpy(starts) if keep_starts else None,
        learned=None if learned is None else torch.from_numpy(learned),
        facts=facts,
    )


def read_tokens(
    data: str | TextSource | Rows | Iterable[Row], tokenizer: Any, *, tokens: int, text_field: str = "text"
) -> Tensor:
    """The first `tokens` tokens (fewer if there are no more) of the documents in their own order, LongTensor
    [T].

    Documents are joined by the end token; a conversation is rendered by the chat template.

    Raises:
        UserError: see `load_rows`.
    """
    name, rows = _open(data, text_field, streaming=True)
    found: list[np.ndarray] = []
    held = 0
    for document in _encode(_in_order(rows, name), tokenizer, text_field, batch=50_000):
        found.append(document.ids)
        held += len(document.ids)
        if held >= tokens:
            break
    if not held:
        raise UserError(f"{name} is empty: its documents have no text")
    return torch.from_numpy(np.concatenate(found)[:tokens]).long()


def _open(
    data: str | TextSource | Rows | Iterable[Row], text_field: str, *, streaming: bool
) -> tuple[str, Rows | Iterable[Row]]:
    """What to call the data, and its rows."""
    if isinstance(data, (str, TextSource)):
        name = data if isinstance(data, str) else data.spec
        return f"--dataset: {name}", load_rows(data, text_field=text_field, streaming=streaming)
    return "the rows given", list(data) if isinstance(data, Iterator) else data


class _Stream:
    """Tokenised documents in a drawn order; once, or with `repeat` again and again."""

    def __init__(
        self,
        rows: Rows | Iterable[Row],
        tokenizer: Any,
        *,
        seed: int,
        text_field: str,
        name: str,
        repeat: bool,
    ) -> None:
        self.rows: Any = rows
        self.tokenizer, self.seed, self.text_field = tokenizer, seed, text_field
        self.name, self.repeat = name, repeat
        self.pad = _end_token(tokenizer)
        self.documents = 0  # of the data set, as far as they were read
        self.least = 1  # tokens below which there is nothing to repeat
        self._once: list[_Document] = []
        self._whole_epochs = 0
        self._given = 0
        first = next(iter(rows), None)
        if first is None:
            raise UserError(f"{name} is empty: it has no rows")
        self.conversations = field_of(first, text_field, name) == MESSAGES

    def __iter__(self) -> Iterator[_Document]:
        held = 0
        for document in _encode(self._shuffled(), self.tokenizer, self.text_field):
            if (document.answer is not None) != self.conversations:
                raise UserError(f"{self.name} mixes plain text and conversations (messages); give one kind at a time")
            held += len(document.ids)
            self._once.append(document)
            self._given += 1
            yield document
        if not self._once:
            raise UserError(f"{self.name} is empty: its documents have no text to learn from")
        if held < self.least:
            raise UserError(
                f"{self.name} holds {held} tokens, fewer than one sequence of {self.least}: "
                "lower --max-length, or give more text"
            )
        while True:
            self._whole_epochs += 1
            self._given = 0
            if not self.repeat:
                return
            order = np.random.default_rng((self.seed, self._whole_epochs)).permutation(len(self._once))
            for index in order:
                self._given += 1
                yield self._once[index]

    def _shuffled(self) -> Iterator[tuple[str, Row]]:
        if hasattr(self.rows, "__len__"):
            order: Iterable[int] = np.random.default_rng((self.seed, 0)).permutation(len(self.rows))
            for index in order:
                self.documents += 1
                yield f"{self.name}, row {index}", self.rows[int(index)]
            return
        rows = self.rows
        if hasattr(rows, "shuffle"):
            rows = rows.shuffle(seed=self.seed, buffer_size=_STREAM_BUFFER)
        for place, row in _in_order(rows, self.name):
            self.documents += 1
            yield place, row

    def epochs(self) -> float | None:
        if self._whole_epochs:
            return round(self._whole_epochs + self._given / len(self._once), 3)
        if hasattr(self.rows, "__len__"):
            return round(self.documents / len(self.rows), 3)
        return None


def _in_order(rows: Iterable[Row], name: str) -> Iterator[tuple[str, Row]]:
    for index, row in enumerate(rows):
        yield f"{name}, row {index}", row


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token), which joins documents; set it in its config")
    return int(tokenizer.eos_token_id)


def _encode(
    rows: Iterable[tuple[str, Row]], tokenizer: Any, text_field: str, batch: int | None = None
) -> Iterator[_Document]:
    """Tokenised documents of rows that come with what to call them; text ends with the end token."""
    end = _end_token(tokenizer)
    texts: list[tuple[str, bool]] = []
    held = 0

    def flush() -> Iterator[_Document]:
        encoded = tokenizer(
            [text for text, _ in texts], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids, (_, last) in zip(encoded, texts, strict=True):
            yield _Document(np.asarray([*ids, end] if last else ids, dtype=np.int32))
        texts.clear()

    for place, row in rows:
        field = field_of(row, text_field, place)
        if field == MESSAGES:
            conversation = render(row[field], tokenizer, place)
            if any(conversation.answer):
                yield _Document(np.asarray(conversation.ids, dtype=np.int32), np.asarray(conversation.answer))
            continue
        text = row[field]
        if text is None or not text.strip():
            continue
        for piece, last in _pieces(text):
            texts.append((piece, last))
            held += len(piece)
            if held >= (batch or _BATCH):
                yield from flush()
                held = 0
    if texts:
        yield from flush()


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """`text` in pieces that end before white space, and for each whether it is the last."""
    start = 0
    while len(text) - start > _PIECE:
        cut = max(text.rfind("\n", start + 1, start + _PIECE), text.rfind(" ", start + 1, start + _PIECE))
        cut = cut if cut > start else start + _PIECE
        yield text[start:cut], False
        start = cut
    yield text[start:], True


_Laid = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _lay_text(stream: _Stream, length: int, room: int | None) -> _Laid:
    """Documents end to end: ids [N, L], and where documents start [N, L]."""
    parts: list[np.ndarray] = []
    held = 0
    for document in stream:
        parts.append(document.ids)
        held += len(document.ids)
        if room is not None and held >= room * length:
            break
    count = held // length if room is None else room
    flat = np.concatenate(parts)[: count * length]
    starts = np.zeros(held, dtype=bool)
    starts[np.cumsum([0, *(len(part) for part in parts[:-1])])] = True
    laid = starts[: count * length].reshape(count, length)
    laid[:, 0] = True
    return flat.reshape(count, length), laid, None


def _lay_conversations(stream: _Stream, length: int, room: int | None) -> _Laid:
    """Whole conversations, padded where the next does not fit: ids, starts, learned tokens, each [N, L]."""
    ids: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    used = length
    for document in stream:
        assert document.answer is not None
        size = min(len(document.ids), length)
        if used + size > length:
            if room is not None and len(ids) == room:
                break
            ids.append(np.full(length, stream.pad, dtype=np.int32))
            starts.append(np.zeros(length, dtype=bool))
            learned.append(np.zeros(length, dtype=bool))
            used = 0
        ids[-1][used : used + size] = document.ids[:size]
        learned[-1][used : used + size] = document.answer[:size]
        starts[-1][used] = True
        used += size
        if used < length:
            starts[-1][used] = True  # the padding, unless a conversation follows
    return np.stack(ids), np.stack(starts), np.stack(learned)
