"""PEFT on converted models: which layers get LoRA, and adapters and merged models that give the same logits again."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake
from families import CONVERTED, UNLISTED, teacher_of
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from linearize.convert import convert
from linearize.distill.lora import attach_lora, lora_targets, merged, unloaded
from linearize.errors import UserError
from linearize.modeling import LinearizeForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),  # has another name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
pytestmark = pytest.mark.usefixtures("any_peft")
NAMES = [*CONVERTED, *UNLISTED]
KEEP = "heads:0.1,1.2"
FUSED = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "falcon": "query_key_value", "phi3": "qkv_proj"}


def tokens(batch=2, length=20, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


IDS = tokens()


def mixer_of(name):
    """Each mixer on some families, and each family on one."""
    return MIXER_NAMES[NAMES.index(name) % len(MIXER_NAMES)]


def student_of(name, mixer=None, dtype=torch.float32, keep=KEEP):
    return shake(convert(teacher_of(name, dtype), mixer or mixer_of(name), window=8, keep_softmax=keep))


def trained(model):
    """`model` with all that an adapter trains moved off its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model.eval()


def adapted(model):
    """Names, in the student, of the layers that got LoRA."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


# Every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_our_adapters_load_back_and_merge(name, tmp_path):
    """LoRA on every linear layer and whole mixers beside it, by peft and by transformers itself."""
    base, adapter, whole = (tmp_path / part for part in ("base", "adapter", "merged"))
    student = student_of(name)
    student.save_pretrained(base)
    before, new = logits(student), {path for path, _ in student.named_parameters() if ".mixer." in path}
    model = trained(attach_lora(student, rank=2, alpha=None, dropout=0.0, on="linear", mixers=True))
    assert {path for path, p in model.named_parameters() if p.requires_grad and "lora_" not in path} == {
        f"base_model.model.{path.replace('.mixer.', '.mixer.modules_to_save.default.', 1)}" for path in new
    }
    expected = logits(model)
    assert relative_error(expected, before) > 1e-3
    model.save_pretrained(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {path.removeprefix("base_model.model.") for path in saved if "lora_" not in path} == new
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), adapter)), expected)
    by_transformers = load(base)
    by_transformers.load_adapter(adapter)
    assert torch.equal(logits(by_transformers), expected)
    plain = merged(model)
    assert type(plain) is LinearizeForCausalLM and relative_error(logits(plain), expected) < 1e-5
    plain.save_pretrained(whole)
    assert torch.equal(logits(load(whole)), logits(plain))


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_is_what_linear_is(name, tmp_path):
    """A person's own config: never a mixer's tensors, never the head; fused projections whole."""
    student = student_of(name)
    student.save_pretrained(tmp_path / "base")
    targets = set(lora_targets(student, "linear"))
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = trained(get_peft_model(load(tmp_path / "base"), config))
    assert adapted(model) == targets and not any(".mixer." in path for path in targets)
    projections = {path.rpartition(".")[2] for path in targets if ".mlp." not in path}
    assert FUSED.get(name, projections.copy().pop()) in projections
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            assert module.fan_in_fan_out is isinstance(layer, Conv1D)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")), expected)
    assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_trainers_prepare(name):
    """As trl does it: inputs that require gradients, checkpointing, a forward with labels."""
    student = student_of(name)
    student.enable_input_require_grads()
    model = trained(get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    gradients = []
    for options in (None, {"use_reentrant": len(name) % 2 == 0}):
        if options is not None:
            model.gradient_checkpointing_enable(options)
        model.train().zero_grad()
        torch.manual_seed(0)  # OPT drops out
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        gradients.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {path for path, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# On one family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_merging_is_exact_but_for_roundings(mixer):
    """In fp64, with mixers trained whole; and unloading gives the student as it was."""
    student = student_of("llama", mixer).double()
    before = logits(student)
    model = trained(attach_lora(student, rank=2, alpha=4.0, dropout=0.0, on="swapped", mixers=True))
    expected = logits(model)
    again = copy.deepcopy(model)
    assert relative_error(logits(merged(model)), expected) < 1e-6 < 1e-3 < relative_error(expected, before)
    assert relative_error(logits(unloaded(again)), before) < 1e-12


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("on", ["swapped", "qkv", "attention", "linear"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi3"])
def test_targets_leave_out_what_they_say(name, on):
    """With a layer that stays softmax: its projections are targets of `attention` and `linear` alone."""
    student = student_of(name, keep="0")
    paths = lora_targets(student, on)
    model = attach_lora(student, rank=2, alpha=None, dropout=0.0, on=on, mixers=False)
    assert adapted(model) == set(paths)
    layers = {path.split(".layers." if ".layers." in path else ".h.")[1][0] for path in paths}
    assert layers == ({"1"} if on in ("swapped", "qkv") else {"0", "1"})
    outputs = [path for path in paths if path.endswith(("attn.c_proj", "self_attn.o_proj"))]
    assert len(outputs) == {"qkv": 0, "swapped": 1}.get(on, 2)
    assert any("mlp" in path for path in paths) is (on == "linear" and name != "mixtral")


def test_experts_are_targets_by_name(tmp_path):
    """Tensors of no layer: peft's `target_parameters`."""
    student = student_of("mixtral")
    student.save_pretrained(tmp_path / "base")
    names = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM")
    model = trained(get_peft_model(student, config))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")), expected)
    assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


