"""Generation with a state in place of keys: what transformers' own generation tests check, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake, tiny_teacher
from families import teacher_of
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedCache

from linearize.convert import convert
from linearize.modeling.cache import CACHE, MixerCacheLayer

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
KEEPS = [None, "heads:0.1,1.2", "0"]
TEACHER = tiny_teacher()


def tokens(batch=2, length=12, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


IDS = tokens()
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def student_of(mixer="gla", keep=None, window=8):
    return shake(convert(TEACHER, mixer, window=window, keep_softmax=keep))


@pytest.fixture(params=[(mixer, KEEPS[i % 3], 8 * (i % 4 != 1)) for i, mixer in enumerate(MIXER_NAMES)], ids=str)
def student(request):
    """One of each mixer, in turn with and without kept heads, a kept layer and a window."""
    return student_of(*request.param)


def filled(student, ids, **options):
    with torch.no_grad():
        return student(ids, use_cache=True, **options)[CACHE]


# From embeddings, from a cache, in pieces ------------------------------------------------------------------------


def test_generation_from_embeddings(student):
    embeds, plain = student.get_input_embeddings()(IDS), student.generate(IDS, attention_mask=MASK, **GREEDY)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = student.generate(inputs_embeds=embeds, attention_mask=MASK, **options, **GREEDY)
        assert torch.equal(out, plain[:, 12:])
    assert torch.equal(student.generate(IDS, inputs_embeds=embeds, attention_mask=MASK, **GREEDY), plain)
    other = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))  # of no token
    cached, whole = (student.generate(inputs_embeds=other, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached, whole) and not torch.equal(cached, plain[:, 12:])


def test_generation_goes_on_from_a_cache(student):
    """After a stop, with a further turn of the prompt, and from embeddings."""
    options = {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True}
    plain = student.generate(IDS, attention_mask=MASK, **GREEDY)
    ones = torch.ones(2, 4, dtype=torch.long)
    for how in ("ids", "embeds"):
        half = student.generate(IDS, attention_mask=MASK, **options)
        mask = torch.cat([MASK, ones], 1)
        given = {"input_ids": half.sequences} if how == "ids" else {
            "inputs_embeds": student.get_input_embeddings()(half.sequences)}  # fmt: skip
        rest = student.generate(**given, attention_mask=mask, **{CACHE: half[CACHE]}, **options)
        assert torch.equal(rest.sequences[:, -4:], plain[:, 16:])
    turn = torch.cat([rest.sequences if how == "ids" else plain, tokens(2, 5, seed=3)], 1)
    mask = torch.cat([MASK, torch.ones(2, turn.shape[1] - 12, dtype=torch.long)], 1)
    # The last token of an answer was given out, and not taken in.
    assert rest[CACHE].get_seq_length() == 19
    out = student.generate(turn, attention_mask=mask, **{CACHE: rest[CACHE]}, **GREEDY)
    assert torch.equal(out, student.generate(turn, attention_mask=mask, **GREEDY))


def test_a_prompt_in_the_cache_serves_several_texts(student):
    prefix = filled(student, IDS[:1])
    for seed in (2, 3):
        text = torch.cat([IDS[:1], tokens(1, 4, seed)], 1)
        out = student.generate(text, **{CACHE: copy.deepcopy(prefix)}, **GREEDY)
        assert torch.equal(out, student.generate(text, **GREEDY))
    texts = torch.cat([IDS[:1].expand(3, -1), tokens(3, 4)], 1)
    prefix.batch_repeat_interleave(3)
    plain = student.generate(texts, **GREEDY)
    assert torch.equal(student.generate(texts, **{CACHE: copy.deepcopy(prefix)}, **GREEDY), plain)
    prefix.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(student.generate(texts[[2, 0]], **{CACHE: prefix}, **GREEDY), plain[[2, 0]])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_is_read_in_chunks(student, options):
    plain = student.generate(IDS, attention_mask=MASK, **GREEDY)
    out = student.generate(IDS, attention_mask=MASK, prefill_chunk_size=5, **options, **GREEDY)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("padded", [True, False])
def test_positions_that_are_given_are_those_that_are_counted(student, padded):
    mask = MASK if padded else torch.ones_like(IDS)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = student.generate(IDS, attention_mask=mask, position_ids=places, **GREEDY)
    assert torch.equal(out, student.generate(IDS, attention_mask=mask, **GREEDY))
    if padded:
        alone = student.generate(IDS[:1, 5:], **GREEDY)
        assert torch.equal(out[:1, 5:], alone)


# Ways of choosing ------------------------------------------------------------------------------------------------

CHOICES = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},  # a second cache, of the prompt's last token alone
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_cache_changes_no_choice(student, choice):
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": choice == "sampling", **CHOICES[choice]}
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        given = options if use_cache else {**options, "use_cache": False, "cache_implementation": None}
        outs.append(student.generate(IDS, attention_mask=MASK, **given))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    if choice == "sampling":
        assert outs[0].sequences.shape[0] == 6
        assert relative_error(*(torch.stack(out.logits, 1) for out in outs)) < 1e-4


def test_outputs_of_every_step(student):
    softmax = [layer["mixer"] for layer in student.config.layers].count("softmax")
    student.set_attn_implementation("eager")
    flags = {"output_hidden_states": True, "output_attentions": True, "output_scores": True}
    out = student.generate(IDS, return_dict_in_generate=True, **flags, **GREEDY)
    assert len(out.scores) == len(out.hidden_states) == len(out.attentions) == 8
    for step, (states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        rows = 12 if step == 0 else 1
        assert [state.shape for state in states] == [(2, rows, 64)] * 3
        assert [weights.shape for weights in attentions] == [(2, 4, rows, 12 + step)] * softmax
    transitions = student.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transitions.shape == (2, 8)


# Caches of other kinds -------------------------------------------------------------------------------------------


def test_caches_that_are_given(student):
    plain = student.generate(IDS, attention_mask=MASK, **GREEDY)
    config = student.config
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=20)):
        assert torch.equal(student.generate(IDS, attention_mask=MASK, **{CACHE: cache}, **GREEDY), plain)
        assert int(cache.get_seq_length()) == 19
        if isinstance(cache, StaticCache):  # a stock dynamic layer kept its length until 5.23
            cache.reset()
            assert torch.equal(student.generate(IDS, attention_mask=MASK, **{CACHE: cache}, **GREEDY), plain)


@pytest.mark.parametrize("keep", KEEPS)
def test_sliding_caches(keep):
    """Of a teacher with a window: layers that slide, past their window, which is stock for a layer that stays."""
    student = shake(convert(tiny_teacher("mistral", sliding_window=10), "gla", window=8, keep_softmax=keep))
    plain = student.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY)
    for options in ({}, {"cache_implementation": "static"}, {CACHE: DynamicCache(config=student.config)}):
        assert torch.equal(student.generate(IDS, attention_mask=MASK, **options, **GREEDY), plain)


def test_an_offloading_cache_fetches_keys_past_a_state():
    """It asks for the layer after the one that runs, and a state there would leave the next keys away."""
    cache, fetched = DynamicCache(offloading=True), []
    kept = [DynamicLayer(), DynamicLayer()]
    for layer in kept:
        layer.keys, layer.device, layer.is_initialized = torch.zeros(1, device="meta"), torch.device("cpu"), True
        layer.prefetch = lambda layer=layer: fetched.append(layer)
    states = [MixerCacheLayer(layers=cache.layers) for _ in range(3)]
    cache.layers += [kept[0], states[0], states[1], kept[1], states[2]]
    for after in (1, 4):
        cache.prefetch(after)
    assert fetched == [kept[1], kept[0]]
    student = student_of()
    plain = student.generate(IDS, **GREEDY)
    assert torch.equal(student.generate(IDS, cache_implementation="offloaded", **GREEDY), plain)
    student(IDS, **{CACHE: (given := DynamicCache(offloading=True))})
    assert all(layer.layers is given.layers for layer in given.layers)


@pytest.mark.parametrize("keep", KEEPS)
def test_frequencies_that_change_with_the_length(keep):
    """Phi-3 reads the text anew where it grows past the length at which they do; so does its student."""
    student = shake(convert(teacher_of("phi3+long"), "gla", window=8, keep_softmax=keep))
    ids = tokens(2, 60)
    cached, whole = (student.generate(ids, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached, whole)


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation .* Leave out assistant_model, prompt_lookup_num_tokens"),
        ({"assistant_model": TEACHER}, "assisted generation .* Leave out assistant_model"),
        ({"cache_implementation": "quantized"}, "no keys to quantise.* pass 'static'"),
        ({"cache_implementation": "paged"}, "continuous batching .* Call generate on a batch padded on the left"),
    ],
    ids=["lookup", "assisted", "quantized", "paged"],
)
def test_what_a_state_cannot_do_is_refused(student, options, message):
    with pytest.raises(ValueError, match=message):
        student.generate(IDS, **options, **GREEDY)


def test_continuous_batching_is_refused(student):
    """It would run, and give wrong tokens: pages of keys are handed to attention, and a state to none."""
    with pytest.raises(ValueError, match="a linear-time layer has a state instead"):
        student.generate_batch(IDS.tolist(), generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=-1))


def test_a_student_of_softmax_alone_batches_continuously():
    student = convert(TEACHER, "gla", keep_softmax="every:1")
    assert not student._is_stateful
    settings = GenerationConfig(max_new_tokens=4, eos_token_id=-1, do_sample=False)
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # as many as memory holds by itself
    made = []
    for model in (TEACHER, student):
        outputs = model.generate_batch(IDS.tolist(), settings, pages)
        made.append([out.generated_tokens for _, out in sorted(outputs.items())])
    assert made[0] == made[1] and len(made[0]) == 2 and all(len(tokens) == 4 for tokens in made[0])


class Pages:
    """What continuous batching hands on as `cache` before transformers 5.24, beside a model's own."""


