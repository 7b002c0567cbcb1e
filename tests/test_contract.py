"""The correctness contract: what every mixer must do inside a model."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from conftest import CONFIGS, MIXER_NAMES, exact_norms, relative_error, shake, tiny_teacher
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from linearize.convert import convert
from linearize.modeling import branch_off
from linearize.modeling.cache import CACHE
from linearize.modeling.kept import kept_window
from linearize.modeling.layout import Layout

WINDOWS = [0, 8]
KEEPS = [None, "heads:0.1,1.2,1.3", "0", "heads:0.1,1.2,1.3 in 12"]  # the last: of 12 keys


def student_of(mixer, window=8, keep=None, family="llama", dtype=torch.float64, sinks=None, **options):
    teacher = tiny_teacher(family, dtype)
    heads, _, bound = (keep or "").partition(" in ")
    student = convert(
        teacher,
        mixer,
        window=window,
        sinks=sinks,
        keep_softmax=heads,
        keep_window=int(bound) if bound else None,
        mixer_options=options,
    )
    student = shake(student)
    return exact_norms(student) if dtype == torch.float64 else student


def tokens(batch=2, length=45, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("keep", KEEPS)
@torch.no_grad()
def test_pieces_steps_and_whole_agree(mixer_name, window, keep):
    student, ids = student_of(mixer_name, window, keep), tokens()
    whole = student(ids, use_cache=True)
    for cuts in ([20, 25], [3, 1, 17, 24], [1] * 45):
        cache, start, logits = None, 0, []
        for length in cuts:
            out = student(ids[:, start : start + length], **{CACHE: cache}, use_cache=True)
            cache, start = out[CACHE], start + length
            logits.append(out.logits)
        assert relative_error(torch.cat(logits, 1), whole.logits) < 1e-10
        assert cache.get_seq_length() == 45
        for ours, theirs in zip(cache.layers, whole[CACHE].layers, strict=True):
            for name, tensor in getattr(theirs, "tensors", {}).items():
                torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("keep", KEEPS)
@torch.no_grad()
def test_left_padding_and_batching_change_nothing(mixer_name, window, keep):
    student, ids = student_of(mixer_name, window, keep), tokens(3, 30)
    lengths = [30, 17, 5]
    mask = torch.zeros(3, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 30 - length :] = 1
    padded = torch.where(mask.bool(), ids, torch.zeros_like(ids))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = student(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    more = torch.randint(3, 128, (3, 4))
    grown = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    later = student(
        more,
        attention_mask=grown,
        position_ids=torch.tensor(lengths).unsqueeze(1) + torch.arange(4),
        **{CACHE: together[CACHE]},
    )
    for row, length in enumerate(lengths):
        alone = student(torch.cat([ids[row : row + 1, 30 - length :], more[row : row + 1]], 1))
        both = torch.cat([together.logits[row : row + 1, 30 - length :], later.logits[row : row + 1]], 1)
        assert relative_error(both, alone.logits) < 1e-10


@torch.no_grad()
def test_left_padding_in_pieces(mixer_name):
    """Pads that reach over the first pieces, down to one token a piece."""
    student, ids = student_of(mixer_name, 8, "heads:0.1"), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for cuts in ([6, 14], [1] * 20):
        cache, start, logits = None, 0, []
        for length in cuts:
            piece = slice(start, start + length)
            out = student(
                ids[:, piece],
                attention_mask=mask[:, : start + length],
                position_ids=positions[:, piece],
                **{CACHE: cache},
                use_cache=True,
            )
            cache, start = out[CACHE], start + length
            logits.append(out.logits)
        alone = student(ids[1:, 9:]).logits
        assert relative_error(torch.cat(logits, 1)[1:, 9:], alone) < 1e-10


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("keep", KEEPS)
@torch.no_grad()
def test_packed_documents_are_separate(mixer_name, window, keep):
    student, ids = student_of(mixer_name, window, keep), tokens(2, 45)
    cuts = [[0, 11, 12, 45], [0, 30, 45]]
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(c)]) for c in cuts])
    packed = student(ids, position_ids=positions, use_cache=False).logits
    for row, bounds in enumerate(cuts):
        for a, b in pairwise(bounds):
            alone = student(ids[row : row + 1, a:b], use_cache=False).logits
            assert relative_error(packed[row : row + 1, a:b], alone) < 1e-10


def test_packed_documents_refuse_a_cache(mixer_name):
    student, ids = student_of(mixer_name), tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)]).unsqueeze(0)
    with pytest.raises(ValueError, match="packed documents"):
        student(ids, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_packed_documents_with_a_mask_of_ones_or_bounds(mixer_name):
    for keep in KEEPS:
        student, ids = student_of(mixer_name, 8, keep), tokens(1, 40)
        positions = torch.cat([torch.arange(18), torch.arange(22)]).unsqueeze(0)
        alone = student(ids[:, 18:], use_cache=False).logits
        masked = student(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert relative_error(masked[:, 18:], alone) < 1e-10
        bounds = torch.tensor([0, 18, 40], dtype=torch.int32)
        named = student(ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).logits
        assert relative_error(named[:, 18:], alone) < 1e-10


def test_masks_that_cannot_be_followed_are_refused():
    student, ids = student_of("based", dtype=torch.float32), tokens(1, 40)
    positions = torch.cat([torch.arange(18), torch.arange(22)]).unsqueeze(0)
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    with pytest.raises(ValueError, match="pads and packed documents"):
        student(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="4 dimensions"):
        student(ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool))


@torch.inference_mode()
def test_positions_changed_in_place_are_read_again():
    student, ids = student_of("based", dtype=torch.float32), tokens(1, 40)
    positions = torch.arange(40).unsqueeze(0)
    student(ids, position_ids=positions, use_cache=False)
    positions[0, 20:] = torch.arange(20)
    changed = student(ids, position_ids=positions, use_cache=False).logits
    assert relative_error(changed, student(ids, position_ids=positions.clone(), use_cache=False).logits) < 1e-6


def test_a_forward_in_inference_mode_leaves_a_model_trainable():
    student, ids = student_of("based", 8, "heads:0.1", dtype=torch.float32), tokens(1, 20)
    with torch.inference_mode():
        student(ids)
    student(ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize("window", WINDOWS)
def test_causal(mixer_name, window):
    """No later token reaches an earlier logit, in value or in gradient."""
    student, ids = student_of(mixer_name, window, "heads:0.1"), tokens(1, 40)
    embeds = student.get_input_embeddings()(ids).detach().requires_grad_()
    student(inputs_embeds=embeds, use_cache=False).logits[0, 25].sum().backward()
    assert (embeds.grad[0, 26:] == 0).all()
    assert embeds.grad[0, 0].abs().max() > 0  # and the first token does, past any window


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_are_finite_and_reach_every_new_parameter(mixer_name, window):
    student = student_of(mixer_name, window, "heads:0.1", dtype=torch.float32).train()
    student(tokens(2, 45), labels=tokens(2, 45), use_cache=False).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if ".mixer." in name:
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_bf16_stays_near_fp32(mixer_name):
    teacher = tiny_teacher(dtype=torch.bfloat16)
    student = shake(convert(teacher, mixer_name, window=8))
    attention = student.mixer_layers()[0][1]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 45, n, 16, generator=generator).bfloat16() for n in (4, 2, 2))
    x = torch.randn(2, 45, 64, generator=generator).bfloat16()
    low = attention.mixer(q, k, v, x)
    high = copy.deepcopy(attention.mixer).double()(q.double(), k.double(), v.double(), x.double())
    assert low.dtype == torch.bfloat16
    assert relative_error(low, high) < 1e-2


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("keep", KEEPS)
@torch.no_grad()
def test_save_and_load_bit_for_bit(mixer_name, family, keep, tmp_path):
    student, ids = student_of(mixer_name, 8, keep, family, torch.float32), tokens()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    names = [name for name, _ in loaded.named_parameters()]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names


@torch.no_grad()
def test_new_parameters_stay_fp32_in_a_bf16_model(mixer_name, tmp_path):
    student = convert(tiny_teacher(dtype=torch.bfloat16), mixer_name)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if ".mixer." in name else torch.bfloat16), name
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


def test_a_missing_new_parameter_gets_its_start(mixer_name, tmp_path):
    from safetensors.torch import load_file, save_file

    student = convert(tiny_teacher(), mixer_name, mixer_options={} if mixer_name == "based" else {"feature_map": "t2r"})
    student.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".mixer." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith(("gate_down", "proj_q", "proj_k", "linear_scale")):
            continue  # random, or read from the teacher's weights
        assert torch.equal(parameter, student.get_parameter(name)), name


@pytest.mark.parametrize("family", list(CONFIGS))
@torch.no_grad()
def test_untouched_softmax_gives_the_teachers_output(family):
    teacher, ids = tiny_teacher(family), tokens(2, 40)
    student = convert(teacher, "linear", keep_softmax=[0, 1])
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    assert student.mixer_layers() == []


@pytest.mark.parametrize("family", list(CONFIGS))
@torch.no_grad()
def test_kept_heads_are_the_teachers(family, mixer_name):
    """With o_proj reading the kept heads alone, the swapped module gives the teacher module's output."""
    teacher = tiny_teacher(family, torch.float64, num_hidden_layers=1)
    for head in (1, 2):
        student = exact_norms(convert(teacher, mixer_name, keep_softmax=f"heads:0.{head}", window=8))
        other = exact_norms(copy.deepcopy(teacher))
        for model in (student, other):
            weight = model.model.layers[0].self_attn.o_proj.weight
            keep = torch.zeros_like(weight)
            keep[:, head * 16 : head * 16 + 16] = 1
            weight.mul_(keep)
        assert relative_error(student(tokens(2, 40)).logits, other(tokens(2, 40)).logits) < 1e-10