def test_mixers_are_saved_by_their_plain_name(tmp_path):
    """`modules_to_save=["mixer"]` is all that a person has to know; the adapter's folder leads to the base's."""
    student = student_of("qwen3")
    student.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["mixer"], task_type="CAUSAL_LM")
    model = trained(get_peft_model(load(tmp_path / "base"), lora))
    expected, greedy = logits(model), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), load(tmp_path / "adapter")):
        assert torch.equal(logits(loaded), expected)
        cached, whole = (loaded.generate(input_ids=IDS, use_cache=use, **greedy) for use in (True, False))
        assert torch.equal(cached, whole)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(student))


def test_transformers_own_adapters(tmp_path):
    student = student_of("olmo2")
    student.save_pretrained(tmp_path / "base")
    before = logits(student)
    student.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["mixer"]))
    expected = logits(trained(student))
    student.save_pretrained(tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    loaded = load(tmp_path / "base")
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), before)
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "lora_only"}], ids=str
)
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_other_kinds_of_lora(name, options):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = trained(get_peft_model(student_of(name), config))
    expected = logits(model)
    assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


def test_a_bf16_student_trains_and_keeps_its_mixers_wide(tmp_path):
    student = student_of("llama", dtype=torch.bfloat16)
    student.save_pretrained(tmp_path / "base")
    student = load(tmp_path / "base", dtype=torch.bfloat16)
    model = trained(attach_lora(student, rank=2, alpha=None, dropout=0.0, on="linear", mixers=True))
    wide = {path for path, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_parameter(path).dtype == torch.float32 for path in wide)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(model.get_parameter(path).grad).all() for path in wide)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    plain = merged(model)
    assert {p.dtype for path, p in plain.named_parameters() if ".mixer." not in path} == {torch.bfloat16}
    assert relative_error(logits(plain), expected) < 5e-2


def test_a_student_is_prepared_for_training_in_few_bits():
    """What peft does to a model before a trainer has it, here without the bits."""
    student = prepare_model_for_kbit_training(student_of("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in student.parameters())
    model = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_adapter_in_a_subfolder(tmp_path):
    student = student_of("olmo2")
    student.save_pretrained(tmp_path / "base")
    student.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mixer"]))
    student.save_pretrained(tmp_path / "rep")
    expected = logits(trained(student))
    student.save_pretrained(tmp_path / "rep" / "sub")
    loaded = load(tmp_path / "base")
    loaded.load_adapter(tmp_path / "rep", adapter_kwargs={"subfolder": "sub"})
    assert torch.equal(logits(loaded), expected)


def test_a_teacher_with_an_adapter_is_refused():
    teacher = copy.deepcopy(teacher_of("llama"))
    teacher.add_adapter(LoraConfig(r=2, target_modules=["gate_proj"]))
    with pytest.raises(UserError, match="carries an adapter, or the modules of one: load its base model anew"):
        convert(teacher, "linear")
    teacher._hf_peft_config_loaded = False  # as transformers' delete_adapter leaves it
    with pytest.raises(UserError, match="carries an adapter"):
        convert(teacher, "linear")