@pytest.mark.skipif(CACHE == "cache", reason="one name for both from transformers 5.24 on")
def test_the_pages_of_continuous_batching_reach_softmax(monkeypatch):
    student, seen = convert(TEACHER, "gla", keep_softmax="every:1"), []
    for layer in student.model.layers:
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda **given: seen.append(given) or (given["hidden_states"], None)
        )
    student(IDS, cache=(pages := Pages()), use_cache=False)
    assert [given["cache"] for given in seen] == [pages, pages]
    assert all(given["past_key_values"] is None for given in seen)


def test_inputs_are_prepared_by_either_name_of_the_cache(student):
    held, ids = filled(student, IDS[:, :7]), IDS[:, :8]
    for name in ("cache", "past_key_values"):
        made = student.prepare_inputs_for_generation(ids, next_sequence_length=1, **{name: held})
        assert made["input_ids"].shape == (2, 1) and made[CACHE] is held


def test_a_student_is_no_assistant(student):
    with pytest.raises(ValueError, match="Pass a softmax model as the assistant"):
        TEACHER.generate(IDS[:1], assistant_model=student, **GREEDY)


def test_a_cache_that_would_have_to_go_back_is_refused(student):
    out = student.generate(IDS, return_dict_in_generate=True, **GREEDY)
    for again in (IDS, out.sequences[:, :19]):  # shorter than what it holds, or no longer
        with pytest.raises(ValueError, match=r"holds 19 tokens, .* Pass the tokens that follow too"):
            student.generate(again, **{CACHE: out[CACHE]}, **GREEDY)
    cache = out[CACHE]
    assert not cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 19
    with pytest.raises(NotImplementedError, match=r"copy\.deepcopy"):
        cache.crop(-2)