@torch.no_grad()
def test_bounded_kept_heads_are_a_sliding_window(mixer_name):
    """Those of a teacher with a window of its own; and a cache of a size that a longer text does not change."""
    keep, ids = "heads:0.1,1.2,1.3", tokens(2, 40)
    sliding = tiny_teacher("mistral", torch.float64, sliding_window=12)
    bounded = tiny_teacher("mistral", torch.float64, sliding_window=None)
    bounded.load_state_dict(sliding.state_dict())
    first = exact_norms(convert(sliding, mixer_name, window=8, sinks=0, keep_softmax=keep))
    narrow = {"window": 8, "keep_softmax": keep, "keep_window": 12}
    second = exact_norms(convert(bounded, mixer_name, sinks=0, **narrow))
    sinks = exact_norms(convert(bounded, mixer_name, sinks=2, **narrow))
    free = exact_norms(convert(bounded, mixer_name, window=8, keep_softmax=keep))
    out = second(ids, use_cache=True)
    assert relative_error(out.logits, first(ids).logits) < 1e-12 < relative_error(out.logits, free(ids).logits)
    held = [layer.bytes() for layer in out[CACHE].layers]
    for _ in range(3):
        out = second(ids[:, :5], **{CACHE: out[CACHE]}, use_cache=True)
    assert [layer.bytes() for layer in out[CACHE].layers] == held
    attentions = [attention for _, attention in second.mixer_layers()]
    assert all(attention.kv_bytes_per_token() == 0 for attention in attentions)
    assert all(a.state_bytes() == a.mixer.state_bytes() + 8 + 12 * 2 * 2 * 16 for a in attentions)
    assert all(a.state_bytes() == a.mixer.state_bytes() + 8 + 14 * 2 * 2 * 16 for _, a in sinks.mixer_layers())
    assert all(attention.kv_bytes_per_token() == 2 * 2 * 16 for _, attention in free.mixer_layers())


