"""MODEL: what is loaded, and what is said of what cannot be."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_teacher
from transformers import AutoModelForCausalLM, T5Config

from linearize import gguf_model, load_errors, source
from linearize.errors import UsageError, UserError
from linearize.source import ModelSource, load_config, load_model, load_student, load_tokenizer

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny_teacher().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def fails(function, *args, kind=UserError, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_hub_id_brings_its_revision(tmp_path, monkeypatch):
    found = ModelSource("org/x-1.5@refs/pr/3")
    assert (found.model, found.revision, found.label) == ("org/x-1.5", "refs/pr/3", "org/x-1.5@refs/pr/3")
    assert found == ModelSource("org/x-1.5", revision="refs/pr/3") == ModelSource("org/x-1.5@refs/pr/3", "refs/pr/3")
    assert ModelSource("gpt2@main").describe() == {"model": "gpt2", "revision": "main"}
    assert "leave one of them out" in fails(ModelSource, "org/x@v1", revision="v2", kind=UsageError)
    for plain in ("org/x", "./a@b", "/a/b@c", "a@", "@a", "a@b@c"):
        assert ModelSource(plain).model == plain and ModelSource(plain).revision is None
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/x@v1").mkdir()  # a folder of that name is what is meant
    assert ModelSource("org/x@v1").model == "org/x@v1" and ModelSource("org/x@v1", "v2").label == "org/x@v1"


def test_loads_what_was_saved(saved):
    model = load_model(saved)
    assert not model.training and model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IDS).logits, tiny_teacher()(IDS).logits)
    assert load_model(saved, dtype="bf16").dtype == torch.bfloat16


def test_config_needs_no_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert load_config(folder).hidden_size == 64
    alone = shutil.copy(folder / "config.json", tmp_path / "shape-of-8b.json")
    assert load_config(alone).hidden_size == 64
    assert "config alone" in fails(load_model, alone)
    assert "no weights" in fails(load_model, folder)


def test_what_is_not_a_model(tmp_path):
    assert "no config.json" in fails(load_config, tmp_path)
    (tmp_path / "notes.md").write_text("")
    assert "is not a model" in fails(load_model, tmp_path / "notes.md")
    assert "no such file or folder" in fails(load_config, "./nowhere")
    assert "no such file or folder" in fails(load_config, "a/b/c")
    (tmp_path / "x.gguf").write_text("")
    assert "--gguf-file x.gguf" in fails(load_config, tmp_path)
    assert "it has x.gguf" in fails(load_config, ModelSource(str(tmp_path), gguf_file="y.gguf"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": ', "failed"),
        ("{}", "no model_type"),
        ('{"model_type": "martian"}', "does not know its model type"),
        ('{"model_type": "martian", "auto_map": {"AutoConfig": "a.B"}}', "--trust-remote-code"),
    ],
)
def test_broken_configs(folder, config, message):
    (folder / "config.json").write_text(config)
    found = fails(load_config, folder)
    assert message in found and str(folder) in found


def test_encoder_decoder_is_refused(folder):
    T5Config().save_pretrained(folder)
    assert "no causal language model" in fails(load_model, folder)


def corrupt(path: Path, change) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(change(raw, length))


def with_header(raw: bytes, length: int, edit) -> bytes:
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def shrink(header: dict) -> None:
    header["model.norm.weight"]["shape"] = [63]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw, n: raw[:-100], "truncated"),
        (lambda raw, n: raw[: 8 + n // 2], "truncated"),
        (lambda raw, n: raw[:5], "corrupt"),
        (lambda raw, n: b"", "corrupt"),
        (lambda raw, n: raw + b"\0", "corrupt"),
        (lambda raw, n: struct.pack("<Q", 1 << 40) + raw[8:], "corrupt"),
        (lambda raw, n: raw[:8] + b"[" + raw[9:], "corrupt"),
        (lambda raw, n: with_header(raw, n, shrink), "at tensor model.norm.weight"),
    ],
)
def test_damaged_safetensors(folder, change, message):
    corrupt(folder / "model.safetensors", change)
    found = fails(load_model, folder)
    assert message in found and "model.safetensors" in found


def test_shards(folder):
    model = tiny_teacher()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(load_model(folder)(IDS).logits, model(IDS).logits)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    assert shards[1].name in fails(load_model, folder)
    shards[1].write_bytes(shards[0].read_bytes())
    assert "lacks" in fails(load_model, folder)
    shards[1].unlink()
    assert shards[1].name in fails(load_model, folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "download is not whole" in fails(load_model, folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickles" in fails(load_model, folder)


def renamed(folder: Path, name: object, inside: str | None = None) -> None:
    """Has config.json name the weights' file."""
    config = json.loads((folder / "config.json").read_text())
    (config if inside is None else config[inside])["transformers_weights"] = name
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_of_another_name_are_refused(folder, tmp_path):
    """transformers would load that file; the ones whose headers are looked at would be others."""
    renamed(folder, "model.safetensors")
    assert load_model(folder).dtype == torch.float32
    for name in ("own.safetensors", "../own.safetensors", 5):
        renamed(folder, name)
        found = fails(load_model, folder)
        assert "transformers_weights" in found and repr(str(name)) in found and "take that key out" in found
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    assert "transformers_weights" in fails(load_model, folder)
    student = tmp_path / "student"  # as conversions once wrote it
    pytest.importorskip("linearize.convert").convert(tiny_teacher(), "linear").save_pretrained(student)
    renamed(student, "own.safetensors", inside="parent_config")
    assert "transformers_weights" in fails(load_student, student)


