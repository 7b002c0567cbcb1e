"""The benchmarks on a CPU with tiny shapes: rows, merging, errors, caches that stand at a context, pictures, tables."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import shake, tiny_config, tiny_teacher
from transformers import DynamicCache
from verbs import done, run

from linearize.bench import (
    bench_kernels,
    bench_model,
    caches,
    children,
    figures,
    kernels,
    model,
    providers,
    tables,
    timing,
)
from linearize.bench.caches import PreallocatedLayer, cache_bytes, filled
from linearize.bench.ops import Shape, backward_bytes, forward_bytes, make_inputs, trained
from linearize.bench.options import OPS, KernelOptions, ModelOptions
from linearize.convert import convert
from linearize.modeling import reference
from linearize.modeling.cache import CACHE

ROOT = Path(__file__).parents[1]
ROW = {
    "op",
    "provider",
    "tokens",
    "forward_ms",
    "forward_backward_ms",
    "forward_peak_gib",
    "forward_backward_peak_gib",
    "forward_floor_ms",
    "forward_backward_floor_ms",
    "commit",
    "versions",
    "copy_gbps",
}
SMALL = ["--device", "cpu", "--heads", "2", "--head-dim", "16"]
SHAPE = Shape(batch=2, tokens=40, heads=4, kv_heads=2, head_dim=16, dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few repeats: what is timed is not what is tested."""
    monkeypatch.setattr(timing, "_repeats", lambda milliseconds: 2)
    monkeypatch.setattr(timing, "_WARM_MS", 0.0)
    monkeypatch.setattr(model, "REPEATS", 1)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny_config().save_pretrained(folder)
    return folder / "config.json"


# -- bench kernels


def test_kernels_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_COMMIT", "first")
    monkeypatch.setattr("sys.argv", ["linearize", "bench"])
    ops = ["--ops", "linear,window,softmax,decode", "--decode-batch", "2"]
    shown = done("bench", "kernels", *SMALL, "--tokens", "48,32", *ops, "-o", tmp_path)
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert results["command"].startswith("linearize ") and results["commit"] == "first" and results["copy_gbps"] > 0
    assert results["dtype"] == "float32" and results["versions"]["torch"] == torch.__version__
    rows = {(row["op"], row["provider"], row["tokens"]): row for row in results["rows"]}
    assert {(op, tokens) for op, _, tokens in rows} == {
        (o, t) for o in ("linear", "window", "softmax") for t in (32, 48)
    }
    for row in rows.values():
        assert set(row) >= ROW and row["forward_peak_gib"] is None
        assert (row["forward_ms"] is None) == ("error" in row)  # cuDNN has no kernel for a CPU
    ours = rows["linear", "linearize", 32]
    assert ours["forward_backward_ms"] > 0 and ours["path"] == "reference"
    assert rows["softmax", "sdpa-flash", 32]["forward_backward_ms"] > 0
    assert results["decode"][0]["ms"] > 0 and results["decode"][0]["state_bytes"] == 2 * 2 * 16 * 16 * 4
    assert "linear linearize" in shown and "softmax sdpa-flash" in shown and "one step of decoding" in shown
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")

    # again: refused, then merged, by the same shape alone
    again = ["kernels", *SMALL, "--tokens", "48", "--ops", "window", "-o", tmp_path]
    refused = run("bench", *again)
    assert refused.exit_code == 2 and "--merge" in refused.stderr
    other = run("bench", *again, "--merge", "--heads", "4")
    assert other.exit_code == 2 and "heads 2" in other.stderr
    monkeypatch.setenv("LINEARIZE_COMMIT", "second")
    merged = json.loads(done("bench", *again, "--merge", "--json"))
    assert merged == json.loads((tmp_path / "kernels.json").read_text())
    assert [(r["op"], r["provider"], r["tokens"]) for r in merged["rows"]] == list(rows)
    assert {r["commit"] for r in merged["rows"] if (r["op"], r["tokens"]) == ("window", 48)} == {"second"}
    assert {r["commit"] for r in merged["rows"] if (r["op"], r["tokens"]) != ("window", 48)} == {"first"}
    assert merged["decode"] == results["decode"] and merged["tokens"] == [32, 48]


