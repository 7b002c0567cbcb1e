"""Every family: what a student of it must do, and what is refused because it would be wrong."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import MIXER_NAMES, relative_error, shake
from families import CONVERTED, REFUSED, UNLISTED, config_of, teacher_of
from packaging.version import Version
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from linearize.convert import convert, plan
from linearize.distill import distill
from linearize.distill.documents import keeps_apart
from linearize.distill.lora import attach_lora, lora_targets, merged
from linearize.distill.losses import prove_head
from linearize.errors import UserError
from linearize.modeling import AttentionAnatomy, LinearizeConfig
from linearize.modeling.cache import CACHE
from linearize.modeling.projections import weight_and_bias
from linearize.surgery.anatomy import meta_model, read_anatomy
from linearize.surgery.families import FAMILIES
from linearize.surgery.proof import calls_of, prove, proven_calls

NAMES = [*CONVERTED, *UNLISTED]
KEEP = "heads:0.1,1.2"
# Families whose logits are more than scale q.k.
BENT = ["gemma2", "gpt_oss", "bloom", "falcon+alibi"]


def tokens(batch=2, length=30, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def student_of(name, mixer="linear", **options):
    return shake(convert(teacher_of(name), mixer, window=8, **{"keep_softmax": KEEP, **options}))


def heads_alone(model, anatomies, heads):
    """Zeroes what the output projection of each layer reads of other heads than its one."""
    for anatomy, head in zip(anatomies, heads, strict=True):
        weight, _ = weight_and_bias(model.get_submodule(f"{anatomy.path}.{anatomy.output}"))
        keep = torch.zeros_like(weight)
        keep[:, head * anatomy.head_dim : (head + 1) * anatomy.head_dim] = 1
        weight.mul_(keep)


def test_all_that_are_listed_are_tested():
    assert {name.partition("+")[0] for name in CONVERTED} == set(FAMILIES)
    assert not {name.partition("+")[0] for name in UNLISTED} & set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_layer_left_softmax_is_the_teacher(name):
    teacher, ids = teacher_of(name), tokens()
    student = convert(teacher, "linear", keep_softmax=[0, 1])
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ours, theirs = (model(ids, attention_mask=mask).logits for model in (student, teacher))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_teachers_in_bfloat16(name, tmp_path):
    """What stays softmax is the teacher's to the bit, and heads that are kept are, but for roundings."""
    teacher, ids = teacher_of(name, torch.bfloat16), tokens()
    whole = convert(teacher, "gla", keep_softmax=[0, 1])
    assert torch.equal(whole(ids).logits, teacher(ids).logits)
    student = shake(convert(teacher, "gla", window=8, keep_softmax=KEEP))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(ids).logits, student(ids).logits)
    anatomies, places = read_anatomy(teacher), []
    for model in (student, teacher):
        heads_alone(model, anatomies, (1, 2))
        places.append(model(ids).logits)
    assert relative_error(*places) < 3e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tensors_keep_the_teachers_names(name):
    teacher = teacher_of(name)
    ours, theirs = student_of(name).state_dict(), teacher.state_dict()
    assert {tensor for tensor in ours if ".mixer." not in tensor} == set(theirs)
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    assert plan(teacher.config, "linear", keep_softmax=KEEP).layers[1].tensors


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_kept_heads_are_the_teachers(name, mixer):
    teacher, ids = teacher_of(name), tokens()
    anatomies = read_anatomy(teacher)
    student = student_of(name, mixer)
    for model in (student, teacher):
        heads_alone(model, anatomies, (1, 2))
    assert relative_error(student(ids).logits, teacher(ids).logits) < 1e-5
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ours, theirs = (model(ids, attention_mask=mask).logits[1:, 5:] for model in (student, teacher))
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_with_a_cache_and_without(name, mixer, tmp_path):
    """And after the student was saved and loaded, whose logits are the same bit for bit."""
    student, ids = student_of(name, mixer), tokens(2, 12)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    with_cache, without = (
        loaded.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    whole, cut = loaded(ids).logits, loaded(ids[:, :5], use_cache=True)
    rest = loaded(ids[:, 5:], **{CACHE: cut[CACHE]}).logits
    assert relative_error(torch.cat([cut.logits, rest], 1), whole) < 2e-5


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name, mixer):
    student = student_of(name, mixer).train()
    student(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for path, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), path
        if ".mixer." in path:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "gpt_neox", "falcon", "opt", "cohere2", "phi3", *BENT])
