"""Bounded logits, ALiBi and logits without a key: their mathematics, and what they may not change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import exact_norms, relative_error, shake
from families import config_of, teacher_of
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.bloom import modeling_bloom

from linearize.calibrate.capture import attentions_of, watch
from linearize.calibrate.probe import Restored, probe_of
from linearize.calibrate.statistics import probabilities
from linearize.convert import convert
from linearize.distill.layer_pass import attention_pairs, transfer_pass
from linearize.errors import UserError
from linearize.modeling import AttentionAnatomy
from linearize.modeling.bend import STRAIGHT, Bend
from linearize.modeling.cache import CACHE, MixerCacheLayer
from linearize.modeling.kept import kept_softmax, kept_window
from linearize.modeling.layout import Layout
from linearize.modeling.window import attend
from linearize.source import load_model
from linearize.surgery.anatomy import read_anatomy
from linearize.surgery.proof import proven_calls

TOKENS, HEADS, GROUPS, SCALE = 40, 4, 2, 0.9
BENDS = {
    "cap": Bend(cap=1.5),
    "slopes": Bend(slopes=torch.tensor([1.0, 0.3, 0.05, 0.004], dtype=torch.float64)),
    "null": Bend(null=torch.tensor([-3.0, 0.5, 2.0, 6.0], dtype=torch.float64)),
}
BENDS["all"] = Bend(1.5, BENDS["slopes"].slopes, BENDS["null"].null)
# The families that have them, and how far two ways of computing the same may part: Gemma 2's norms round to fp32, and
# gpt-oss' experts take no fp64.
FAMILIES = {"gemma2": 1e-5, "gpt_oss": 2e-5, "bloom": 1e-10, "falcon+alibi": 1e-10}


def draw(seed=0, batch=2, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def dense(q, k, v, bend, seen, place):
    """Softmax over all pairs that `seen` [B or 1, T, T] shows; `place` [B or 1, T] of each token in its document."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * SCALE
    if bend.cap:
        logits = bend.cap * torch.tanh(logits / bend.cap)
    if bend.slopes is not None:
        logits = logits - bend.slopes[:, None, None] * (place.unsqueeze(-1) - place.unsqueeze(-2)).unsqueeze(1)
    weights = logits.exp() * seen.unsqueeze(1)
    total = weights.sum(-1)
    total = torch.where(seen.any(-1).unsqueeze(1), total, 1.0)  # a pad has no keys, nor a gradient
    if bend.null is not None:
        total = total + bend.null.exp()[:, None]
    return torch.einsum("bhij,bjhd->bihd", weights / total.unsqueeze(-1), v), total.log().transpose(1, 2)


def visible(place, same=None, window=None, sinks=0):
    distance = place.unsqueeze(-1) - place.unsqueeze(-2)
    seen = (distance >= 0) & (place >= 0).unsqueeze(-2)
    if window is not None:
        seen &= (distance < window) | (place < sinks).unsqueeze(-2)
    return seen if same is None else seen & same