@pytest.mark.parametrize(
    "code, message, args",
    [
        (2, "--ops: there is no 'lineer'", ["--ops", "lineer"]),
        (2, "--providers: there is no 'flash'", ["--providers", "flash"]),
        (2, "--tokens wants whole numbers", ["--tokens", "2k"]),
        (2, "--tokens must be at least 1", ["--tokens", "0"]),
        (2, "--kv-heads 3 does not divide --heads 2", ["--kv-heads", "3"]),
        (2, "--no-timing leaves nothing", ["--no-timing"]),
        (2, "--merge needs -o/--out", ["--merge", "--ops", "linear"]),
        (2, "is a file", ["-o", "{file}"]),
        (1, "nothing to measure", ["--ops", "linear", "--providers", "sdpa-flash"]),
        (1, "holds no results", ["-o", "{broken}", "--merge"]),
        (2, "--dtype: unknown", ["--dtype", "int3"]),
    ],
)
def test_what_kernels_refuses(tmp_path, code, message, args):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kernels.json").write_text("[]")
    places = {"{file}": tmp_path / "file", "{broken}": tmp_path / "broken"}
    result = run("bench", "kernels", *SMALL, *(places.get(arg, arg) for arg in args))
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == code and last.startswith("Error: ") and message in last and result.stdout == ""


def test_a_provider_that_fails_is_a_row(monkeypatch, tmp_path):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q * 2

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("refused on this version\nand a second line")

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("tried to allocate much")

    def missing():
        raise ImportError("nowhere to be found")

    fakes = [
        providers.Provider("linear", "linearize", lambda: lambda x: lambda: x["q"] + x["k"]),
        providers.Provider("linear", "fla", lambda: lambda x: lambda: NoBackward.apply(x["q"])),
        providers.Provider("gla", "linearize", lambda: lambda x: out_of_memory),
        providers.Provider("gla", "fla", missing),
        providers.Provider("softmax", "sdpa-flash", lambda: lambda x: lambda: x["q"], quadratic=True, triton=False),
    ]
    monkeypatch.setattr(kernels, "ALL", fakes)
    lines: list[str] = []
    options = KernelOptions(tokens="16,32", heads=2, head_dim=16, softmax_max_tokens=16, ops="linear,gla,softmax")
    results = bench_kernels(options, out=tmp_path, say=lines.append)
    rows = {(row["op"], row["provider"], row["tokens"]): row for row in results["rows"]}
    assert ("softmax", "sdpa-flash", 16) in rows and ("softmax", "sdpa-flash", 32) not in rows
    refused = rows["linear", "fla", 16]
    assert refused["forward_ms"] > 0 and refused["forward_backward_ms"] is None
    assert refused["error"] == "RuntimeError: refused on this version" and refused["difference"] > kernels.SAME
    assert (
        rows["gla", "linearize", 32]["error"] == "out of memory" and rows["gla", "linearize", 32]["forward_ms"] is None
    )
    said = "\n".join(lines)
    assert "left out gla of fla: ImportError: nowhere" in said and "linear of fla differs" in said
    shown = tables.kernels_table(results)
    assert "gla linearize 16: out of memory" in shown and "refused on this version" in shown
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == len(rows)


def test_only_forward():
    results = bench_kernels(KernelOptions(tokens="32", heads=2, head_dim=16, ops="retention", only_forward=True))
    [row] = results["rows"]
    assert row["forward_ms"] > 0 and row["forward_backward_ms"] is None and "error" not in row


@pytest.mark.parametrize("op", OPS)
def test_inputs_and_floors(op):
    inputs = make_inputs(op, SHAPE)
    again = make_inputs(op, SHAPE)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    wanted = {"mamba2": {"log_decay"}, "gla": {"log_decay"}, "gated_delta": {"log_decay", "beta"}}.get(op, set())
    assert {name for name, tensor in inputs.items() if tensor.requires_grad} == {"q", "k", "v"} | wanted
    if "log_decay" in inputs:
        assert inputs["log_decay"].max() <= 0
        assert inputs["log_decay"].shape == (2, 40, 2, 16)[: 4 if op == "gla" else 3]
    out = torch.empty(2, 40, 4, 16)
    tokens = 2 * 40
    widths = {"q": 4 * 16, "k": 2 * 16, "v": 2 * 16}  # keys of based have min(16, D) channels
    gates = {"mamba2": 2, "gla": 2 * 16, "gated_delta": 4}.get(op, 0)
    read = 4 * tokens * (sum(widths.values()) + gates)
    written = 4 * tokens * 4 * 16
    constant = 4 * 2 if op == "retention" else 0
    assert forward_bytes(inputs, out) == read + written + constant
    assert backward_bytes(inputs, out) == 2 * read + written + constant
    assert len(trained(inputs)) == 3 + len(wanted)