@torch.no_grad()
def test_static_caches(name):
    student, ids = student_of(name), tokens(2, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    static = student.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, student.generate(ids, **options))


@pytest.mark.parametrize(
    "name", ["gemma", "gemma3_text", "gpt2", "gpt_neox", "cohere+norms", "stablelm+norms", "olmo2", *BENT]
)
@pytest.mark.parametrize("mixer", ["based", "gated_delta"])
def test_starts_and_calibration(name, mixer):
    student = convert(teacher_of(name), mixer, window=8, calibrate_on=tokens(6, 48))
    assert student.calibration is not None
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "smollm3", *BENT])
def test_heads_by_scores(name):
    student = convert(teacher_of(name), "linear", window=8, keep_softmax="heads:auto:2", calibrate_on=tokens(4, 48))
    assert student.keep_scores.keep_softmax.startswith("heads:")


@pytest.mark.parametrize(
    ("name", "projections", "output"),
    [
        ("gpt2", {"c_attn", "c_proj"}, "c_proj"),
        ("gpt_neox", {"query_key_value", "dense"}, "dense"),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}, "out_proj"),
    ],
)
def test_lora_finds_the_projections(name, projections, output):
    student = student_of(name)
    swapped = lora_targets(student, "swapped")
    assert len(swapped) == 2 * len(projections) and {target.rpartition(".")[2] for target in swapped} == projections
    assert {target.rpartition(".")[2] for target in lora_targets(student, "qkv")} == projections - {output}
    assert set(swapped) < set(lora_targets(student, "linear"))
    before, ids = student(tokens()).logits, tokens()
    model = attach_lora(student, rank=2, alpha=None, dropout=0.0, on="swapped", mixers=True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    assert torch.equal(merged(model)(ids).logits, before)


# Falcon's class tells its masks of positions from transformers 5.24 on.
BLURRED = ("opt", "bloom", "gpt_oss", *(() if Version(transformers.__version__) >= Version("5.24") else ("falcon",)))
APART = {name: not name.startswith(BLURRED) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_whether_packed_documents_are_kept_apart(name):
    """By the teacher's masks; and by swapped layers, which GPT-BigCode and BLOOM hand no positions."""
    assert keeps_apart(teacher_of(name)) == APART[name]
    assert keeps_apart(student_of(name)) == (name not in ("gpt_bigcode", "bloom"))


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "granite", "gemma2", "gpt_oss", "bloom"])
def test_stages_run_on_other_layouts(name):
    """Each way in which a stage calls the layers and modules of a teacher."""
    teacher, ids = teacher_of(name), tokens(8, 32)
    for stage in ("transfer", "blocks", "mixing", "logits"):
        student = convert(teacher, "gated_delta", window=8, keep_softmax=KEEP if stage != "mixing" else None)
        data = [{"input_ids": row, "labels": row} for row in ids]
        if (name, stage) == ("falcon", "mixing"):  # its class is chosen when it is built, and gives no weights
            with pytest.raises(UserError, match="does not give its attention weights"):
                distill(student, teacher, data, stage=stage, device="cpu")
            continue
        student = distill(student, teacher, data, stage=stage, device="cpu")
        assert all(line["loss"] > 0 for line in student.distillation[0].log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "programs"),
    [(name, "transfer", 1) for name in ("gpt_neox", "stablelm+norms", "cohere", "olmo2", *BENT)]
    + [("gpt2", "logits", 3)],
)
def test_compiled_layers(name, stage, programs):
    """One program for all layers of a kind, without graph breaks, and the losses of eager training."""
    teacher, ids = teacher_of(name), tokens(8, 32)
    data = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for compile in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        student = convert(teacher, "retention", window=8)
        student = distill(student, teacher, data, stage=stage, compile=compile, batch_size=2, device="cpu")
        losses.append([line["loss"] for line in student.distillation[0].log])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", NAMES)
def test_heads_give_the_models_own_logits(name):
    """Factors of the logits, too; and what is not known is refused."""
    prove_head(teacher_of(name))
    student = student_of(name)
    prove_head(student)
    forward = student.forward
    student.forward = lambda **kwargs: SimpleNamespace(logits=1.1 * forward(**kwargs).logits)
    with pytest.raises(UserError, match="does more to its logits"):
        prove_head(student)