def test_missing_tensors_are_no_surprise_start(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "lack 9 tensors" in fails(load_model, folder)


def test_student_must_be_converted(saved):
    found = fails(load_student, saved)
    assert "model_type is llama" in found and "linearize convert" in found


def test_students_own_code_is_not_run(tmp_path):
    convert = pytest.importorskip("linearize.convert").convert
    student = convert(tiny_teacher(), "linear")
    student.save_pretrained(tmp_path / "student")
    for file in (tmp_path / "student").glob("*.py"):
        file.write_text("raise SystemExit('ran')")
    loaded = load_student(ModelSource(str(tmp_path / "student"), trust_remote_code=True))
    assert type(loaded) is type(student)
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)


def test_flags(saved):
    assert "--dtype" in fails(load_model, saved, dtype="int3", kind=UsageError)
    assert "--device" in fails(load_model, saved, device="toaster", kind=UsageError)
    if not torch.cuda.is_available():
        assert "--device cpu" in fails(load_model, saved, device="cuda")
    assert "no tokenizer" in fails(load_tokenizer, saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "no model of this name on the Hub"),
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "--revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
    ],
)
def test_the_hubs_errors(monkeypatch, name, message):
    cause = type(name, (Exception,), {})("long\nstory")

    def absent(*args, **kwargs):
        raise OSError("many\nlines") from cause

    monkeypatch.setattr(source.AutoConfig, "from_pretrained", absent)
    found = fails(load_config, ModelSource("some/model", revision="main"))
    assert message in found and "some/model" in found


def test_a_full_disk_while_downloading(monkeypatch):
    with pytest.raises(UserError, match="disk is full"), load_errors.said_clearly("loading", "m"):
        raise OSError(28, "No space left on device")


# GGUF: a tiny Llama file, written by the gguf package.


def write_gguf(path: Path) -> torch.nn.Module:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(head_dim=16, rope_theta=10000.0)).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    words = ["<unk>", "<s>", "</s>", "w", *(str(i) for i in range(10)), *(f"w{i}" for i in range(114))]
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 125)
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight":
            continue
        for heads, kind in ((4, "q_proj"), (2, "k_proj")):
            if kind in name:  # llama.cpp interleaves the two halves of a head for its rotation
                array = array.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(tensor.shape)
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        name = name.replace("model.layers.", "blk.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_gguf_gives_a_plain_model(gguf_file, tmp_path):
    path, model = gguf_file
    config = load_config(path)
    assert (config.model_type, config.num_hidden_layers, config.architectures) == (
        "llama",
        2,
        ["LlamaForCausalLM"],
    )
    for src in (path, ModelSource(str(path.parent), gguf_file=path.name)):
        loaded = load_model(src)
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, loaded(IDS).logits)
    loaded.config.vocab_size = 1  # the cached config is nobody's own
    assert load_config(path).vocab_size == 128
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gguf_tokenizer_has_the_files_special_tokens(gguf_file):
    tokenizer = load_tokenizer(gguf_file[0])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-4], "truncated"),
        (lambda raw: raw[:600], "truncated"),
        (lambda raw: raw[:10], "corrupt"),
        (lambda raw: b"GGML" + raw[4:], "not a GGUF file"),
        (lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:], "version 9"),
        (lambda raw: raw[:32] + b"\xff" * 8 + raw[40:], "corrupt"),
        (lambda raw: raw.replace(b"llama", b"alien"), "not supported"),
    ],
)
def test_damaged_gguf(gguf_file, tmp_path, change, message):
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(gguf_file[0].read_bytes()))
    for load in (load_config, load_model):
        found = fails(load, path)
        assert message in found and "broken.gguf" in found


def test_gguf_without_its_package(gguf_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    gguf_model._cached_gguf_config.cache_clear()
    assert "linearize[gguf]" in fails(load_config, gguf_file[0])