@pytest.mark.parametrize("op", [op for op in OPS if op != "softmax"])
def test_ours_is_the_reference_with_grouped_heads(op):
    inputs = make_inputs(op, SHAPE)
    provider = providers.find(op, "linearize")
    out = provider.load()(inputs)()
    out.sum().backward()
    assert out.shape == (2, 40, 4, 16) and all(tensor.grad is not None for tensor in trained(inputs))
    assert providers.path_taken(provider, inputs) == "reference"
    if op == "based":
        q, k, v = (inputs[name] for name in "qkv")
        weight = (q.permute(0, 2, 1, 3) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1)).tril()
        weight = (1 + weight + weight.square() / 2).tril()
        expected = weight / weight.sum(-1, keepdim=True) @ v.repeat_interleave(2, 2).transpose(1, 2)
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def stand_in_peers(monkeypatch) -> None:
    """The peers' functions by their names and keywords, computed by the reference."""

    def checked(q, k, v):
        assert q.shape[2] == k.shape[2] == v.shape[2]

    def linear(q, k, v, g=None, scale=None, normalize=False):
        checked(q, k, v)
        assert scale == 1.0 and not normalize
        return reference.linear_attention(q, k, v, log_decay=g)[0], None

    def retention(q, k, v, scale=None):
        decay = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2]).double())).log().float()
        return linear(q, k, v, g=decay.expand(*q.shape[:3]), scale=scale)

    def based(q, k, v, scale=None, use_norm=True):
        out, z, _ = reference.taylor_attention(q * scale, k, v)
        return out / (z[..., None] + 1e-6) if use_norm else out

    def delta(q, k, v, g, beta, scale=None):
        assert scale == 1.0
        return providers.dispatch.delta_rule(q, k, v, beta=beta, log_decay=g)

    def scan(x, dt, A, B, C, chunk_size):
        return reference.linear_attention(C, B, x * dt[..., None], log_decay=dt * A)[0]

    modules = {
        "fla.ops.linear_attn": {"chunk_linear_attn": linear},
        "fla.ops.retention": {"chunk_retention": retention},
        "fla.ops.simple_gla": {"chunk_simple_gla": linear},
        "fla.ops.gla": {"chunk_gla": linear},
        "fla.ops.based": {"fused_chunk_based": based, "parallel_based": based},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": delta},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": scan},
    }
    for name, functions in modules.items():
        for parent in (name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def test_peers_are_asked_for_the_same_function(monkeypatch):
    stand_in_peers(monkeypatch)
    for heads in (2, 4):
        options = KernelOptions(
            tokens="24", heads=4, kv_heads=heads, head_dim=16, providers="linearize,fla,fla-parallel,mamba_ssm"
        )
        compared = [row for row in bench_kernels(options)["rows"] if row["provider"] != "linearize"]
        assert len(compared) == 8 and all("error" not in row and row["forward_backward_ms"] > 0 for row in compared)
        for row in compared:
            if (row["op"], heads) == ("retention", 2):
                assert "difference" not in row  # the peer has a decay a query head
            else:
                assert row["difference"] < 1e-4, row


def test_cold_starts_and_children_that_fail(tmp_path):
    shown = json.loads(
        done("bench", "kernels", *SMALL, "--tokens", "16", "--ops", "linear", "--no-timing", "--cold-start", "--json")
    )
    [row] = [row for row in shown["cold_start"] if row["provider"] == "linearize"]
    assert 0 < row["forward_s"] < row["forward_backward_s"] and "error" not in row and row["jobs"] == 1
    assert shown["rows"] == [] and "cold start" in tables.kernels_table(shown)


def test_a_child_that_cannot_run(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    shape = Shape(batch=1, tokens=16, heads=1, kv_heads=1, head_dim=16, dtype="float32", device="cpu")
    children.warm_cache([providers.find("linear", "linearize")], shape, backward=True, jobs=2, say=lines.append)
    assert "the child ended with code 1" in lines[-1]
    [row] = children.cold_starts([providers.find("gla", "linearize")], shape, backward=True, jobs=1, say=lines.append)
    assert (row["op"], row["provider"]) == ("gla", "linearize") and "code 1" in row["error"]


def test_repeats(monkeypatch):
    monkeypatch.undo()
    assert [timing._repeats(ms) for ms in (0.01, 1.0, 20.0, 100.0, 925.0)] == [1000, 200, 10, 10, 3]
    clock = timing.Clock("cpu")
    calls: list[str] = []
    assert clock.milliseconds(lambda: calls.append("run"), lambda: calls.append("before")) >= 0
    assert calls[:4] == ["before", "run"] * 2 and clock.peak_bytes(lambda: None) is None


# -- bench model


def test_model_of_a_config(config_file, tmp_path):
    options = ["--window", "8", "--contexts", "1,24,96", "--batch", "2", "--new-tokens", "32", "--device", "cpu"]
    more = ["--keep-softmax", "heads:1.0", "--teacher-max-prefill", "24", "-o", tmp_path]
    shown = done("bench", "model", "--config", config_file, "--to", "linear", *options, *more)
    results = json.loads((tmp_path / "model.json").read_text())
    assert results["mixers"] == ["linear"] and results["mixer_options"] == {"window": 8, "sinks": 1}
    assert results["parameters"]["student"] > results["parameters"]["teacher"]
    rows = {(row["model"], row["context"]): row for row in results["rows"]}
    assert list(rows) == [(name, length) for length in (1, 24, 96) for name in ("teacher", "student")]
    for (name, context), row in rows.items():
        assert "error" not in row and row["decode_ms"] > 0 and row["decode_peak_gib"] is None
        assert row["decode_tokens_per_second"] == pytest.approx(2 * 1e3 / row["decode_ms"])
        assert (row["prefill_s"] is None) == (name == "teacher" and context > 24)
        heads = 2 * 2 if name == "teacher" else 1  # key heads of both layers, of 16 channels in fp32
        assert row["kv_bytes"] == 2 * 2 * heads * 16 * 4 * context
    assert rows["teacher", 96]["state_bytes"] == 0
    assert rows["student", 24]["state_bytes"] == rows["student", 96]["state_bytes"] > 0
    [ahead] = results["overtakes"]
    assert set(ahead) == {"batch", "decode", "prefill", "cache"}
    assert "the student is ahead in: decoding" in shown and "teacher" in shown
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_model_of_folders(tmp_path):
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    convert(teacher, "gla", window=4).save_pretrained(tmp_path / "student")
    args = [
        tmp_path / "student",
        "--teacher",
        tmp_path / "teacher",
        "--contexts",
        "24",
        "--batch",
        "1",
        "--device",
        "cpu",
    ]
    results = json.loads(done("bench", "model", *args, "--new-tokens", "32", "--no-prefill", "--json"))
    assert [row["model"] for row in results["rows"]] == ["teacher", "student"]
    again = [*args, "--new-tokens", "32", "-o", tmp_path / "out"]
    one = json.loads(done("bench", "model", *again, "--models", "student", "--json"))
    assert [row["model"] for row in one["rows"]] == ["student"] and one["overtakes"] == [{"batch": 1}]
    refused = run("bench", "model", *again)
    assert refused.exit_code == 2 and "--merge" in refused.stderr
    both = json.loads(done("bench", "model", *again, "--merge", "--models", "teacher", "--json"))
    assert [row["model"] for row in both["rows"]] == ["teacher", "student"] and both["rows"][1] == one["rows"][0]
    assert both == json.loads((tmp_path / "out" / "model.json").read_text()) and "decode" in both["overtakes"][0]
    other = run("bench", "model", *again, "--merge", "--dtype", "bfloat16")
    assert other.exit_code == 2 and "dtype float32" in other.stderr
    assert all(row["prefill_s"] is None and row["decode_ms"] > 0 for row in results["rows"])
    assert "prefill" not in results["overtakes"][0]


@pytest.mark.parametrize(
    "code, message, args",
    [
        (2, "give STUDENT and --teacher MODEL", []),
        (2, "give STUDENT and --teacher MODEL", ["student"]),
        (2, "leave STUDENT and --teacher out", ["student", "--config", "{config}", "--to", "gla"]),
        (2, "--config needs --to", ["--config", "{config}"]),
        (2, "--window goes with --config", ["student", "--teacher", "t", "--window", "8"]),
        (2, "--mixer-option goes with --config", ["student", "--teacher", "t", "--mixer-option", "a=1"]),
        (2, "there is no mixer 'glla'", ["--config", "{config}", "--to", "glla"]),
        (2, "--new-tokens must be at least 2", ["--config", "{config}", "--to", "gla", "--new-tokens", "1"]),
        (2, "--compile: transformers compiles decoding on a GPU", ["--config", "{config}", "--to", "gla", "--compile"]),
        (1, "nowhere", ["./nowhere", "--teacher", "./nowhere"]),
    ],
)
def test_what_model_refuses(config_file, code, message, args):
    args = [config_file if arg == "{config}" else arg for arg in args]
    result = run("bench", "model", *args, "--device", "cpu")
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == code and last.startswith("Error: ") and message in last


def test_a_preallocated_cache_is_the_stock_one():
    teacher = tiny_teacher()
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    stock, ours = DynamicCache(config=teacher.config), DynamicCache(config=teacher.config)
    with torch.no_grad():
        teacher(ids[:, :1], **{CACHE: ours})
        ours.layers = [PreallocatedLayer(layer, 0, 16) for layer in ours.layers]
        for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
            expected = teacher(piece, **{CACHE: stock}).logits
            assert torch.equal(teacher(piece, **{CACHE: ours}).logits, expected)
    assert ours.get_seq_length() == 12 and cache_bytes(ours, 12) == cache_bytes(stock, 12)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["teacher", "linear", "gla", "kept"])
def test_decoding_goes_on_from_the_context(family, name):
    """Positions continue, every run from the same cache gives the same tokens, and the cache stands where it should."""
    built = tiny_teacher(family)
    if name != "teacher":
        kept = {"keep_softmax": "0"} if name == "kept" else {"keep_softmax": "heads:1.0"} if name == "gla" else {}
        built = shake(convert(built, "linear" if name == "kept" else name, window=8, **kept))
    context = 70
    seen: list[list[int]] = []
    hook = built.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["position_ids"] if kwargs else args[1])[0].tolist()),
        with_kwargs=True,
    )
    fresh = filled(built, 2, context - 1, 6)
    ids = torch.randint(0, 128, (2, context), generator=torch.Generator().manual_seed(1))
    seen.clear()
    texts = []
    with model._greedy(built):
        for _ in range(2):
            cache = fresh()
            assert cache.get_seq_length() == context - 1
            out = built.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, max_new_tokens=5)
            texts.append(out[:, context:])
            assert cache.get_seq_length() == context + 4
    hook.remove()
    assert seen == [[place] for place in range(context - 1, context + 4)] * 2
    assert texts[0].shape == (2, 5) and torch.equal(*texts)


