"""A converted model is a transformers model: what that library's own model tests check, on every mixer and family."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake, tiny_teacher
from families import CONVERTED, UNLISTED, teacher_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from linearize.convert import convert
from linearize.errors import UserError
from linearize.modeling import LinearizeForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")  # by another name
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
# Three layers: mixers alone, some heads softmax in two of them, one layer softmax.
KEEPS = [None, "heads:0.1,2.2", "1"]
FAMILIES = [*CONVERTED, *UNLISTED]


def tokens(batch=2, length=20, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


IDS = tokens()


def student_of(mixer, keep=None, window=8, **overrides):
    return shake(convert(tiny_teacher(num_hidden_layers=3, **overrides), mixer, window=window, keep_softmax=keep))


@pytest.fixture(params=[(mixer, KEEPS[i % 3], 8 * (i % 4 != 3)) for i, mixer in enumerate(MIXER_NAMES)], ids=str)
def student(request):
    """One of each mixer, in turn with and without kept heads, a kept layer and a window."""
    mixer, keep, window = request.param
    return student_of(mixer, keep, window)


@pytest.fixture
def folder(student, tmp_path):
    student.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


# Starts, missing and further tensors -----------------------------------------------------------------------------


def test_it_starts_on_the_meta_device(student, folder):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(student.config))
    places = [*empty.named_parameters(), *empty.named_buffers()]
    assert all(tensor.is_meta for _, tensor in places)
    assert [name for name, _ in places] == [name for name, _ in (*student.named_parameters(), *student.named_buffers())]
    with torch.device("cpu"):
        assert torch.equal(logits(load(folder)), logits(student))


def test_every_tensor_is_a_parameter_or_a_buffer(student):
    """A plain attribute would stay behind when the model moves; the routes of kept heads are made where they run."""
    logits(student)
    for name, module in student.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


def test_what_a_checkpoint_lacks_gets_its_start(student, folder):
    """Weights, and buffers that no checkpoint holds, as where the model is built from its config; nothing is left as
    memory was found."""
    path = folder / "model.safetensors"
    lost = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"]
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in lost}
    save_file({**kept, "stray.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    loaded, report = load(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == set(lost) and set(report["unexpected_keys"]) == {"stray.weight"}
    assert (loaded.get_parameter(lost[1]) == 1).all() and 0.1 < loaded.get_parameter(lost[0]).std() < 0.3
    nothing = LinearizeForCausalLM.from_pretrained(None, config=copy.deepcopy(student.config), state_dict={})
    torch.manual_seed(0)
    built = LinearizeForCausalLM(copy.deepcopy(student.config))
    for model in (loaded, nothing):
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, student.get_buffer(name)), name
    for name, parameter in nothing.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert abs(parameter.std() - built.get_parameter(name).std()) <= 0.2 * parameter.std() + 0.02, name


def test_all_that_is_loaded_is_reported(folder):
    _, report = load(folder, output_loading_info=True)
    assert not any(report.values())


def test_shards_state_dicts_and_copies_give_the_same_logits(student, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    given = LinearizeForCausalLM.from_pretrained(None, config=student.config, state_dict=student.state_dict())
    built = LinearizeForCausalLM(copy.deepcopy(student.config)).eval()
    built.load_state_dict(student.state_dict())
    for other in (load(tmp_path), given, built, pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
        assert torch.equal(logits(other), logits(student))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tied, tmp_path):
    student = student_of("mamba2", "1", tie_word_embeddings=tied)
    student.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = load(tmp_path)
    for model in (student, loaded, copy.deepcopy(student)):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert torch.equal(logits(loaded), logits(student))


# Embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_and_stay_so(tied, tmp_path):
    student = student_of("gla", "heads:0.1", tie_word_embeddings=tied)
    before = logits(student)
    student.resize_token_embeddings(140)
    assert student.config.vocab_size == student.config.parent_config.vocab_size == student.vocab_size == 140
    assert relative_error(logits(student)[..., :128], before) < 1e-5
    new = torch.tensor([[130, 5, 139]])
    assert torch.isfinite(student(new, labels=new).loss)
    student.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.vocab_size == 140 and torch.equal(logits(loaded, new), logits(student, new))
    student.resize_token_embeddings(128)
    assert relative_error(logits(student), before) < 1e-6
    student.resize_token_embeddings(130, pad_to_multiple_of=64)
    assert student.get_input_embeddings().weight.shape[0] == student.get_output_embeddings().weight.shape[0] == 192
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) is tied


def test_embeddings_are_set(student):
    embeddings, head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
    student.set_input_embeddings(embeddings)
    student.set_output_embeddings(head)
    assert student.get_input_embeddings() is student.model.embed_tokens is embeddings
    assert student.get_output_embeddings() is student.lm_head is head
    assert student.get_decoder() is student.base_model is student.model
    ids = tokens() % 50
    assert logits(student, ids).shape == (2, 20, 50)
    assert torch.equal(logits(student, None, inputs_embeds=embeddings(ids)), logits(student, ids))


# What goes in and out --------------------------------------------------------------------------------------------


def test_positions_and_embeddings_that_are_the_defaults_change_nothing(student):
    places, embeds = torch.arange(20).unsqueeze(0), student.get_input_embeddings()(IDS)
    for options in ({"position_ids": places}, {"attention_mask": torch.ones_like(IDS)}, {"logits_to_keep": 20}):
        assert torch.equal(logits(student, **options), logits(student))
    assert torch.equal(logits(student, None, inputs_embeds=embeds), logits(student))
    assert not torch.equal(logits(student, position_ids=2 * places, use_cache=False), logits(student))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        student(IDS, inputs_embeds=embeds)


@torch.no_grad()
def test_hidden_states(student):
    out = student(IDS, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 20, 64)] * 4
    assert torch.equal(student.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(out.hidden_states[0], student.get_input_embeddings()(IDS))
    states = []
    for layer in student.model.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out))
    plain = student(IDS, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], out.logits)
    assert all(torch.equal(a, b) for a, b in zip(states[:2], out.hidden_states[1:3], strict=True))


@torch.no_grad()
def test_attentions_are_those_of_softmax_layers(student, folder):
    """As of transformers' own hybrids: one entry a layer that attends, none for a state; by the config as well."""
    loaded = load(folder, attn_implementation="eager")
    places = [index for index, layer in enumerate(student.config.layers) if layer["mixer"] == "softmax"]
    out = loaded(IDS, output_attentions=True)
    assert [weights.shape for weights in out.attentions] == [(2, 4, 20, 20)] * len(places)
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in out.attentions)
    assert len(load(folder, output_attentions=True)(IDS).attentions) == len(places)
    loaded.config.output_attentions = True
    assert len(loaded(IDS).attentions) == len(places)
    assert student(IDS).attentions is None