@pytest.mark.parametrize(("name", "who"), [("opt", "OPTForCausalLM"), ("gpt_bigcode", "LinearizeForCausalLM")])
def test_isolated_documents_are_refused_where_one_of_the_two_mixes_them(name, who):
    teacher = teacher_of(name)
    places = torch.cat([torch.arange(10), torch.arange(22)])
    data = [{"input_ids": row, "labels": row, "position_ids": places} for row in tokens(8, 32)]
    with pytest.raises(UserError, match=f"{who} cannot keep packed documents apart .a {name} model"):
        distill(convert(teacher, "linear", window=8), teacher, data, stage="transfer", device="cpu")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_parts_named(name):
    with pytest.raises(UserError) as caught:
        plan(config_of(name), "linear")
    assert REFUSED[name][2] in str(caught.value)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_family_of_known_parts_is_planned(name):
    made = plan(config_of(name), "linear", keep_softmax=KEEP)
    assert made.new_parameters == sum(p.numel() for n, p in student_of(name).named_parameters() if ".mixer." in n)


def test_cross_attention_is_refused():
    config = config_of("gpt2")
    config.add_cross_attention = True
    with pytest.raises(UserError, match="cross-attention"):
        meta_model(config)


def test_attention_of_the_name_of_what_is_new_is_refused():
    teacher = teacher_of("llama")
    for layer in teacher.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(UserError, match=r"layers\.0\.mixer: attention modules of that name"):
        read_anatomy(teacher)


@pytest.mark.parametrize("kind", ["rows", "norm_over", "rotary"])
def test_an_anatomy_of_no_known_kind_is_refused(kind):
    facts = read_anatomy(teacher_of("llama"))[0].to_dict() | {kind: "sideways"}
    with pytest.raises(ValueError, match=f"{kind} is 'sideways', and can be: "):
        AttentionAnatomy(**facts)


# What could be read wrongly: an anatomy of this family with these facts instead is another attention.
WRONG = [
    ("phi3", {"rows": "groups"}),
    ("gpt2", {"rows": "groups"}),
    ("gpt_neox", {"rows": "blocks"}),
    ("falcon", {"rows": "blocks"}),
    ("llama", {"rotary": "pairs"}),
    ("cohere", {"rotary": "half"}),
    ("smollm3", {"rotary_dim": 16}),
    ("cohere2", {"rotary_dim": 16, "rotary": "pairs"}),
    ("stablelm", {"rotary_dim": 16}),
    ("phi", {"rotary_dim": 0}),
    ("granite", {"scale": 0.25}),
    ("gpt2+scales", {"scale": 0.25}),
    ("mistral", {"window": None}),
    ("gemma3_text", {"window": None}),
    ("llama", {"window": 12}),
    ("olmo2", {"norms": []}),
    ("qwen3", {"norms": []}),
    ("stablelm+norms", {"norm_over": "head"}),
    ("cohere+norms", {"norm_over": "head_first"}),
    ("gemma2", {"logit_cap": None}),
    ("gemma2", {"logit_cap": 6.0}),
    ("gpt_oss", {"null_logits": None}),
    ("bloom", {"alibi": []}),
    ("bloom", {"alibi": [0.25, 0.0625, 0.015625, 0.0035]}),
    ("bloom", {"adds_residual": False}),
    ("falcon+alibi", {"alibi": []}),
    ("falcon+alibi", {"alibi": [0.25, 0.0625, 0.015625, 0.00390625]}),
]


@pytest.mark.parametrize(("name", "facts"), WRONG)
def test_the_proof_refuses_what_was_read_wrongly(name, facts):
    teacher = teacher_of(name)
    anatomies = read_anatomy(teacher)
    calls = calls_of(teacher, anatomies)
    prove(teacher, anatomies, calls)
    wrong = copy.deepcopy(anatomies)
    for anatomy in wrong:
        for field, value in facts.items():
            setattr(anatomy, field, value)
    with pytest.raises(UserError, match="is not the attention that it was read as"):
        prove(teacher, wrong, calls)