def test_a_short_context_is_read_whole(monkeypatch):
    """Where the context fits into what is read, decoding from the filled cache is that of a prompt."""
    student = shake(convert(tiny_teacher(), "retention", window=4))
    ids = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(caches.torch, "randint", lambda *args, **kwargs: ids[:, :-1])
    with model._greedy(student):
        expected = student.generate(ids, max_new_tokens=6)
        mask = torch.ones_like(ids)
        out = student.generate(ids, attention_mask=mask, **{CACHE: filled(student, 1, 19, 6)()}, max_new_tokens=6)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["teacher", "linear"])
@pytest.mark.parametrize("past", [0, 60])
def test_static_caches_stand_at_the_context(name, past):
    built = tiny_teacher()
    if name != "teacher":
        built = shake(convert(built, name, window=8))
    fresh = filled(built, 2, past, 8, static=True)
    ids = torch.zeros(2, past + 1, dtype=torch.long)
    texts = []
    with model._greedy(built):
        for _ in range(2):
            cache = fresh()
            assert int(cache.get_seq_length()) == past
            mask = torch.ones_like(ids)
            texts.append(built.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4))
            assert int(cache.get_seq_length()) == past + 4
    assert texts[0].shape == (2, past + 5) and torch.equal(*texts)
    state, kv = cache_bytes(fresh(), past)
    assert kv == 2 * 2 * (4 if name == "teacher" else 0) * past * 16 * 4
    assert (state > 0) == (name != "teacher")


