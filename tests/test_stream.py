"""Surgery from file to file: the same student as in memory, from damaged files none, and after a kill the rest."""

from __future__ import annotations

import filecmp
import importlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import MIXER_NAMES
from families import teacher_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import byte_tokenizer, teacher_at
from test_source import corrupt, fails, renamed, with_header

from linearize import source, stored
from linearize.convert import convert_folder, stream
from linearize.errors import UsageError, UserError
from linearize.source import ModelSource, weights_folder

folder_module = importlib.import_module("linearize.convert.folder")
INDEX = "model.safetensors.index.json"
SMALL = "60KB"  # shards


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shards: str = SMALL) -> Path:
    teacher_of(name, dtype).save_pretrained(folder, max_shard_size=shards)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("teacher") / "llama")


@pytest.fixture
def damaged(teacher, tmp_path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "model"))


def streams(teacher: Path, out: Path, to: str = "linear", **options) -> Path:
    """Converts, and checks that no model was loaded for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "load_model", None)
        convert_folder(ModelSource(str(teacher)), to, out, **options)
    return out


def in_memory(teacher: Path, out: Path, to: str = "linear", **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "streamed", lambda *args, **kwargs: None)
        convert_folder(ModelSource(str(teacher)), to, out, **options)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_files(one: Path, other: Path) -> bool:
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(other))
    names.remove("linearize.json")
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


KINDS = [
    *(("llama", mixer, {}) for mixer in MIXER_NAMES),
    ("llama", "based", {"keep_softmax": "1"}),
    ("llama", "gla", {"keep_softmax": "0,1"}),
    ("llama", "based", {"keep_softmax": "heads:0.0,1.2,1.3", "keep_window": 8, "window": 0}),
    ("llama", "based", {"dtype": "float32", "seed": 3}),
    ("gpt2", "based", {}),  # its files leave out the prefix of its names
    ("gpt_neox", "retention", {}),  # its head has another name in files
    ("olmo2", "based", {}),  # without a norm before the attention
    ("opt+after", "mamba2", {}),
    ("gemma3_text", "based", {}),
    ("qwen3", "gated_delta", {}),
    ("bloom", "retention", {}),  # its modules add the residual themselves
    ("gemma2", "gla", {}),
    ("gpt_oss", "linear", {"keep_softmax": "0"}),
]


@pytest.mark.parametrize(("name", "mixer", "options"), KINDS)
def test_writes_the_files_of_surgery_in_memory(name, mixer, options, tmp_path):
    teacher = saved(name, tmp_path / "teacher")
    options = {"max_shard_size": "50KB", **options}
    one = streams(teacher, tmp_path / "one", mixer, **options)
    assert same_files(one, in_memory(teacher, tmp_path / "other", mixer, **options))
    assert len(list(one.glob("model-*"))) > 1
    record, other = (json.loads((tmp_path / each / "linearize.json").read_text()) for each in ("one", "other"))
    for each in (record, other):
        del each["time"], each["seconds"]
    assert record == other


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_copied_as_they_lie(name, tmp_path):
    """Loading merges them and saving takes them apart; which files they come to lie in differs."""
    teacher = saved(name, tmp_path / "teacher")
    one, other = (tensors(make(teacher, tmp_path / make.__name__)) for make in (streams, in_memory))
    assert sorted(one) == sorted(other) and any("experts.3" in name for name in one)
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def test_other_numbers_and_a_single_file(tmp_path):
    """A checkpoint of mixed types, whose config names none; tied embeddings, of which the file has both."""
    teacher = teacher_at(tmp_path / "teacher", dtype=torch.float16)
    held = load_file(teacher / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.norm.weight"] = held["model.norm.weight"].double()
    held["model.layers.0.mlp.up_proj.weight"] = held["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(held, teacher / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    for dtype in ("auto", "bf16"):
        one, other = (make(teacher, tmp_path / dtype / make.__name__, dtype=dtype) for make in (streams, in_memory))
        assert same_files(one, other) and "lm_head.weight" not in tensors(one)
        assert {tensor.dtype for name, tensor in tensors(one).items() if ".mixer." not in name} == {
            torch.bfloat16 if dtype == "bf16" else tensors(other)["model.norm.weight"].dtype
        }
    held["lm_head.weight"][0, 0] += 1
    save_file(held, teacher / "model.safetensors", metadata={"format": "pt"})
    found = fails(streams, teacher, tmp_path / "out")
    assert "ties lm_head.weight to model.embed_tokens.weight" in found and "tie_word_embeddings" in found


@pytest.mark.parametrize("make", [streams, in_memory])
def test_the_teachers_files_name_is_not_the_students(make, damaged, tmp_path):
    renamed(damaged, INDEX)
    out = make(damaged, tmp_path / "out", max_shard_size="5GB")
    assert "transformers_weights" not in (out / "config.json").read_text() and not (out / INDEX).exists()
    source.load_student(out)
    renamed(damaged, "own.safetensors")
    found = fails(make, damaged, tmp_path / "other")
    assert "transformers_weights" in found and not (tmp_path / "other").exists()


def test_reads_no_more_than_the_proof_needs(teacher, tmp_path, monkeypatch):
    read: list[str] = []
    whole = stored.Stored.read
    monkeypatch.setattr(stored.Stored, "read", lambda self, dtype=None: read.append(self.name) or whole(self, dtype))
    streams(teacher, tmp_path / "out", "based")
    attention = [name for name in read if "_proj" in name]
    assert len(attention) == len(set(attention)) == 8 and all("self_attn" in name for name in attention)
    read.clear()
    streams(saved("olmo2", tmp_path / "olmo2"), tmp_path / "other", "based")
    assert any("mlp" in name for name in read)


def test_what_needs_the_model_loads_it(damaged, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(folder_module, "streamed", lambda *args, **kwargs: asked.append(1))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} words and more of them. " * 20}) + "\n" for i in range(40)))
    teacher = teacher_at(tmp_path / "teacher")
    options = folder_module.CalibrateOptions(sequences=4, length=32, passes=1)
    convert_folder(
        ModelSource(str(teacher)), "linear", tmp_path / "a", calibrate_on=str(text), calibrate_options=options
    )
    assert not asked
    convert_folder(ModelSource(str(teacher)), "linear", tmp_path / "b")
    assert asked == [1]
    monkeypatch.undo()
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert stream.streamed(damaged, source.load_config(damaged), "linear") is None


def test_the_proof_refuses_a_layer_and_leaves_nothing(teacher, tmp_path, monkeypatch):
    def wrongly(model):
        anatomies = read(model)
        anatomies[1].rotary_dim = 0
        return anatomies

    read = stream.read_anatomy
    monkeypatch.setattr(stream, "read_anatomy", wrongly)
    found = fails(streams, teacher, tmp_path / "deep" / "out")
    assert "model.layers.1.self_attn" in found and "is not the attention" in found
    assert os.listdir(tmp_path) == []


# What is wrong with the files is said by name, before anything is written.


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def move(name: object):
    def change(folder: Path) -> None:
        edit_index(folder, lambda places: places.update({"model.norm.weight": name}))

    return change


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def link_out(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    shutil.move(shard, folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def bytes_of_norm(change):
    return lambda folder: corrupt(shard_of(folder, "model.norm.weight"), change)


def retyped(folder: Path, dtype: torch.dtype) -> None:
    shard = shard_of(folder, "model.norm.weight")
    held = load_file(shard)
    save_file(held | {"model.norm.weight": held["model.norm.weight"].to(dtype)}, shard)


def reshaped(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    held = load_file(shard)
    save_file(held | {"model.norm.weight": held["model.norm.weight"][:-1].clone()}, shard)


def taken_out(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    held = load_file(shard)
    del held["model.norm.weight"]
    save_file(held, shard)


def taken_out_everywhere(folder: Path) -> None:
    taken_out(folder)
    edit_index(folder, lambda places: places.pop("model.norm.weight"))


def nested(raw: bytes, length: int) -> bytes:
    text = b"[" * 100_000
    return struct.pack("<Q", len(text)) + text


def spans(value: object):
    return lambda raw, n: with_header(raw, n, lambda header: header["model.norm.weight"].update(data_offsets=value))


DAMAGE = {
    "above": (move("../outside.safetensors"), ["'../outside.safetensors'", "no file of its own folder"]),
    "hidden above": (move("a/../../x.safetensors"), ["'a/../../x.safetensors'"]),
    "absolute": (move("/etc/passwd"), ["'/etc/passwd'", "model.norm.weight"]),
    "of Windows": (move("C:\\x.safetensors"), ["no file of its own folder"]),
    "above, of Windows": (move("..\\x.safetensors"), ["no file of its own folder"]),
    "no name": (move(""), ["no file of its own folder"]),
    "no text": (move(5), ["not a shard index", INDEX]),
    "empty": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), ["names no tensors"]),
    "no index": (lambda folder: (folder / INDEX).write_text("[" * 100_000), ["not a shard index"]),
    "link out": (link_out, ["is a link out of its folder", "elsewhere"]),
    "absent shard": (move("model-9.safetensors"), ["shards named in", "are missing", "model-9.safetensors"]),
    "truncated": (bytes_of_norm(lambda raw, n: raw[:-1]), ["is truncated"]),
    "header cut": (bytes_of_norm(lambda raw, n: raw[: n // 2]), ["is truncated"]),
    "endless header": (bytes_of_norm(lambda raw, n: struct.pack("<Q", 1 << 60) + raw[8:]), ["length of a header"]),
    "header no JSON": (bytes_of_norm(lambda raw, n: raw[:8] + b"?" + raw[9:]), ["its header cannot be read"]),
    "header nested": (bytes_of_norm(nested), ["its header cannot be read"]),
    "three offsets": (bytes_of_norm(spans([0, 1, 2])), ["its header cannot be read"]),
    "offset below": (bytes_of_norm(spans([-128, 0])), ["its header cannot be read"]),
    "offsets no numbers": (bytes_of_norm(spans([None, "x"])), ["its header cannot be read"]),
    "not in its shard": (taken_out, ["lacks 1 tensors", "model.norm.weight"]),
    "nowhere": (taken_out_everywhere, ["the weights lack 1 tensors", "model.norm.weight"]),
    "shape": (reshaped, ["the tensor model.norm.weight has the shape [63]", "[64]"]),
    "integers": (lambda folder: retyped(folder, torch.int32), ["model.norm.weight is stored as I32"]),
    "fp8": (lambda folder: retyped(folder, torch.float8_e4m3fn), ["model.norm.weight is stored as F8_E4M3"]),
}
FILES = {"above", "hidden above", "absolute", "of Windows", "above, of Windows", "no name", "empty", "no index"}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_before_anything_is_written(name, damaged, tmp_path):
    change, parts = DAMAGE[name]
    shard = shard_of(damaged, "model.norm.weight").name
    change(damaged)
    before = sorted(os.listdir(tmp_path))
    found = fails(streams, damaged, tmp_path / "out")
    assert all(part in found for part in parts), found
    if name not in FILES | {"no text", "absent shard", "nowhere"}:
        assert shard in found
    assert sorted(os.listdir(tmp_path)) == before
    if name not in ("nowhere", "shape", "integers", "fp8"):  # those are known once the model is
        assert found == fails(source.load_model, damaged)


def test_links_that_are_none_out(damaged, tmp_path):
    """Within the folder, and the Hub's cache's own into its blobs, also from a folder that it was downloaded to."""
    shard = shard_of(damaged, "model.norm.weight")
    blobs = tmp_path / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(shard, blobs / "abc")
    snapshot = Path(shutil.move(damaged, tmp_path / "models--org--tiny" / "snapshots" / "123"))
    (snapshot / shard.name).symlink_to("../../blobs/abc")
    one = streams(snapshot, tmp_path / "one")
    (snapshot / shard.name).unlink()
    shutil.move(blobs / "abc", snapshot / "whole")
    (snapshot / shard.name).symlink_to("whole")
    assert same_files(one, streams(snapshot, tmp_path / "other"))


def test_hub_ids_are_fetched_file_by_file(teacher, damaged, monkeypatch):
    """The index is looked at before what it names is asked for."""
    asked: list[tuple[str, str | None]] = []

    def fetch(repo, name, revision=None, **kwargs):
        asked.append((name, revision))
        return str(teacher / name) if (teacher / name).exists() else None

    monkeypatch.setattr(source, "cached_file", fetch)
    assert weights_folder(ModelSource("org/tiny", revision="v1")) == teacher
    shards = sorted(path.name for path in teacher.glob("model-*.safetensors"))
    assert asked[:2] == [("model.safetensors", "v1"), (INDEX, "v1")]
    assert sorted(asked[2:]) == [(shard, teacher.name) for shard in shards]  # all of one commit
    move("../../secret")(damaged)
    teacher = damaged
    asked.clear()
    assert "'../../secret'" in fails(weights_folder, "org/tiny") and len(asked) == 2
    teacher = damaged.parent
    assert weights_folder("org/tiny") is None


# After a kill.


def interrupt_after(count: int, monkeypatch) -> list[str]:
    """Ctrl-C once `count` weight files are copied; gives the files that are begun."""
    begun: list[str] = []
    copy = stream.ShardFile.copy

    def counted(self, folder, work, stopping):
        if len(begun) == count:
            (work / f"{self.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        begun.append(self.name)
        copy(self, folder, work, stopping)

    monkeypatch.setattr(stream.ShardFile, "copy", counted)
    return begun


def test_goes_on_after_a_kill(teacher, tmp_path, monkeypatch):
    options = {"to": "based", "max_shard_size": "50KB"}
    whole = streams(teacher, tmp_path / "whole", **options)
    out = tmp_path / "deep" / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        streams(teacher, out, **options)
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.unfinished-") and not out.exists()
    copied = {path: path.stat().st_mtime_ns for path in (left / ".work").glob("*.copied")}
    assert len(copied) == 2
    made: list[str] = []
    write = stream.started_mixer
    monkeypatch.setattr(stream, "started_mixer", lambda *args: made.append("layer") or write(*args))
    copying: list[str] = []
    to = stored.Stored.copy_to
    monkeypatch.setattr(
        stored.Stored, "copy_to", lambda self, *args: copying.append(self.path.parent.name) or to(self, *args)
    )
    streams(teacher, out, **options)
    assert same_files(out, whole) and os.listdir(out.parent) == ["out"]
    held = sum(".mixer." not in name for path in copied for name in header_of(whole / path.stem))
    assert copying.count(teacher.name) == sum(".mixer." not in name for name in tensors(whole)) - held
    assert made == []  # the layers were proven before


def header_of(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_another_conversion_does_not_go_on_with_it(teacher, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch)
        streams(teacher, tmp_path / "out", "based", max_shard_size="50KB")
    for options in ({"seed": 1}, {"max_shard_size": "40KB"}, {"dtype": "fp32"}, {"window": 8}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            begun = interrupt_after(1, patch)
            streams(teacher, tmp_path / "out", "based", **{"max_shard_size": "50KB", **options})
        assert len(begun) == 1
        assert len(os.listdir(tmp_path)) == 1  # what was left of the others is gone
    assert same_files(streams(teacher, tmp_path / "out"), in_memory(teacher, tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_overwrite(teacher, tmp_path):
    streams(teacher, tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        streams(teacher, tmp_path / "out", "gla")
    streams(teacher, tmp_path / "out", "gla", overwrite=True)
    assert json.loads((tmp_path / "out" / "linearize.json").read_text())["mixer"] == "gla"
    assert os.listdir(tmp_path) == ["out"]


# Tensors where they lie.


def test_a_stored_tensor(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    held = {
        "wide": torch.randn(300, 7, generator=generator),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 11, generator=generator).bfloat16(),
        "nothing": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "é": torch.tensor([True, False]),
    }
    save_file(held, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = stored.tensors_of(tmp_path / "x.safetensors")
    assert sorted(found) == sorted(held)
    monkeypatch.setattr(stored, "PIECE", 64)

    def no_system_call(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    for system in (True, False):
        if not system:
            monkeypatch.setattr(os, "copy_file_range", no_system_call, raising=False)
        for name, tensor in held.items():
            assert torch.equal(found[name].read(), tensor) and torch.equal(found[name].mapped(), tensor)
            for dtype in {tensor.dtype, torch.float16}:
                with (tmp_path / "copy").open("wb", buffering=0) as out:
                    found[name].copy_to(out, dtype)
                raw = bytes(stored.bytes_of(tensor.to(dtype).contiguous())) if tensor.numel() else b""
                assert (tmp_path / "copy").read_bytes() == raw, (name, dtype, system)
        with (tmp_path / "y.safetensors").open("wb", buffering=0) as out:
            names = stored.laid_out(held)
            out.write(stored.header(held, names))
            for name in names:
                found[name].copy_to(out, held[name].dtype)
        assert filecmp.cmp(tmp_path / "x.safetensors", tmp_path / "y.safetensors", shallow=False)


def test_a_file_that_shrinks_meanwhile(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    found = stored.tensors_of(tmp_path / "x.safetensors")["x"]
    os.truncate(tmp_path / "x.safetensors", 2000)
    with (tmp_path / "out").open("wb", buffering=0) as out:
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(UserError, match="ended inside tensor x"):
                found.copy_to(out, dtype)
    with pytest.raises(UserError, match="ended inside tensor x"):
        found.read()
