"""The demo teacher's data: corpora, whole documents held out, a tokenizer, and the demo's text samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

CORPORA = {
    "sotu": "US State of the Union addresses (works of the US government)",
    "treasury_david": "C. H. Spurgeon, The Treasury of David (1869-1885)",
    "web_bible": "World English Bible",
    "sqlite_docs": "SQLite documentation (dedicated to the public domain by its authors)",
}
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096
CONTEXT = 1024

HELD_OUT_SHARE = 0.015
# SQLite's pages and some books of the Bible come more than once, whole or inside another: a document whose
# word 8-grams also stand elsewhere would not be unseen, so it stays in training.
HELD_OUT_MAX_OVERLAP = 0.05
HELD_OUT_CHARACTERS = 2_000, 60_000


@dataclass(frozen=True)
class Document:
    source: str
    text: str


def read_corpora(folder: Path) -> list[Document]:
    """Every distinct document of the four corpora, in an order that depends on the texts alone."""
    found: dict[str, Document] = {}
    for source in CORPORA:
        with gzip.open(folder / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                found[hashlib.sha256(text.encode()).hexdigest()] = Document(source, text)
    return [found[key] for key in sorted(found)]


def overlaps(documents: list[Document], n: int = 8) -> list[float]:
    """For each document, the share of its distinct word n-grams that stand in another document too."""
    words: dict[str, int] = {}
    grams = []
    for document in documents:
        ids = [words.setdefault(word, len(words) + 1) for word in re.findall(r"\w+", document.text.lower())]
        column = np.array(ids, dtype=np.uint64)
        hashed = np.zeros(max(len(ids) - n + 1, 0), dtype=np.uint64)
        for offset in range(n):
            hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + column[offset : offset + len(hashed)]
        grams.append(np.unique(hashed))
    distinct, counts = np.unique(np.concatenate(grams), return_counts=True)
    shared = distinct[counts > 1]
    return [float(np.isin(gram, shared).mean()) if len(gram) else 1.0 for gram in grams]


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out): whole documents, about HELD_OUT_SHARE of each corpus's characters held out."""
    shortest, longest = HELD_OUT_CHARACTERS
    room = dict.fromkeys(CORPORA, 0.0)
    for document in documents:
        room[document.source] += HELD_OUT_SHARE * len(document.text)
    training, held_out = [], []
    for document, overlap in zip(documents, overlaps(documents), strict=True):
        size, left = len(document.text), room[document.source]
        # A little over the share is better than a corpus whose documents are all larger than what is left.
        if overlap < HELD_OUT_MAX_OVERLAP and shortest <= size <= longest and size <= left * 1.25:
            room[document.source] -= size
            held_out.append(document)
        else:
            training.append(document)
    return training, held_out


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def sample(documents: list[Document], characters: int, longest: int) -> list[Document]:
    """About `characters` from each corpus, no document longer than `longest` (cut at white space)."""
    left = dict.fromkeys(CORPORA, characters)
    rows = []
    for document in documents:
        limit = min(longest, left[document.source])
        if limit < 500:
            continue
        text = document.text
        if len(text) > limit:
            text = text[:limit].rsplit(None, 1)[0]
        left[document.source] -= len(text)
        rows.append(Document(document.source, text))
    return rows


def write_jsonl(path: Path, rows: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No name and no time in the header: the same rows give the same bytes.
    with open(path, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        for row in rows:
            line = json.dumps({"text": row.text, "source": row.source}, ensure_ascii=False)
            packed.write(line.encode() + b"\n")


def prepare(corpora: Path, work: Path, text_out: Path) -> dict[str, Any]:
    """Make everything that training and the demo read; gives the content of data.json.

    To `work`: tokens.npy and heldout.npy (uint16, each document ended by END; the held-out ones corpus by
    corpus), the tokenizer, data.json. To `text_out`: train.jsonl.gz and heldout.jsonl.gz.
    """
    training, held_out = split(read_corpora(corpora))
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(document.text for document in training)
    tokenizer.save_pretrained(work)
    encoder = tokenizer.backend_tokenizer

    def encode(documents: list[Document]) -> np.ndarray:
        ids = [[*encoder.encode(d.text).ids, tokenizer.eos_token_id] for d in documents]
        return np.concatenate([np.array(row, dtype=np.uint16) for row in ids])

    tokens = encode(training)
    held_tokens, facts = [], {}
    for source, title in CORPORA.items():
        mine = [d for d in held_out if d.source == source]
        held_tokens.append(encode(mine))
        facts[source] = {
            "title": title,
            "training_documents": sum(d.source == source for d in training),
            "training_characters": sum(len(d.text) for d in training if d.source == source),
            "held_out_documents": len(mine),
            "held_out_bytes": sum(len(d.text.encode()) for d in mine),
            "held_out_tokens": len(held_tokens[-1]),
        }
    np.save(work / "tokens.npy", tokens)
    np.save(work / "heldout.npy", np.concatenate(held_tokens))
    data = {"training_tokens": len(tokens), "corpora": facts}
    (work / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    write_jsonl(text_out / "train.jsonl.gz", sample(training, 450_000, 24_000))
    write_jsonl(text_out / "heldout.jsonl.gz", sample(held_out, 80_000, 60_000))
    return data