def test_a_time_lost_in_the_noise_is_none(config_file, monkeypatch):
    assert model._each([1.0, 1.1, 1.2], [3.0, 3.1, 3.3], 20) == pytest.approx(0.1)
    assert model._each([1.0, 1.1, 1.2], [1.0, 1.05, 1.1], 20) is None
    assert model._each([1.0, 1.1, 1.2], [1.0, 1.15, 1.3], 20) is None
    monkeypatch.setattr(model, "_each", lambda *args: None)
    shown = ["--config", config_file, "--to", "gla", "--contexts", "8,16", "--batch", "1", "--new-tokens", "2"]
    results = json.loads(done("bench", "model", *shown, "--no-prefill", "--device", "cpu", "--json"))
    for row in results["rows"]:
        assert row["decode_ms"] is None and row["decode_tokens_per_second"] is None and row["kv_bytes"] is not None
        assert "noise" in row["error"] and "--new-tokens" in row["error"]
    assert "decode" not in results["overtakes"][0] and "cache" in results["overtakes"][0]


def test_where_the_student_overtakes():
    assert model._ahead_from([(1, -2.0), (11, -1.0), (21, 1.0)]) == 16.0
    assert model._ahead_from([(1, 1.0), (11, -1.0), (21, 3.0)]) == 13.5
    assert model._ahead_from([(4, 1.0), (8, 2.0)]) == 4.0
    assert model._ahead_from([(4, 1.0), (8, 0.0)]) is None
    rows = [
        {"model": name, "batch": 1, "context": length, "decode_ms": ms, "prefill_s": None, "kv_bytes": None}
        for name, times in (("teacher", (1.0, 3.0)), ("student", (2.0, 2.0)))
        for length, ms in zip((10, 30), times, strict=True)
    ]
    assert model.overtakes(rows, 1) == {"batch": 1, "decode": 20.0}


