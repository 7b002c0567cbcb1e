"""Teachers in four bits: they teach as they are, and are converted as the weights that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_teacher
from test_cli import byte_tokenizer
from verbs import done, error_of, run

import linearize
from linearize.errors import UserError
from linearize.quantised import dense

# bitsandbytes' kernels for CPUs want widths of whole blocks of 64
SIZES = {"vocab_size": 300, "intermediate_size": 128}


class Opaque(torch.nn.Module):
    """A model of a kind that transformers cannot make plain."""

    quantization_method = "mystery"
    dtype = torch.float32

    def dequantize(self):
        raise NotImplementedError("no way\nback")


def test_a_plain_model_is_itself():
    teacher = tiny_teacher()
    assert dense(teacher) is teacher


def test_what_cannot_be_made_plain_is_refused_by_its_kind():
    with pytest.raises(UserError, match=r"quantised \(mystery\).*NotImplementedError: no way back.*was made of"):
        dense(Opaque())


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """The folder of a tiny Llama in four bits."""
    pytest.importorskip("bitsandbytes", reason="four bits need bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    place = tmp_path_factory.mktemp("four")
    tiny_teacher(dtype=torch.bfloat16, **SIZES).save_pretrained(place / "whole")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(place / "whole", quantization_config=options, device_map="cpu")
    model.save_pretrained(place / "four")
    byte_tokenizer().save_pretrained(place / "four")
    return place / "four"


def test_four_bits_are_converted_as_the_weights_they_stand_for(four_bits):
    from linearize.source import load_model

    teacher = load_model(four_bits)
    packed = copy.deepcopy(teacher.state_dict())
    student = linearize.convert(teacher, to="gla", keep_softmax="0,1")
    ids = torch.arange(40).view(2, 20)
    ours, theirs = student(ids).logits.float(), teacher(ids).logits.float()
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()  # their product rounds in another order
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert getattr(student.config.parent_config, "quantization_config", None) is None
    assert teacher.is_quantized and all(torch.equal(now, packed[name]) for name, now in teacher.state_dict().items())


def test_four_bits_teach_from_the_command_line(four_bits, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    done("convert", four_bits, "--to", "linear", "--window", "8", "-o", tmp_path / "student")
    training = ["--dataset", text, "--tokens", "600", "--max-length", "64", "--batch-size", "2", "--device", "cpu"]
    done("distill", tmp_path / "student", "--teacher", four_bits, *training, "-o", tmp_path / "out")
    log = (tmp_path / "out" / "loss.jsonl").read_text()
    assert '"transfer"' in log and '"logits"' in log


def test_without_bitsandbytes_it_says_what_to_install(tmp_path, monkeypatch):
    teacher = tiny_teacher(**SIZES)
    teacher.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    teacher.config.save_pretrained(tmp_path / "four")
    del teacher.config.quantization_config
    teacher.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "four" / "model.safetensors")
    byte_tokenizer().save_pretrained(tmp_path / "four")
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *args: False)
    assert "bitsandbytes" in error_of(run("convert", tmp_path / "four", "--to", "linear", "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