ROW = torch.arange(TOKENS)
BOUNDS = torch.tensor([0, 14, 40])
DOCUMENT = (ROW >= 14).long()
LAYOUTS = {
    "plain": (Layout(), ROW[None], None),
    "pads": (
        Layout(real=torch.stack([ROW >= 0, ROW >= 9])),
        torch.stack([ROW, ROW - 9]),
        None,
    ),
    "packed": (
        Layout(cu_seqlens=torch.tensor([0, 14, 40, 54, 80])),
        (ROW - 14 * DOCUMENT)[None],
        (DOCUMENT[:, None] == DOCUMENT)[None],
    ),
}


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize(("window", "sinks"), [(7, 0), (7, 2), (64, 1)])
def test_the_window_is_dense_softmax_and_so_are_its_gradients(bend, window, sinks):
    leaves = [x.requires_grad_() for x in draw()]
    bent, null = BENDS[bend], BENDS[bend].null
    if null is not None:
        null = null.clone().requires_grad_()
        bent, leaves = bent._replace(null=null), [*leaves, null]
    pads = torch.tensor([0, 9])
    place = ROW - pads[:, None]
    real = place >= 0
    ours = attend(*leaves[:3], bent, window=window, sinks=sinks, scale=SCALE, position=-pads)
    theirs = dense(*leaves[:3], bent, visible(place, window=window, sinks=sinks), place)
    seeds = [torch.randn_like(x[real]) for x in theirs]
    grads = []
    for out in (ours, theirs):
        loss = sum((x[real] * seed).sum() for x, seed in zip(out, seeds, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[real], b[real])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounded", [False, True])
@torch.no_grad()
def test_kept_heads_are_dense_softmax(bend, layout, bounded):
    q, k, v = draw()
    how, place, same = LAYOUTS[layout]
    options = {"scale": SCALE, "layout": how, "cache": None, "bend": BENDS[bend]}
    out = kept_window(q, k, v, window=7, sinks=2, **options) if bounded else kept_softmax(q, k, v, **options)
    seen = visible(place, same, *((7, 2) if bounded else ()))
    real = (place >= 0).expand(2, -1)
    torch.testing.assert_close(out[real], dense(q, k, v, BENDS[bend], seen, place)[0][real])


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("cuts", [[13, 27], [5, 1, 1, 33], [12, 3, *[1] * 25]])
@torch.no_grad()
def test_kept_heads_from_a_cache(bend, static, cuts):
    """Pieces, the first of which has the second row's pads, give what the whole does."""
    q, k, v = draw()
    cache, start, pieces = MixerCacheLayer(max_cache_len=64 if static else None), 0, []
    pads = torch.tensor([0, 3])
    for length in cuts:
        piece = slice(start, start + length)
        layout = Layout(real=torch.stack([ROW >= 0, ROW >= 3])[:, piece] if start == 0 else None)
        pieces.append(
            kept_softmax(
                q[:, piece], k[:, piece], v[:, piece], scale=SCALE, layout=layout, cache=cache, bend=BENDS[bend]
            )
        )
        cache.advance(length, q.device)
        start += length
    place = ROW - pads[:, None]
    want = dense(q, k, v, BENDS[bend], visible(place), place)[0]
    real = place >= 0
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real])


def student_of(name, mixer, keep=None, window=8, **options):
    heads, _, bound = (keep or "").partition(" in ")
    dtype = torch.float32 if name == "gpt_oss" else torch.float64
    student = convert(
        teacher_of(name, dtype),
        mixer,
        window=window,
        keep_softmax=heads,
        keep_window=int(bound) if bound else None,
        mixer_options=options,
    )
    return shake(student) if dtype == torch.float32 else exact_norms(shake(student))


