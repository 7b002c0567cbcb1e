"""Decoding in place, recorded and compiled: the same tokens as step by step, from the same few tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake, tiny_teacher
from recorder import recorder_into
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from linearize.convert import convert
from linearize.modeling import decoding
from linearize.modeling.cache import CACHE

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}  # past the window of 8, and past its ring
COMPILED = CompileConfig(fullgraph=True, mode=None)
COMPILED._compile_all_devices = True
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def student_of(mixer, window=8, keep=None, family="llama", layers=2, **options):
    teacher = tiny_teacher(family, num_hidden_layers=layers)
    heads, _, bound = (keep or "").partition(" in ")
    bound = int(bound) if bound else None
    return shake(convert(teacher, mixer, window=window, keep_softmax=heads, keep_window=bound, mixer_options=options))


def prompt(batch=2, length=6):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def recordings(monkeypatch):
    """Lets `generate` record on the CPU; the list of what was recorded."""
    made = []
    monkeypatch.setattr(decoding, "record", recorder_into(made))
    monkeypatch.setattr(decoding, "records_on", lambda device: True)
    return made


@pytest.mark.parametrize("window", [8, 0])
def test_recorded_steps_give_the_same_tokens(mixer_name, window, recordings):
    student, ids = student_of(mixer_name, window), prompt()
    plain = student.generate(ids, attention_mask=PADDED, disable_compile=True, **GREEDY)
    assert not recordings
    assert torch.equal(student.generate(ids, attention_mask=PADDED, **GREEDY), plain)
    assert len(recordings) == 1
    torch.manual_seed(0)
    sampling = {**GREEDY, "do_sample": True, "return_dict_in_generate": True, "output_logits": True, "top_k": 20}
    recorded = student.generate(ids, attention_mask=PADDED, num_return_sequences=2, **sampling)
    torch.manual_seed(0)
    plain = student.generate(ids, attention_mask=PADDED, num_return_sequences=2, disable_compile=True, **sampling)
    assert torch.equal(recorded.sequences, plain.sequences)
    assert relative_error(torch.stack(recorded.logits, 1), torch.stack(plain.logits, 1)) < 1e-5
    assert len(recordings) == 2
    for ours, theirs in zip(recorded[CACHE].layers, plain[CACHE].layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 19
        torch.testing.assert_close(ours.tensors, theirs.tensors)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("keep", [None, "0", "heads:0.1,1.2,1.3", "heads:0.1,1.2 in 9"])
def test_a_static_cache_is_recorded(keep, gains, recordings):
    """Kept heads and layers too: their keys have a place from the start."""
    student, ids = student_of("gla", keep=keep, gains=gains), prompt()
    for mask in (torch.ones_like(ids), PADDED):
        plain = student.generate(ids, attention_mask=mask, disable_compile=True, **GREEDY)
        static = student.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        assert torch.equal(static, plain)
    assert len(recordings) == 2


def test_a_cache_goes_on_after_a_recording(recordings):
    student, ids = student_of("gla"), prompt()
    plain = student.generate(ids, disable_compile=True, **{**GREEDY, "max_new_tokens": 24})
    half = student.generate(ids, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 12})
    rest = student.generate(half.sequences, **{CACHE: half[CACHE]}, **{**GREEDY, "max_new_tokens": 12})
    assert torch.equal(rest, plain)
    assert len(recordings) == 2


def test_what_ends_early_stays_padded(recordings):
    student, ids = student_of("retention"), prompt()
    plain = student.generate(ids, disable_compile=True, **GREEDY)
    end = int(plain[0, 9])
    options = {**GREEDY, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **options), student.generate(ids, disable_compile=True, **options))


@pytest.mark.parametrize("case", ["switch", "environment", "beams", "kept heads", "kept layer", "hidden states", "hook",
                                  "training", "no cache", "sync"])  # fmt: skip
def test_where_nothing_is_recorded(case, recordings, monkeypatch):
    keep = {"kept heads": "heads:0.1", "kept layer": "0"}.get(case)
    student, ids, options = student_of("mamba2", keep=keep), prompt(), dict(GREEDY)
    context = contextlib.nullcontext()
    if case == "switch":
        student.decode_graphs = False
    elif case == "environment":
        monkeypatch.setenv("LINEARIZE_CUDA_GRAPHS", "0")
    elif case == "beams":
        options["num_beams"] = 2
    elif case == "hidden states":
        options |= {"output_hidden_states": True, "return_dict_in_generate": True}
    elif case == "hook":
        student.model.layers[0].register_forward_hook(lambda module, args, out: None)
    elif case == "training":
        student.train()
    elif case == "no cache":
        options["use_cache"] = False
    elif case == "sync":
        forward = student.model.norm.forward
        student.model.norm.forward = lambda x: forward(x) * (1.0 if bool(x.sum() > -1e9) else 0.0)
        context = pytest.warns(UserWarning, match="without a CUDA graph, which is slower: a value was looked at")
    plain = student.generate(ids, disable_compile=True, **options)
    with context:
        recorded = student.generate(ids, **options)
    if case == "hidden states":
        assert len(recorded.hidden_states) == len(plain.hidden_states) == 14
    else:
        assert torch.equal(recorded, plain)
    assert len(recordings) == (1 if case == "sync" else 0)


@pytest.mark.parametrize("window", [8, 0])
@torch.no_grad()
def test_states_stay_where_they_are(mixer_name, window):
    """From the first piece on, no tensor of the cache is made anew."""
    student, ids = student_of(mixer_name, window), prompt(2, 30)
    cache = student(ids[:, :3], use_cache=True)[CACHE]
    before = [dict(layer.tensors) for layer in cache.layers]
    for start, end in ((3, 4), (4, 5), (5, 17), (17, 18), (18, 30)):
        student(ids[:, start:end], **{CACHE: cache})
    for layer, tensors in zip(cache.layers, before, strict=True):
        assert layer.tensors.keys() == tensors.keys()
        assert all(layer.tensors[name] is tensor for name, tensor in tensors.items())


def test_modes_may_change_between_steps():
    """A state that inference mode made cannot be written outside it, and one that a gradient needs not at all."""
    student, ids = student_of("linear"), prompt(2, 12)
    with torch.no_grad():
        whole = student(ids).logits
    with torch.inference_mode():
        out = student(ids[:, :8], use_cache=True)
    with torch.no_grad():
        steps = [student(ids[:, t : t + 1], **{CACHE: out[CACHE]}).logits for t in (8, 9)]
    steps += [student(ids[:, t : t + 1], **{CACHE: out[CACHE]}).logits for t in (10, 11)]
    steps[-1].sum().backward()
    assert relative_error(torch.cat(steps, 1), whole[:, 8:]) < 1e-5


def compiled(student, ids, backend="eager", **options):
    """Tokens of `generate` with a static cache, compiled whole; no break, one graph for all steps."""
    torch._dynamo.reset()
    counters.clear()
    COMPILED.backend = backend
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = student.generate(
            ids.to(student.device), cache_implementation="static", compile_config=COMPILED, **{**GREEDY, **options}
        )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    return out


@pytest.mark.parametrize("window", [8, 0])
def test_compiled_static_steps_give_the_same_tokens(mixer_name, window):
    student, ids = student_of(mixer_name, window, layers=1), prompt()
    plain = student.generate(ids, attention_mask=PADDED, **GREEDY)
    assert torch.equal(compiled(student, ids, attention_mask=PADDED), plain)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_compiled_static_families(family):
    student, ids = student_of("mamba2", family=family, state_heads="query"), prompt()
    plain = student.generate(ids, attention_mask=PADDED, **GREEDY)
    assert torch.equal(compiled(student, ids, "aot_eager", attention_mask=PADDED), plain)
    with torch._dynamo.config.patch(error_on_recompile=True):  # the next call has another cache, and no other code
        student.generate(ids[:, 1:], cache_implementation="static", compile_config=COMPILED, **GREEDY)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mixer", ["linear", "gated_delta"])
@torch.no_grad()
def test_a_compiled_step_is_made_of_kernels(mixer, monkeypatch):
    """With the kernels, a swapped layer's step is two operators that write its state, and what fuses around them."""
    student, ids = student_of(mixer, layers=1), prompt(2, 12)
    cache = StaticCache(config=student.config.parent_config, max_cache_len=32)
    student(ids[:, :8], **{CACHE: cache})
    states = [{name: t.clone() for name, t in layer.tensors.items()} for layer in cache.layers]
    plain = [student(ids[:, t : t + 1], **{CACHE: cache}).logits for t in range(8, 12)]
    for layer, tensors in zip(cache.layers, states, strict=True):
        for name, tensor in tensors.items():
            layer.tensors[name].copy_(tensor)
    operators = []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if "linearize" in str(node.target))
        return graph.forward

    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    torch._dynamo.reset()
    step = torch.compile(student, backend=backend, fullgraph=True)
    for t, logits in zip(range(8, 10), plain, strict=False):
        ours = step(ids[:, t : t + 1], position_ids=torch.full((2, 1), t), **{CACHE: cache}).logits
        assert relative_error(ours, logits) < 1e-5
    assert len(operators) == 2 and "window_step" in operators[0] and "linear_step" in operators[1], operators


