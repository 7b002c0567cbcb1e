"""From DATASET to packed sequences: nothing lost, nothing learned that should not be, and clear refusals."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linearize import data, rows
from linearize.data import TextSource, load_rows, pack, read_tokens
from linearize.errors import UsageError, UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.!?:"
END = "<end>"
CHATML = (
    "{% if messages[0].role != 'system' %}<sys>be brief<end>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def letters(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character, and `<...>` tags as single tokens; `<end>` ends."""
    tags = [END, "<sys>", "<system>", "<user>", "<assistant>", "<think>"]
    vocabulary = {token: index for index, token in enumerate([*tags, *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, unk_token="?")
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text: str) -> list[int]:
    return letters()(text, add_special_tokens=False)["input_ids"]


def text_of(ids) -> str:
    return letters().decode(ids)


def write_lines(path: Path, lines: list) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# DATASET


def test_specs(tmp_path):
    assert TextSource.parse("org/name:en:train[:1%]") == TextSource(
        "org/name:en:train[:1%]", name="org/name", config="en", split="train[:1%]"
    )
    assert TextSource.parse("name").config is None
    assert TextSource.parse("name::test").split == "test"
    one, two = (write_lines(tmp_path / name, [{"text": "a"}]) for name in ("a.jsonl", "b.jsonl.gz"))
    assert TextSource.parse(f"{one},{two}").files == (one, two)
    assert [part.files for part in TextSource.parse(f"{one},{two}").each()] == [(one,), (two,)]


@pytest.mark.parametrize("spec", ["gone.jsonl", "./gone", "{tmp}/gone.parquet", "{tmp}", "{tmp}/odd.csv", " , "])
def test_files_that_cannot_be(tmp_path, spec):
    (tmp_path / "odd.csv").write_text("text")
    with pytest.raises(UserError, match="--dataset"):
        load_rows(spec.format(tmp=tmp_path))


def test_every_kind_of_file(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "one", "id": 1}, "", {"text": "two"}])
    zipped = write_lines(tmp_path / "b.jsonl.gz", [{"text": "thr\u00e9e"}])
    plain = tmp_path / "c.txt"
    plain.write_text("four\n\nfive\n", encoding="utf-8")
    found = load_rows(f"{lines},{zipped},{plain}")
    assert [row["text"] for row in found] == ["one", "two", "thr\u00e9e", "four\n\nfive\n"]
    assert found[2] == {"text": "thr\u00e9e"} and len(found) == 4


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"body": ["one", "two", None], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = load_rows(str(tmp_path / "a.parquet"), text_field="body")
    assert list(found) == [{"body": "one"}, {"body": "two"}, {"body": None}]
    with pytest.raises(UserError, match="body, n"):
        load_rows(str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet"):
        load_rows(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["", " "], "is empty"),
        (
            [{"text": "a"}, {"body": "b", "n": 1}],
            r"x\.jsonl:2 has no field 'text'; it has: body, n;.*--text-field",
        ),
        ([{"text": "a"}, "", '{"text": "b'], r"x\.jsonl:3: not a JSON object"),
        ([["a"]], r"x\.jsonl:1: a JSON object is needed on each line, not list"),
        ([{"text": 7}], r"x\.jsonl:1: the field 'text' is int, not text"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_rows(str(write_lines(tmp_path / "x.jsonl", lines)))


def test_damaged_files(tmp_path):
    whole = write_lines(tmp_path / "x.jsonl.gz", [{"text": "a" * 500}] * 9).read_bytes()
    for raw in (whole[:-12], b"no gzip"):
        (tmp_path / "x.jsonl.gz").write_bytes(raw)
        with pytest.raises(UserError, match=r"x\.jsonl\.gz is truncated or no gzip"):
            load_rows(str(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="UTF-8"):
        load_rows(str(tmp_path / "x.txt"))


def test_hub_data_sets(monkeypatch):
    asked = []

    class Module:
        @staticmethod
        def load_dataset(name, config, split, revision, streaming):
            asked.append((name, config, split, revision, streaming))
            if name == "gone":
                raise FileNotFoundError("no such data set\nlong story")
            return [{"text": "ab"}] if name != "void" else []

    monkeypatch.setitem(sys.modules, "datasets", Module)
    assert list(load_rows("org/x:en:test")) == [{"text": "ab"}]
    pack("org/x", letters(), length=2, tokens=4)
    assert list(load_rows("org/x@v1.0::test")) == [{"text": "ab"}]
    assert asked[:2] == [("org/x", "en", "test", None, False), ("org/x", None, "train", None, True)]
    assert asked[2:] == [("org/x", None, "test", "v1.0", False)]
    with pytest.raises(UserError, match="no such data set"):
        load_rows("gone")
    with pytest.raises(UserError, match="empty"):
        load_rows("void")
    with pytest.raises(UserError, match="it has: text"):
        load_rows("org/x", text_field="body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_rows("org/x")


# Packing text


def test_text_is_joined_by_the_end_token_and_cut():
    packed = pack([{"text": "abc"}] * 3, letters(), length=5)
    assert [text_of(item["input_ids"]) for item in packed] == [
        "abc<end>a",
        "bc<end>ab",
    ]  # the rest is dropped
    assert all(torch.equal(item["input_ids"], item["labels"]) for item in packed)
    assert packed[0]["input_ids"].dtype == torch.int64 and set(packed[0]) == {"input_ids", "labels"}
    assert (packed.length, packed.tokens, packed.epochs, len(packed)) == (5, 10, 1.0, 2)


def texts(count: int) -> list[dict]:
    return [{"text": f"{i:03d}"} for i in range(count)]


def documents(packed) -> list[str]:
    joined = "".join(text_of(item["input_ids"]) for item in packed)
    return joined.removesuffix(END).split(END)


def test_order_depends_on_the_seed_alone():
    one, again, other = (pack(texts(64), letters(), length=4, seed=seed) for seed in (1, 1, 2))
    assert documents(one) == documents(again) != documents(other)
    assert sorted(documents(one)) == sorted(documents(other)) == [f"{i:03d}" for i in range(64)]
    assert documents(one) != sorted(documents(one))


def test_tokens_cap_the_total_and_repeat_reshuffled():
    packed = pack(texts(8), letters(), length=4, tokens=50)
    assert packed.tokens == 48 and packed.epochs == 1.5
    found = documents(packed)
    assert sorted(found[:8]) == [f"{i:03d}" for i in range(8)]
    assert set(found[8:]) < set(found[:8]) and found[8:] != found[:4]
    assert packed.facts()["tokens"] == 48 and json.dumps(packed.facts())


def test_only_what_is_needed_is_tokenised(monkeypatch):
    class Counting(PreTrainedTokenizerFast):
        seen = 0

        def __call__(self, text, **kwargs):
            Counting.seen += sum(map(len, text))
            return super().__call__(text, **kwargs)

    tokenizer = Counting(tokenizer_object=letters().backend_tokenizer, eos_token=END)
    monkeypatch.setattr(data, "_BATCH", 100)
    packed = pack([{"text": "a" * 50}] * 1000, tokenizer, length=10, tokens=500)
    assert packed.tokens == 500 and Counting.seen == 500 and packed.epochs == 0.01
    monkeypatch.setattr(data, "_PIECE", 100)
    Counting.seen = 0
    assert len(read_tokens([{"text": "ab cd " * 50_000}], tokenizer, tokens=200)) == 200
    assert Counting.seen < 51_000


def test_long_documents_are_cut_without_a_trace(monkeypatch):
    text = "".join(f"word{i} or\n" for i in range(50)) + "x" * 100
    whole = read_tokens([{"text": text}], letters(), tokens=10_000)
    monkeypatch.setattr(data, "_PIECE", 37)
    pieces = read_tokens([{"text": text}], letters(), tokens=10_000)
    assert torch.equal(whole, pieces) and text_of(whole) == text + END


def test_isolated_documents_restart_positions():
    rows_ = [{"text": "abcdefg"}, {"text": "hi"}]
    items = list(pack(rows_, letters(), length=5, isolate=True))
    joined = [int(token) for item in items for token in item["input_ids"]]
    positions = [int(position) for item in items for position in item["position_ids"]]
    labels = [int(label) for item in items for label in item["labels"]]
    assert len(positions) == 10
    for i in range(10):
        new = i % 5 == 0 or joined[i - 1] == letters().eos_token_id
        assert positions[i] == (0 if new else positions[i - 1] + 1)
        assert labels[i] == (-100 if new else joined[i])  # what begins a document cannot be told from another
    assert items[0]["position_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "options", "kind", "message"),
    [
        ("abc", {"length": 5}, UserError, r"holds 4 tokens.*one sequence of 5: lower --max-length"),
        ("abc", {"length": 5, "tokens": 10}, UserError, r"holds 4 tokens"),
        ("abc", {"length": 3, "tokens": 2}, UsageError, r"--tokens 2"),
        ("abc", {"length": 1}, UsageError, r"--max-length"),
        ("  ", {"length": 3}, UserError, r"is empty"),
    ],
)
def test_too_little(text, options, kind, message):
    with pytest.raises(kind, match=message):
        pack([{"text": text}], letters(), **options)


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = letters()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        pack([{"text": "abc"}], tokenizer, length=2)


def test_memory_is_the_containers(tmp_path, monkeypatch):
    from linearize import memory

    assert 0 < memory.free_memory() <= memory.whole_memory() < float("inf")
    (tmp_path / "facts").write_text("MemTotal: 99 kB\nMemAvailable:       2048 kB\n")
    monkeypatch.setattr(memory, "_FACTS", tmp_path / "facts")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.free_memory() == 2048 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() == 2048 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    assert memory.free_memory() == 700000 and memory.whole_memory() == 1000000
    (tmp_path / "facts").unlink()
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory.current").unlink()
    assert memory.free_memory() == memory.whole_memory() / 2


def test_more_tokens_than_memory_holds_are_refused_at_once():
    with pytest.raises(UserError, match=r"--tokens 100,000,000,000,000: packed, they take 465,661.3 GiB"):
        pack(texts(8), letters(), length=4, tokens=10**14)


def test_first_tokens_in_the_files_own_order():
    assert text_of(read_tokens(texts(9), letters(), tokens=11)) == "000<end>001<end>002"
    assert len(read_tokens(texts(2), letters(), tokens=100)) == 8
    with pytest.raises(UserError, match="empty"):
        read_tokens([{"text": None}], letters(), tokens=3)


# Conversations


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def learned(item) -> str:
    """The labels as text, with a bar for each run of tokens that are not learned."""
    text, skipping = "", False
    for label in item["labels"].tolist():
        if label == -100:
            text += "" if skipping else "|"
        else:
            text += text_of([label])
        skipping = label == -100
    return text


def test_only_answers_are_learned():
    packed = pack([chat("hi", "yes you", "and\nyes", "\n no")], letters(CHATML), length=64)
    assert len(packed) == 1
    whole = (
        "<sys>be brief<end>\n<user>\nhi<end>\n<assistant>\nyes you<end>\n"
        "<user>\nand\nyes<end>\n<assistant>\n\n no<end>\n"
    )
    ids = packed[0]["input_ids"].tolist()
    assert text_of(ids[: len(ids_of(whole))]) == whole
    assert learned(packed[0]) == "|yes you<end>|\n no<end>|"


def test_a_template_that_marks_answers_is_believed():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<end>"
        "{% endfor %}"
    )
    packed = pack([chat("hi", "yes", "a", "b")], letters(template), length=32)
    assert learned(packed[0]) == "|yes|b|"


def test_a_template_that_renders_the_last_turn_otherwise():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    packed = pack([chat("hi", "yes", "a", "b")], letters(template), length=32)
    assert learned(packed[0]) == "|yes<end>|<think>b<end>|"


def test_conversations_stay_whole_and_apart():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    talk = chat("a", "bcd")  # 8 tokens
    packed = pack([talk] * 3, letters(template), length=18)
    assert len(packed) == 2 and packed.epochs == 1.0
    first, second = packed
    assert first["position_ids"].tolist() == [*range(8), *range(8), 0, 1]
    assert second["position_ids"].tolist() == [*range(8), *range(10)]
    assert learned(first) == "|bcd<end>|bcd<end>|" and learned(second) == "|bcd<end>|"
    assert text_of(second["input_ids"]) == "<user>a<end><assistant>bcd<end>" + END * 10
    long = pack([chat("a", "b" * 50)], letters(template), length=10)
    assert len(long) == 1 and learned(long[0]) == "|" + "b" * 6
    capped = pack([talk] * 3, letters(template), length=18, tokens=18 * 5)
    assert len(capped) == 5 and all(learned(item).count("bcd") == 2 for item in capped)


def test_conversations_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        pack([chat("a", "b")], letters(), length=8)
    with pytest.raises(UserError, match="role and content"):
        pack([{"messages": [{"from": "a"}]}], letters(CHATML), length=8)
    with pytest.raises(UserError, match="no text to learn"):
        pack([chat("only a question")], letters(CHATML), length=8)
    with pytest.raises(UserError, match="mixes"):
        pack([chat("a", "b"), {"text": "c"}], letters(CHATML), length=8)
    with pytest.raises(UserError, match="cannot render"):
        pack([chat("a", "b")], letters("{{ raise_exception('never') }}"), length=8)
    with pytest.raises(UserError, match="changes answer 1"):
        pack([chat("a", "b")], letters("nothing of it"), length=8)


def test_a_text_field_beats_messages():
    row = {**chat("a", "b"), "body": "xyz"}
    assert rows.field_of(row, "text", "x") == "messages"
    assert text_of(read_tokens([row], letters(), tokens=9, text_field="body")) == "xyz" + END