def test_caches_that_do_not_fit_are_refused(student):
    other = student_of("based" if student.config.layers[1]["mixer"] != "based" else "gla", window=0)
    with pytest.raises(RuntimeError, match="filled by a converted model"):
        TEACHER(IDS[:, :1], **{CACHE: filled(other, IDS)})
    with pytest.raises(ValueError, match="another model's keys; pass a fresh cache"):
        student(IDS[:, :1], **{CACHE: filled(TEACHER, IDS)})
    for rows in (1, 3):
        for new in (1, 4):
            with pytest.raises((ValueError, RuntimeError), match=rf"holds {rows} rows, and the input has 2|[Ss]izes"):
                student(IDS[:, :new], **{CACHE: filled(student, tokens(rows))})


def test_a_quantized_cache_is_refused(student):
    cache = DynamicCache(config=student.config)
    cache.__class__ = type("Given", (QuantizedCache,), {})  # whose backends are packages of their own
    with pytest.raises(ValueError, match="pass a DynamicCache or a StaticCache"):
        student.generate(IDS, **{CACHE: cache}, **GREEDY)


def test_a_static_cache_that_is_too_short():
    student = student_of(keep="heads:0.1")
    with pytest.raises(ValueError, match="made for 8 tokens, and 12 came"):
        student(IDS, **{CACHE: StaticCache(config=student.config, max_cache_len=8)})


def test_where_every_layer_is_softmax_nothing_is_refused():
    student = convert(TEACHER, "gla", keep_softmax=[0, 1])
    plain = student.generate(IDS[:1], **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": TEACHER}):
        assert torch.equal(student.generate(IDS[:1], **options, **GREEDY), plain)
    assert torch.equal(TEACHER.generate(IDS[:1], assistant_model=student, **GREEDY), plain)
    cache = filled(student, plain)
    cache.crop(-4)
    assert torch.equal(student.generate(plain[:, :-3], **{CACHE: cache}, **{**GREEDY, "max_new_tokens": 3}), plain)