@pytest.mark.parametrize("keep", [None, "0", "heads:0.1,1.2,1.3"])
@torch.no_grad()
def test_a_static_cache_holds_the_same_states(keep):
    student, ids = student_of("mamba2", keep=keep), prompt(2, 20)
    cache = StaticCache(config=student.config.parent_config, max_cache_len=24)
    for again in range(2):
        whole = student(ids).logits
        logits = [
            student(ids[:, start:end], **{CACHE: cache}).logits for start, end in ((0, 9), (9, 10), (10, 18), (18, 20))
        ]
        assert relative_error(torch.cat(logits, 1), whole) < 1e-5
        assert int(cache.get_seq_length()) == 20
        cache.reset()
        ids = ids.flip(1) if again == 0 else ids


@pytest.mark.parametrize("keep", ["0", "heads:0.1,1.2,1.3"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_static_with_softmax_kept(keep, family):
    # Three layers: a later swapped one must read the mask where the first did.
    student, ids = student_of("retention", keep=keep, family=family, layers=3), prompt()
    for mask in (torch.ones_like(ids), PADDED):
        plain = student.generate(ids, attention_mask=mask, **GREEDY)
        static = student.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        assert torch.equal(static, plain)
    if family == "llama" or keep != "0":  # transformers' own sliding layer counts in Python, which compiles anew
        assert torch.equal(compiled(student, ids, attention_mask=PADDED), plain)


@pytest.mark.parametrize(("family", "keep"), [("mistral", "0"), ("gemma3", "0,2")])
def test_a_prompt_in_pieces_past_a_static_window(family, keep):
    """The mask of a sliding layer that is full has no column for each place."""
    student = student_of("gla", keep=keep, family=family, layers=3)
    ids = prompt(2, 30)
    for mask in (torch.ones_like(ids), torch.cat([PADDED, torch.ones(2, 24, dtype=torch.long)], dim=1)):
        options = {"attention_mask": mask, "disable_compile": True, **GREEDY}
        plain = student.generate(ids, **options)
        static = student.generate(ids, cache_implementation="static", prefill_chunk_size=16, **options)
        assert torch.equal(static, plain)


@pytest.mark.parametrize("mixer", [*MIXER_NAMES, "kept"])
def test_training_compiles_whole(mixer):
    student = student_of("gla", keep="heads:0.1") if mixer == "kept" else student_of(mixer, layers=1)
    student, ids = student.train(), prompt(2, 20)
    torch._dynamo.reset()
    loss = torch.compile(student, backend="eager", fullgraph=True)(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, student(ids, labels=ids, use_cache=False).loss)
    loss.backward()


@torch.no_grad()
def test_compiled_code_refuses_what_it_cannot_look_at():
    student, ids = student_of("gla"), prompt(1, 20)
    torch._dynamo.reset()
    forward = torch.compile(student, backend="eager", fullgraph=True)
    positions = torch.arange(20).unsqueeze(0)
    assert relative_error(forward(ids, position_ids=positions, use_cache=False).logits, student(ids).logits) < 1e-5
    with pytest.raises(RuntimeError, match="position_ids restart"):
        forward(ids, position_ids=positions % 11, use_cache=False)


@pytest.mark.parametrize("window", [8, 0])
@pytest.mark.parametrize("device", [pytest.param("gpu", marks=gpu)])
def test_a_cuda_graph_gives_the_same_tokens(mixer_name, window, device, monkeypatch):
    made = []
    record = decoding.record
    monkeypatch.setattr(decoding, "record", lambda *arguments: made.append(1) or record(*arguments))
    student, ids, mask = student_of(mixer_name, window).cuda(), prompt().cuda(), PADDED.cuda()
    for batch in (slice(0, 1), slice(0, 2)):
        options = {**GREEDY, "attention_mask": mask[batch], "return_dict_in_generate": True, "output_logits": True}
        plain = student.generate(ids[batch], disable_compile=True, **options)
        recorded = student.generate(ids[batch], **options)
        assert torch.equal(recorded.sequences, plain.sequences)
        assert relative_error(torch.stack(recorded.logits, 1), torch.stack(plain.logits, 1)) < 1e-5
        for ours, theirs in zip(recorded[CACHE].layers, plain[CACHE].layers, strict=True):
            torch.testing.assert_close(ours.tensors, theirs.tensors)
    assert len(made) == 2


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=gpu)])
def test_a_cuda_graph_on_the_reference(device, monkeypatch):
    """Without the kernels too: remote code where linearize is not installed."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "reference")
    student, ids = student_of("based").cuda(), prompt().cuda()
    assert torch.equal(student.generate(ids, **GREEDY), student.generate(ids, disable_compile=True, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [pytest.param("gpu", marks=gpu)])
def test_the_gpu_follows_the_cpu(mixer_name, dtype, device):
    """Kernels in prefill and in steps against the reference in fp32."""
    student, ids = student_of(mixer_name), prompt(2, 40)
    with torch.no_grad():
        exact = student(ids).logits
        cast = student.to(device="cuda", dtype=dtype)
        out = cast(ids[:, :20].cuda(), use_cache=True)
        logits = [out.logits]
        for t in range(20, 40):
            logits.append(cast(ids[:, t : t + 1].cuda(), **{CACHE: out[CACHE]}).logits)
    tolerance = 1e-3 if dtype == torch.float32 else 6e-2
    assert relative_error(torch.cat(logits, 1).cpu(), exact) < tolerance


@pytest.mark.parametrize(
    "case", [*MIXER_NAMES, "weighed", "no window", "graphs of torch.compile", "kept heads", "kept in 9", "kept layer"]
)
@pytest.mark.parametrize("device", [pytest.param("gpu", marks=gpu)])
def test_a_static_cache_on_the_gpu(case, device, monkeypatch):
    """transformers' own compilation, recorded by us or by torch.compile, for one cache and the next."""
    made = []
    record = decoding.record
    monkeypatch.setattr(decoding, "record", lambda *arguments: made.append(1) or record(*arguments))
    torch._dynamo.reset()
    mixer = case if case in MIXER_NAMES else "gla"
    keeps = {"kept heads": "heads:0.1,1.2,1.3", "kept in 9": "heads:0.1,1.2,1.3 in 9", "kept layer": "0"}
    options = {"gains": True} if case == "weighed" else {}
    student = student_of(mixer, 0 if case == "no window" else 8, keeps.get(case), **options).cuda()
    ids, mask = prompt().cuda(), PADDED.cuda()
    student.decode_graphs = case != "graphs of torch.compile"
    plain = student.generate(ids, attention_mask=mask, disable_compile=True, **GREEDY)
    for _ in range(2):
        static = student.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        assert torch.equal(static, plain)
    assert len(made) == (2 if student.decode_graphs else 0)
