"""LoRA fine-tuning: what trains, merging, and adapters that load back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from conftest import relative_error, tiny_teacher
from distilling import LENGTH, rows, stop_at, weights
from packaging.version import Version
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import linearize  # noqa: F401  (registers the classes)
from linearize.convert import convert
from linearize.distill import FinetuneOptions, finetune
from linearize.distill.lora import lora_targets
from linearize.errors import UsageError, UserError
from linearize.modeling import LinearizeForCausalLM

IDS = rows(2, seed=9)
BATCH = torch.stack([row["input_ids"] for row in IDS])


def options(**kwargs) -> FinetuneOptions:
    fields = {
        "batch_size": 4,
        "max_length": LENGTH,
        "tokens": 4 * LENGTH * 8,
        "log_steps": 2,
        "device": "cpu",
    }
    return FinetuneOptions(**{**fields, "chunk": 32, "lora_rank": 2, "learning_rate": 5e-3, **kwargs})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted student on disk: three layers, the middle one left softmax."""
    path = tmp_path_factory.mktemp("student") / "student"
    convert(tiny_teacher(num_hidden_layers=3), "linear", keep_softmax=[1], window=8, sinks=1).save_pretrained(path)
    return path


@pytest.fixture
def student(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(BATCH, use_cache=False).logits


def test_targets_are_full_names(student) -> None:
    swapped = lora_targets(student, "swapped")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert swapped == [f"model.layers.{layer}.self_attn.{p}" for layer in (0, 2) for p in projections]
    assert sorted(lora_targets(student, "attention")) == sorted(
        f"model.layers.{layer}.self_attn.{p}" for layer in range(3) for p in projections
    )
    linear = lora_targets(student, "linear")
    assert len(linear) == 3 * 7 and not any("mixer" in name or "lm_head" in name for name in linear)
    with pytest.raises(UserError, match="--lora-on"):
        whole = convert(tiny_teacher(), "linear", keep_softmax=[1])
        whole.set_submodule("model.layers.0.self_attn", torch.nn.Identity())
        lora_targets(whole, "swapped")


def test_lora_and_mixers_train_and_nothing_else(student) -> None:
    before = weights(student)
    model = finetune(student, rows(), finetune=options(tokens=4 * LENGTH * 30))
    log = student.distillation[0].log
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[0]["stage"] == "finetune"
    assert isinstance(model, PeftModel)
    after = weights(model)
    same = {name: name.replace("base_model.model.", "").replace(".base_layer", "") for name in after}
    same = {name: plain.replace(".original_module", "") for name, plain in same.items()}
    for name, plain in same.items():
        if "lora_" not in name and "modules_to_save" not in name:
            assert torch.equal(after[name], before[plain]), name
    moved = {
        name for name in after
        if "modules_to_save.default" in name
        and not torch.equal(after[name], before[same[name].replace(".modules_to_save.default", "")])
    }  # fmt: skip
    assert {name.split(".layers.")[1][0] for name in moved} == {"0", "2"}
    assert any(after[name].abs().max() > 0 for name in after if "lora_B" in name)


def test_merged_is_the_unmerged_model(student) -> None:
    plain = copy.deepcopy(student)
    model = finetune(plain, rows(), finetune=options())
    merged = finetune(student, rows(), finetune=options(merge=True))
    assert merged is student and type(merged) is LinearizeForCausalLM
    assert relative_error(logits(merged), logits(model)) < 1e-5
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("train_mixers", [True, False])
def test_an_adapter_loads_back_with_the_same_logits(folder, student, train_mixers, tmp_path) -> None:
    out = tmp_path / "adapter"
    start = logits(student)
    model = finetune(student, rows(), output=out, finetune=options(train_mixers=train_mixers))
    expected = logits(model)
    assert (expected - start).abs().max() > 1e-3
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    new = {f"base_model.model.{name}" for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    saved = {name for name in names if "lora_" not in name}
    assert saved == ({name for name in new if ".mixer." in name} if train_mixers else set())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert json.loads((out / "linearize.json").read_text())["stage"] == "finetune"

    # transformers itself reads modules_to_save from an adapter in newer versions only
    knows = Version(transformers.__version__) >= Version("5.23") or "load_adapter" in vars(LinearizeForCausalLM)
    if knows or not train_mixers:
        by_auto = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(by_auto), expected, rtol=1e-5, atol=1e-5)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out)
    torch.testing.assert_close(logits(by_peft), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_output_is_a_plain_converted_folder(student, tmp_path) -> None:
    out = tmp_path / "merged"
    model = finetune(student, rows(), output=out, finetune=options(merge=True))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is LinearizeForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    assert not (out / "adapter_config.json").exists() and (out / "loss.jsonl").is_file()


def test_finetuning_generates_after(student) -> None:
    model = finetune(student, rows(), finetune=options(tokens=4 * LENGTH))
    assert model.generate(input_ids=BATCH, max_new_tokens=3, do_sample=False).shape == (2, LENGTH + 3)


def test_loss_is_on_the_labels_alone(student) -> None:
    """Scored tokens of all batches of a step weigh the same."""
    data = rows(4, ignored=True)
    with torch.no_grad():
        sums = [student(row["input_ids"][None]).logits[0, :-1].log_softmax(-1) for row in data]
    labels = [row["labels"][1:] for row in data]
    picked = torch.cat([
        log[target != -100].gather(1, target[target != -100, None]).flatten()
        for log, target in zip(sums, labels, strict=True)
    ])  # fmt: skip
    finetune(student, data, finetune=options(batch_size=2, gradient_accumulation=2, tokens=4 * LENGTH))
    assert student.distillation[0].log[0]["loss"] == pytest.approx(-picked.mean().item(), rel=1e-4)


def test_resume_bit_for_bit(folder, tmp_path, monkeypatch) -> None:
    def start():
        return AutoModelForCausalLM.from_pretrained(folder)

    chosen = options(merge=True, save_steps=3, lora_dropout=0.2)
    straight = finetune(start(), rows(20), finetune=chosen)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        finetune(start(), rows(20), output=out, finetune=chosen)
    resumed = finetune(start(), rows(20), output=out, resume=True, finetune=chosen)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_run_that_fails_leaves_the_student_as_it_was(student, monkeypatch) -> None:
    before = weights(student)
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        finetune(student, rows(), finetune=options())
    after = weights(student)
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in student.parameters())


def test_an_adapter_needs_its_base_in_a_folder(tmp_path) -> None:
    homeless = convert(tiny_teacher(), "linear", window=8, sinks=1)
    with pytest.raises(UserError, match="--merge"):
        finetune(homeless, rows(), output=tmp_path / "out", finetune=options())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="lora_rank"):
        finetune(homeless, rows(), rank=4)
    adapted = finetune(homeless, rows(), finetune=options(tokens=4 * LENGTH))
    with pytest.raises(UserError, match="merge"):
        finetune(adapted.get_base_model(), rows(), finetune=options())
