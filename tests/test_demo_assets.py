"""The teacher and the texts that ship with the package are whole, small, documented and fit for the demo."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.demo import teacher_folder, text_file

SOURCES = {"sotu", "treasury_david", "web_bible", "sqlite_docs"}


def rows(name: Literal["train", "heldout"]) -> list[dict[str, str]]:
    with gzip.open(text_file(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(teacher_folder())


def test_teacher_folder_is_whole_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in teacher_folder().iterdir()}
    needed = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert needed | {"tokenizer_config.json", "README.md", "training.json"} <= set(sizes)
    assert sum(sizes.values()) <= 16_000_000


def test_teacher_has_at_most_8m_parameters_in_bf16() -> None:
    with safe_open(teacher_folder() / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert 5_000_000 < sum(tensor.numel() for tensor in tensors) <= 8_000_000
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_card_names_licence_sources_recipe_and_figures() -> None:
    card = (teacher_folder() / "README.md").read_text()
    record = json.loads((teacher_folder() / "training.json").read_text())
    for words in ("license: apache-2.0", "public domain", "State of the Union", "Treasury of David"):
        assert words in card
    for words in (
        "World English Bible",
        "SQLite documentation",
        "twice",
        record["hardware"],
        record["command"],
    ):
        assert words in card
    assert f"{record['held_out']['perplexity']:.2f}" in card
    assert f"{record['repeated_passage']['second']:.3f}" in card


@pytest.mark.parametrize("name, characters", [("train", (1_500_000, 2_000_000)), ("heldout", (250_000, 400_000))])
def test_texts_are_balanced(name: Literal["train", "heldout"], characters: tuple[int, int]) -> None:
    count: Counter[str] = Counter()
    for row in rows(name):
        assert set(row) == {"text", "source"}
        count[row["source"]] += len(row["text"])
    assert set(count) == SOURCES
    assert characters[0] <= count.total() <= characters[1]
    assert max(count.values()) <= 1.2 * min(count.values())


def test_held_out_documents_are_not_in_the_training_sample() -> None:
    train = "\n".join(row["text"] for row in rows("train"))
    for row in rows("heldout"):
        lines = [line for line in row["text"].splitlines() if len(line) > 120]
        assert sum(line in train for line in lines) <= 0.05 * len(lines)


@pytest.mark.parametrize(
    "text",
    [
        "In the beginning,  two spaces\n\n\tand a tab. ",
        " leading , spaces ' s and n't .",
        "日本語, עברית, é as e\u0301, 👩\u200d🚀, \u00a0, \ufeff",
        "".join(map(chr, range(0x2000))),
    ],
)
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_agrees_with_the_model_config(tokenizer: Any) -> None:
    config = json.loads((teacher_folder() / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"] != config["eos_token_id"]


def test_second_copy_of_an_unseen_passage_is_a_nat_cheaper(tokenizer: Any) -> None:
    size = 256
    ids = [tokenizer(row["text"])["input_ids"] for row in rows("heldout")]
    longest = sorted((row for row in ids if len(row) > 2 * size), key=len)[-8:]
    passage = torch.tensor([row[size : 2 * size] for row in longest])
    assert passage.shape == (8, size)
    twice = passage.repeat(1, 2)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(twice).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")
    first, second = loss[:, : size - 1].mean().item(), loss[:, size - 1 :].mean().item()
    assert first < 4.5
    assert second <= first - 1.0