def test_a_model_that_fails_is_a_row(config_file, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(model, "filled", fails)
    options = ModelOptions(config=str(config_file), to="gla", contexts="4", batch="1", new_tokens=4)
    results = bench_model(options=options)
    assert [row["error"] for row in results["rows"]] == ["decoding: RuntimeError: no room"] * 2
    assert results["rows"][0]["prefill_s"] > 0 and "decode" not in results["overtakes"][0]
    assert "no room" in tables.model_table(results)


# -- what is shown


def test_help_shows_examples():
    for words in (["kernels"], ["model"]):
        assert f"linearize bench {words[0]}" in done("bench", *words, "--help")
    assert "linearize bench kernels" in done("bench", "--help")


def test_no_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines: list[str] = []
    results = bench_kernels(KernelOptions(tokens="16", heads=1, head_dim=16, ops="linear"))
    assert figures.draw(results, tmp_path / "kernels.png", lines.append) is None
    assert len(lines) == 1 and "linearize[bench]" in lines[0] and not list(tmp_path.iterdir())


def test_readme_tables_of_the_results(config_file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables_speed
    import wording

    options = KernelOptions(tokens="16,32", heads=1, head_dim=16, ops="linear,window,softmax")
    data = bench_kernels(options)
    lines = tables_speed.kernels_table(data)
    assert lines[0] == "| | 16 | 32 | GiB at 32 |" and lines[1] == "|---|---|---|---|"
    assert [line.split("|")[1].strip() for line in lines[2:-2]] == [
        "HBM floor of `linear`",
        "`softmax`, sdpa-cudnn",
        "`softmax`, sdpa-flash",
        "**`linear`, linearize**",
        "**`window`, linearize**",
    ]
    assert all(line.count("|") == 5 for line in lines[:-2]) and "torch" in lines[-1]
    options = ModelOptions(config=str(config_file), to="gla", contexts="1,4096", batch="1", new_tokens=4, prefill=False)
    data = bench_model(options=options)
    lines = tables_speed.model_table(data)
    assert lines[3].startswith("| 1 | 4 096 | ") and all(line.count("|") == 7 for line in lines[:-2])
    data["rows"][0]["prefill_tokens_per_second"] = 4321.0
    lines = tables_speed.model_table(data)
    assert all(line.count("|") == 9 for line in lines[:-2]) and "| 4 321 |" in lines[2] and "| - |" in lines[3]
    assert wording.spaced(131072) == "131 072" and wording.size(3 << 29) == "1.5 GiB"
    assert wording.figure(0.0211) == "0.021" and wording.figure(254.2) == "254"


def test_the_table_beside_peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables_speed import beside_table

    def row(op, provider, forward, both):
        return {"op": op, "provider": provider, "tokens": 32768, "forward_ms": forward, "forward_backward_ms": both}

    rows = [
        row("softmax", "sdpa", 9.0, 30.0),
        row("gla", "linearize", 1.0, 4.0),
        row("gla", "one", 2.0, 9.0),
        row("gla", "two", 3.0, 8.0),
        row("gla", "none", 1.5, None),
    ]
    data = {"rows": rows, "hardware": "X", "dtype": "bfloat16", "batch": 1, "heads": 2, "head_dim": 4, "versions": {}}
    lines = beside_table({**data, "rows": [entry | {"versions": {}} for entry in rows]})
    assert lines[2] == "| `gla` | **1.00 / 4.00** | 1.50 / 8.00 (none / two) | 30.0 |"