def tokens(batch=2, length=45, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


CASES = [
    ("linear", None, {}),
    ("based", "heads:0.1,1.2,1.3", {}),
    ("retention", "heads:0.1,1.2,1.3 in 12", {"gains": True}),
    ("gated_delta", "heads:0.1,1.2", {}),
]


@pytest.mark.parametrize(("mixer", "keep", "options"), CASES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_pieces_steps_and_whole_agree(name, mixer, keep, options):
    student, ids = student_of(name, mixer, keep, **options), tokens()
    whole = student(ids, use_cache=True).logits
    for cuts in ([20, 25], [3, 1, 17, 24], [1] * 45):
        cache, logits = None, []
        for piece in ids.split(cuts, 1):
            out = student(piece, **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            logits.append(out.logits)
        assert relative_error(torch.cat(logits, 1), whole) < FAMILIES[name]


@pytest.mark.parametrize(("mixer", "keep", "options"), CASES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_nothing(name, mixer, keep, options):
    student, ids = student_of(name, mixer, keep, **options), tokens(3, 30)
    lengths = [30, 17, 5]
    mask = torch.stack([torch.arange(30) >= 30 - length for length in lengths]).long()
    positions = {} if name == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    together = student(ids * mask, attention_mask=mask, use_cache=True, **positions)
    more = tokens(3, 4, seed=2)
    if positions:
        positions["position_ids"] = torch.tensor(lengths)[:, None] + torch.arange(4)
    grown = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    later = student(more, attention_mask=grown, **{CACHE: together[CACHE]}, **positions)
    for row, length in enumerate(lengths):
        alone = student(torch.cat([ids[row : row + 1, 30 - length :], more[row : row + 1]], 1)).logits
        both = torch.cat([together.logits[row : row + 1, 30 - length :], later.logits[row : row + 1]], 1)
        assert relative_error(both, alone) < FAMILIES[name]


@pytest.mark.parametrize(("mixer", "keep", "options"), CASES)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bloom"])
@torch.no_grad()
def test_packed_documents_are_separate_documents(name, mixer, keep, options):
    student, ids = student_of(name, mixer, keep, **options), tokens(1, 40)
    positions = torch.cat([torch.arange(length) for length in (13, 1, 26)])[None]
    packed = student(ids, position_ids=positions, use_cache=False).logits
    apart = [student(piece, use_cache=False).logits for piece in ids.split([13, 1, 26], 1)]
    assert relative_error(packed, torch.cat(apart, 1)) < FAMILIES[name]


@pytest.mark.parametrize("mixer", ["based", "retention"])
def test_null_logits_stay_the_teachers_own_parameter_and_train(mixer):
    teacher, ids = teacher_of("gpt_oss"), tokens()
    student = convert(teacher, mixer, window=8)
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.sinks"
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    student(ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in student.named_parameters() if "sinks" in name)


@pytest.mark.parametrize(("name", "mixer"), zip(FAMILIES, ["linear", "retention"] * 2, strict=True))
@torch.no_grad()
def test_the_kernels_give_what_the_reference_gives(name, mixer, monkeypatch):
    teacher, ids = teacher_of(name), tokens(1, 14)
    student = shake(convert(teacher, mixer, window=6, keep_softmax="heads:0.1,1.2"))
    found = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("LINEARIZE_KERNELS", choice)
        cut = student(ids[:, :12], use_cache=True)
        later = [student(piece, **{CACHE: cut[CACHE]}).logits for piece in ids[:, 12:].split(1, 1)]
        found.append(torch.cat([cut.logits, *later], 1))
    assert relative_error(*found) < 1e-4


@pytest.mark.parametrize("mixer", ["retention", "gla", "mamba2", "gated_delta"])
@pytest.mark.parametrize("name", ["bloom", "falcon+alibi"])
@torch.no_grad()
def test_alibis_slopes_start_the_decays(name, mixer):
    """A key's weight in the state falls as ALiBi would have it: by e^-slope a token."""
    student = convert(teacher_of(name), mixer, window=8)
    for _, attention in student.mixer_layers():
        slopes = torch.tensor(attention.anatomy.alibi)
        decay = attention.mixer.gates(torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 64)).log_decay
        found = -(decay if decay.dim() == 3 else decay.mean(-1)).flatten()
        assert found.tolist() == pytest.approx(slopes.tolist(), rel=1e-4)


@torch.no_grad()
def test_heads_that_share_a_state_start_at_their_mean_half_life():
    config = config_of("falcon+alibi")
    config.multi_query = True
    student = convert(AutoModelForCausalLM.from_config(config), "retention", window=8, keep_softmax=None)
    slopes = student.mixer_layers()[0][1].anatomy.alibi
    want = sum(math.log(math.log(2) / slope) for slope in slopes) / 4
    assert student.mixer_layers()[0][1].mixer.log_half_life.tolist() == pytest.approx([want])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom"])
@torch.no_grad()
def test_what_calibration_sees_is_the_teachers_attention(name):
    teacher, ids = teacher_of(name), tokens(2, 30)
    student = convert(teacher, "linear", window=8)
    attentions, found = attentions_of(student), {}
    watch(teacher, attentions, ids, lambda layer, seen: found.__setitem__(layer, seen))
    for layer, weights in enumerate(teacher(ids, output_attentions=True).attentions):
        for row in range(2):
            ours = probabilities(attentions[layer].anatomy, found[layer], row)
            torch.testing.assert_close(ours, weights[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_probe_with_open_gates_is_the_teacher(name):
    teacher, ids = teacher_of(name), tokens(2, 30)
    probe = probe_of(teacher, window=4, sinks=1)
    assert all(isinstance(attention.mixer, Restored) for _, attention in probe.mixer_layers())
    closed = relative_error(probe(ids).logits, teacher(ids).logits)
    for _, attention in probe.mixer_layers():
        attention.mixer.gate.fill_(1.0)
    assert relative_error(probe(ids).logits, teacher(ids).logits) < 1e-4 < 0.05 < closed


@torch.no_grad()
def test_blooms_residual_makes_no_error_small():
    """A student's attention that gives nothing is wrong by all of what the teacher's gives, whatever is added to it."""
    teacher = teacher_of("bloom")
    student = convert(teacher, "linear", window=8)
    for _, attention in student.mixer_layers():
        attention.dense.weight.zero_()
        attention.dense.bias.zero_()
    losses = []
    transfer_pass(
        teacher, attention_pairs(student, teacher), {"input_ids": tokens()}, lambda _, loss: losses.append(loss.item())
    )
    assert losses == pytest.approx([1.0, 1.0], rel=1e-5)


def bloom(heads=16, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=heads, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slopes_that_the_teachers_dtype_rounds_are_proven(dtype):
    """16 heads have slopes of 2^-1/2 and its odd powers; transformers rounds each times a position."""
    teacher = bloom(dtype=dtype)
    anatomies = read_anatomy(teacher)
    assert anatomies[0].alibi[0] == pytest.approx(2**-0.5)
    proven_calls(teacher, anatomies)


def test_biases_that_are_not_alibis_are_refused(monkeypatch):
    teacher, make = bloom(4, torch.float32), modeling_bloom.build_alibi_tensor
    anatomies = read_anatomy(teacher)
    proven_calls(teacher, anatomies)
    monkeypatch.setattr(modeling_bloom, "build_alibi_tensor", lambda *args, **kwargs: make(*args, **kwargs) * 1.1)
    with pytest.raises(UserError, match="its alibi is not what ALiBi's slopes make"):
        proven_calls(teacher, anatomies)


@torch.no_grad()
def test_logits_are_bounded_however_the_model_is_loaded(tmp_path):
    """Teacher and student: older transformers would take sdpa, which leaves the bound out without a word."""
    teacher, ids = teacher_of("gemma2"), tokens()
    teacher.save_pretrained(tmp_path / "teacher")
    convert(teacher, "linear", window=8, keep_softmax="1").save_pretrained(tmp_path / "student")
    assert torch.equal(load_model(tmp_path / "teacher").eval()(ids).logits, teacher(ids).logits)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.model.config._attn_implementation == "eager"
    teacher.config._attn_implementation_internal = "sdpa"
    with pytest.raises(UserError, match="sdpa attention, which does not bound its logits"):
        convert(teacher, "linear")


@pytest.mark.parametrize("name", ["bloom", "falcon+alibi"])
def test_static_caches_of_whole_layers_under_alibi_are_refused(name):
    student = convert(teacher_of(name), "linear", window=8, keep_softmax="1")
    with pytest.raises(ValueError, match="a static cache cannot serve the layers that stayed softmax whole"):
        student.generate(tokens(1, 8), cache_implementation="static", max_new_tokens=2, disable_compile=True)
    assert student.generate(tokens(1, 8), max_new_tokens=2, eos_token_id=None).shape == (1, 10)


def test_parts_that_do_not_fit_are_refused():
    facts = read_anatomy(teacher_of("bloom"))[0].to_dict()
    with pytest.raises(ValueError, match="3 slopes in alibi do not fit 4 heads"):
        AttentionAnatomy(**{**facts, "alibi": facts["alibi"][:3]})
    teacher = teacher_of("gpt_oss")
    teacher.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.sinks is \(4, 2\), where a logit for each of 4 heads"):
        read_anatomy(teacher)
    teacher = teacher_of("llama")
    teacher.config.clip_qkv = 8.0
    with pytest.raises(UserError, match=r"has bounded projections \(clip_qkv 8\.0\)"):
        read_anatomy(teacher)


@torch.no_grad()
def test_a_straight_bend_changes_nothing():
    q, k, v = draw()
    options = {"scale": SCALE, "layout": Layout(), "cache": None}
    assert torch.equal(kept_softmax(q, k, v, bend=copy.copy(STRAIGHT), **options), kept_softmax(q, k, v, **options))
    assert STRAIGHT.straight and not any(bend.straight for bend in BENDS.values())