# Training --------------------------------------------------------------------------------------------------------


def gradients(model, **options):
    model.zero_grad()
    loss = model(IDS, labels=IDS, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(student, reentrant):
    student.train()
    loss, plain = gradients(student)
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert student.is_gradient_checkpointing
    passes = []
    student.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    again, checked = gradients(student)
    assert len(passes) == 2  # the second for the backward
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(checked, plain, rtol=1e-5, atol=1e-7)
    student.gradient_checkpointing_disable()
    assert not student.is_gradient_checkpointing
    gradients(student)
    assert len(passes) == 3


@pytest.mark.slow
@torch.no_grad()
def test_it_exports_as_one_graph():
    student = student_of("retention", KEEPS[1])
    program = torch.export.export(student, (IDS,), {"use_cache": False}, strict=False)
    other = tokens(seed=3)
    assert relative_error(program.module()(other, use_cache=False).logits, logits(student, other)) < 1e-5


# Devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}], ids=str)
def test_device_maps_of_one_device(student, folder, where):
    assert torch.equal(logits(load(folder, device_map=where)), logits(student))


def test_a_device_map_puts_layers_on_disk(student, folder, tmp_path):
    """By name, and by what fits; never a part of a layer."""
    tokens_ = student.generate(IDS, **GREEDY)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{index}": place for index, place in enumerate(("cpu", "disk", "disk"))}
    sizes = accelerate.utils.compute_module_sizes(student)
    largest = max(sizes[f"model.layers.{index}"] for index in range(3))
    room = sizes["model.embed_tokens"] + sizes["model.layers.0"] // 2 + 2 * largest
    for index, options in enumerate(({"device_map": parts}, {"device_map": "auto", "max_memory": {"cpu": room}})):
        loaded = load(folder, **options, offload_folder=tmp_path / f"disk{index}")
        away = {name.split(".")[2] for name, p in loaded.named_parameters() if p.is_meta and "layers" in name}
        assert away and "0" not in away, loaded.hf_device_map
        for layer in away:
            assert all(p.is_meta for p in loaded.model.layers[int(layer)].parameters())
        assert torch.equal(logits(loaded), logits(student))
        assert torch.equal(loaded.generate(IDS, **GREEDY), tokens_)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_accelerate_offloads(student, how, tmp_path):
    if how == "cpu" and student.config.layers[0]["mixer"] == "linear":  # a feature map with two tensors of its own
        student = shake(convert(tiny_teacher(), "linear", mixer_options={"feature_map": "t2r"}))
    moved = copy.deepcopy(student)
    if how == "cpu":
        accelerate.cpu_offload(moved, torch.device("cpu"))
    else:
        accelerate.disk_offload(moved, tmp_path, torch.device("cpu"))
    assert all(p.is_meta for p in moved.parameters())
    assert torch.equal(logits(moved), logits(student))
    assert torch.equal(moved.generate(IDS, **GREEDY), student.generate(IDS, **GREEDY))


# Families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_are_citizens(name, tmp_path):
    """Embeddings, attentions and hidden states, and generation from embeddings, where families name things apart."""
    teacher = teacher_of(name)
    shake(convert(teacher, MIXER_NAMES[len(name) % 6], window=8, keep_softmax="1")).save_pretrained(tmp_path / "start")
    student = load(tmp_path / "start", attn_implementation="eager")
    for get in ("get_input_embeddings", "get_output_embeddings", "get_decoder"):
        ours, theirs = (
            next(path for path, module in model.named_modules() if module is getattr(model, get)())
            for model in (student, teacher)
        )
        assert ours == theirs
    assert student._no_split_modules == teacher._no_split_modules
    out = student(IDS, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in out.attentions] == [(2, 4, 20, 20)] and len(out.hidden_states) == 3
    plain = student.generate(IDS, **GREEDY)
    embeds = student.get_input_embeddings()(IDS)
    assert torch.equal(student.generate(inputs_embeds=embeds, **GREEDY), plain[:, 20:])
    student.resize_token_embeddings(140)
    assert torch.isfinite(student(IDS, labels=IDS).loss)
    student.save_pretrained(tmp_path / "resized")
    loaded = load(tmp_path / "resized", attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(student)) and logits(loaded).shape[-1] == 140
    shared = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (teacher, student, loaded)]
    assert len(set(shared)) == 1


def test_an_offloaded_teacher_is_refused():
    teacher = tiny_teacher()
    accelerate.cpu_offload(teacher, torch.device("cpu"))
    with pytest.raises(UserError, match="offloaded: load it whole"):
        convert(teacher, "linear")