class Packed(torch.nn.Linear):
    """As bitsandbytes' Linear4bit: the weight is bytes in a column, and only the forward knows what they mean."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.quant_state = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.quant_state, self.bias)


@pytest.mark.parametrize("which", ["q_proj", "o_proj"])
def test_a_quantised_teacher_is_refused_by_name(which):
    teacher = teacher_of("llama")
    attention = teacher.model.layers[1].self_attn
    setattr(attention, which, Packed(getattr(attention, which)))
    with pytest.raises(
        UserError, match=rf"layers\.1\.self_attn\.{which} \(Packed\) holds its weight quantised \(uint8"
    ):
        convert(teacher, "linear")
    teacher = teacher_of("llama")
    projection = getattr(teacher.model.layers[0].self_attn, which)
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="holds its weight quantised"):
        convert(teacher, "linear")


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_the_proof_sees_a_bound_that_no_attribute_shows(std):
    """Of logits, as Gemma 2 bounds them; with weights so small, too, that its logits stay far below the bound."""
    teacher = teacher_of("gemma2")
    for path, parameter in teacher.named_parameters():
        if "proj" in path:
            torch.nn.init.normal_(parameter, std=std)
    for module in teacher.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.softcap, module.attn_logit_softcapping = module.attn_logit_softcapping, None
    teacher.config.attn_logit_softcapping = None
    anatomies = read_anatomy(teacher)
    calls = calls_of(teacher, anatomies)
    prove(teacher, anatomies, calls)  # without the bound it is an attention that is known
    for module in teacher.modules():
        if hasattr(module, "softcap"):
            module.attn_logit_softcapping = module.softcap
    teacher.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn \(Gemma2Attention\) is not the attention"):
        prove(teacher, anatomies, calls_of(teacher, anatomies))


@torch.no_grad()
def test_the_proof_sees_windows_longer_than_its_text():
    """And one in the config that the model does not heed."""
    config = config_of("mistral")
    config.sliding_window = 4096
    convert(AutoModelForCausalLM.from_config(config), "linear")
    assert config.sliding_window == 4096
    config = config_of("llama")
    config.sliding_window = 4096
    with pytest.raises(UserError, match=r"LlamaAttention\) is not the attention .* window 4096"):
        convert(AutoModelForCausalLM.from_config(config), "linear")


@pytest.mark.parametrize("start", [16, 64])
def test_the_proof_sees_what_far_positions_do(start):
    """Queries are scaled from `original_max_position_embeddings` on, far past the proof's own length as within it."""
    config = config_of("ministral3")
    convert(AutoModelForCausalLM.from_config(config), "linear")
    config.rope_parameters |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": start}
    with pytest.raises(UserError, match=r"Ministral3Attention\) is not the attention that it was read as"):
        convert(AutoModelForCausalLM.from_config(config), "linear")


def test_a_part_that_does_not_show_is_refused_at_the_conversion():
    teacher = teacher_of("llama")
    attention = teacher.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (1.01 * forward(*args, **kwargs)[0], None)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn .* is not the attention"):
        convert(teacher, "linear")


@pytest.mark.parametrize("name", ["gpt2", "phi3+long", "llama+dynamic"])
def test_the_proof_leaves_the_teacher_as_it_was(name):
    teacher = teacher_of(name).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    rotates = name != "gpt2"
    frequencies = teacher.model.rotary_emb.inv_freq.clone() if rotates else None
    proven_calls(teacher, read_anatomy(teacher))
    assert teacher.training and teacher.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not rotates or torch.equal(teacher.model.rotary_emb.inv_freq, frequencies)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("name", ["phi3+long", "llama+dynamic"])
@torch.no_grad()
def test_rotary_frequencies_that_follow_the_length(name, tmp_path):
    """Also of a teacher that has read something long, which may leave it with other buffers."""
    teacher = teacher_of(name)
    teacher(tokens(1, 140))
    convert(teacher, "linear", keep_softmax=[0, 1]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (30, 140, 30):
        ids = tokens(1, length)
        assert torch.equal(loaded(ids).logits, teacher(ids).logits)


def test_the_proof_runs_whatever_attention_the_teacher_was_loaded_with():
    """Kernels that know no fp64 are not asked."""

    def halves_alone(module, query, *args, **kwargs):
        assert query.dtype in (torch.float16, torch.bfloat16)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("halves", halves_alone)
    AttentionMaskInterface.register("halves", sdpa_mask)
    teacher = teacher_of("llama", torch.bfloat16)
    teacher.set_attn_implementation("halves")
    student = convert(teacher, "linear", keep_softmax="0")
    assert teacher.config._attn_implementation == "halves" and student.mixer_layers()


def test_the_students_config_leaves_the_teachers_rotary_settings_alone():
    """Nested ones, too: one entry a type of layer."""
    config = config_of("gemma3_text")
    before = copy.deepcopy(config.rope_parameters)
    LinearizeConfig(parent_config=config, layers=[])
    assert config.rope_parameters == before