@pytest.mark.parametrize("name", ["retention", "gla", "mamba2", "gated_delta"])
@torch.no_grad()
def test_a_weighed_branch_keeps_the_contract(name, tmp_path):
    """Pieces and steps, pads on the left, packed documents, save and load, where the far mass weighs the branch."""
    student, ids = student_of(name, gains=True), tokens()
    whole = student(ids, use_cache=True)
    cache, start, logits = None, 0, []
    for length in (3, 1, 17, *[1] * 24):
        out = student(ids[:, start : start + length], **{CACHE: cache}, use_cache=True)
        cache, start = out[CACHE], start + length
        logits.append(out.logits)
    assert relative_error(torch.cat(logits, 1), whole.logits) < 1e-10
    pads = torch.cat([torch.full((2, 9), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 9, dtype=torch.long), torch.ones_like(ids)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = student(pads, attention_mask=mask, position_ids=places).logits[:, 9:]
    assert relative_error(padded, whole.logits) < 1e-10
    places = torch.cat([torch.arange(45), torch.arange(45)])[None]
    packed = student(ids.view(1, -1), position_ids=places, use_cache=False).logits
    assert relative_error(packed.view(2, 45, -1), whole.logits) < 1e-10
    student.save_pretrained(tmp_path)
    loaded = exact_norms(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    assert loaded.config.mixer_options["gains"] and relative_error(loaded(ids).logits, whole.logits) < 1e-6
    # Alone the window gives what it does without the branch, however little the far side weighs.
    for _, attention in student.mixer_layers():
        attention.mixer.gain.fill_(-200.0)
    with branch_off(student, "linear"):
        alone = student(ids).logits
    assert relative_error(student(ids).logits, alone) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_bounded_kept_heads_see_their_window_and_the_sinks(packed):
    """Against dense softmax under a mask, of documents of 14 and 26 tokens or of one."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 40, heads, 16, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 14, 40]) if packed else None
    out = kept_window(q, k, v, scale=0.3, window=12, sinks=2, layout=Layout(cu_seqlens=bounds), cache=None)
    start = torch.tensor([0] * 14 + [14 if packed else 0] * 26)
    row, column = torch.arange(40).unsqueeze(1), torch.arange(40)
    seen = (column <= row) & (column >= start.unsqueeze(1)) & ((row - column < 12) | (column - start.unsqueeze(1) < 2))
    heads = (q, *(x.repeat_interleave(2, dim=2) for x in (k, v)))
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), attn_mask=seen, scale=0.3)
    assert relative_error(out, dense.transpose(1, 2)) < 1e-12


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_softmax(mixer_name):
    teacher, ids = tiny_teacher(dtype=torch.float64), tokens()
    student = exact_norms(convert(teacher, mixer_name, window=45))
    teacher = exact_norms(teacher)
    with branch_off(student, "linear"):
        assert relative_error(student(ids).logits, teacher(ids).logits) < 1e-10
    if mixer_name in ("linear", "based"):  # one denominator: no far key, no weight
        assert relative_error(student(ids).logits, teacher(ids).logits) < 1e-10


@torch.no_grad()
def test_a_branch_that_is_off_is_not_seen(mixer_name):
    """Beside one another and alone, with a cache and without; and without a window there is nothing to switch off."""
    student, ids = student_of(mixer_name, 8), tokens()
    whole = student(ids).logits
    for branch in ("linear", "window"):
        with branch_off(student, branch):
            alone = student(ids).logits
            out = student(ids[:, :20], use_cache=True)
            pieces = [out.logits]
            for t in range(20, ids.shape[1]):
                pieces.append(student(ids[:, t : t + 1], **{CACHE: out[CACHE]}).logits)
            assert relative_error(torch.cat(pieces, 1), alone) < 1e-10
        assert not torch.equal(alone, whole)
        assert torch.equal(student(ids).logits, whole)
    with branch_off(student, "window"):  # token 8 is the first that any linear branch has a key for: token 0, a sink
        changed = ids.clone()
        changed[:, 1] = (changed[:, 1] + 1) % 100
        moved = (student(changed).logits - student(ids).logits).abs().amax((0, 2)) > 0
        assert not moved[2:9].any() and moved[9]
    with pytest.raises(ValueError, match="without a window"), branch_off(student_of(mixer_name, 0), "window"):
        pass


@torch.no_grad()
def test_state_heads_query_equals_repeated_keys(mixer_name):
    student = student_of(mixer_name, 8, state_heads="query")
    ids = tokens()
    whole = student(ids).logits
    out = student(ids[:, :20], use_cache=True)
    rest = student(ids[:, 20:], **{CACHE: out[CACHE]}).logits
    assert relative_error(torch.cat([out.logits, rest], 1), whole) < 1e-10
    state = out[CACHE].layers[0].tensors["kv"]
    assert state.shape[1] == 4


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_state_is_constant_in_length(mixer_name, window):
    student = student_of(mixer_name, window, dtype=torch.float32)
    sizes = []
    for length in (30, 60, 120):
        cache = student(tokens(1, length), use_cache=True)[CACHE]
        sizes.append([layer.bytes() for layer in cache.layers])
    assert sizes[0] == sizes[1] == sizes[2]
    planned = sum(attention.mixer.state_bytes(element_size=4) for _, attention in student.mixer_layers())
    assert planned == sum(sizes[0])


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_generation(mixer_name, window):
    student, ids = student_of(mixer_name, window, "heads:0.1", dtype=torch.float32), tokens(2, 12)
    cached = student.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    plain = student.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)
    beams = student.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    plain = student.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(beams, plain)
    sampled = student.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2, eos_token_id=None)
    assert sampled.shape == (4, 17)


@torch.no_grad()
def test_a_config_makes_the_model_again_and_switches_its_cache():
    student = student_of("based", keep="0", dtype=torch.float32)
    again = AutoModelForCausalLM.from_config(copy.deepcopy(student.config))
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(tokens()).logits, student(tokens()).logits)
    whole = student_of("based", dtype=torch.float32)
    AutoModelForCausalLM.from_config(copy.deepcopy(whole.config))
    student.config.use_cache = False
    assert student(tokens()).get(CACHE) is None
    student.config.output_hidden_states = True
    assert len(student(tokens()).hidden_states) == 3


def test_the_attention_implementation_reaches_kept_layers(tmp_path):
    student_of("based", keep="0", dtype=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"
    whole = student_of("based", dtype=torch.float32)
    whole.set_attn_implementation("eager")
    assert whole.model.config._attn_implementation == "linearize"  # no layer reads a T x T mask


def test_assisted_decoding_is_refused(mixer_name):
    student = student_of(mixer_name, dtype=torch.float32)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        student.generate(tokens(1), assistant_model=tiny_teacher(), max_new_tokens=3)


def test_right_padding_with_a_cache_is_refused():
    student = student_of("linear", dtype=torch.float32)
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        student(tokens(), attention_mask=mask, use_cache=True)
    out = student(tokens(), attention_mask=mask)
    with pytest.raises(ValueError, match="pad on the left"):
        grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        student(tokens(2, 1), attention_mask=grown, **{CACHE: out[CACHE]})


def test_the_registry_rejects_clashes():
    from linearize.modeling.mixer import MIXERS, Mixer, register

    with pytest.raises(ValueError, match="two mixers"):

        @register("based")
        class Other(Mixer):
            pass

    assert sorted(MIXERS) == sorted(MIXER_NAMES)


def test_pads_between_tokens_are_refused(mixer_name):
    student = shake(convert(tiny_teacher(), mixer_name, window=4))
    ids, mask = torch.randint(3, 128, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 3:5] = 0
    for use_cache in (None, False):
        with pytest.raises(ValueError, match="pads between a row's tokens"):
            student(ids, attention_mask=mask, use_cache=use_cache)
    mask[1, :5] = 0
    student(ids, attention_mask=mask, use_cache=False)


def test_packed_documents_in_a_plain_call(mixer_name):
    """As the teacher: who asks for no cache is given none."""
    student = shake(convert(tiny_teacher(), mixer_name, window=4))
    ids, positions = torch.randint(3, 128, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    plain = student(ids, position_ids=positions)
    assert plain.get(CACHE) is None
    assert torch.equal(plain.logits, student(ids, position_ids=positions, use_cache=False).logits)
    assert torch.equal(plain.logits, student(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits)
    assert student(ids).get(CACHE) is not None


@torch.no_grad()
def test_the_cache_goes_by_the_name_of_any_release(mixer_name):
    student, ids = shake(convert(tiny_teacher(), mixer_name, window=4)), torch.randint(3, 128, (1, 9))
    held = student(ids[:, :5], use_cache=True)[CACHE]
    later = [
        student(ids[:, 5:], **{name: copy.deepcopy(held)}, use_cache=True) for name in ("cache", "past_key_values")
    ]
    assert torch.equal(later[0].logits, later[1].logits)
    assert relative_error(later[0].logits, student(ids).logits[:, 5:]) < 1e-5
    assert all(out[CACHE].get_seq_length() == 9 for out in later)
    with pytest.raises(ValueError, match="two names of one argument"):
        student(ids[:, 5:], cache=held, past_key_values=held)
