"""The Taylor kernels against the fp64 reference: outputs, normaliser, final states and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, Draw, gradients, worst_chunk

from linearize.kernels import taylor as kernels
from linearize.modeling import reference
from linearize.modeling.reference import LinearState

pytestmark = pytest.mark.usefixtures("poisoned")
GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def features(channels):
    return 1 + channels + channels * (channels + 1) // 2


def make(dtype, batch=1, tokens=70, heads=2, groups=2, channels=8, columns=16, weighted=True, seed=0):
    draw = Draw(dtype, seed)
    scale = channels**-0.25
    q, k = draw(batch, tokens, heads, channels, scale=scale), draw(batch, tokens, groups, channels, scale=scale)
    weight = None
    if weighted:
        weight = draw(batch, tokens, groups, dtype=torch.float32).exp()
        weight[:, ::7] = 0
    return q, k, draw(batch, tokens, groups, columns), weight


def initial(documents, groups, channels, columns):
    draw = Draw(torch.float32, 5)
    return draw(documents, groups, features(channels), columns), draw(documents, groups, features(channels))


def compare(q, k, v, weight, *, start=None, final=False, cu_seqlens=None, tolerance=None):
    """Checks outputs and gradients of the kernels against the reference on the same inputs in fp64."""
    leaves = [tensor for tensor in (q, k, v, weight) if tensor is not None] + list(start or ())

    def run(function, widen):
        def call(*tensors):
            out, z, last = function(
                *tensors[:3],
                key_weight=None if weight is None else tensors[3],
                initial_state=None if start is None else LinearState(*tensors[-2:]),
                output_final_state=final,
                cu_seqlens=cu_seqlens,
            )
            return [out, z, *(last or ())]

        made = [leaf.double() for leaf in leaves] if widen else leaves
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            shapes = [out.shape for out in call(*made)]
        seeds = [torch.randn(shape, generator=generator).to(v.dtype).to(DEVICE) for shape in shapes]
        return gradients(call, made, seeds)

    exact, ours = run(reference.taylor_attention, True), run(kernels.taylor_attention, False)
    names = ["out", "z", *(["kv", "k"] if final else []), "dq", "dk", "dv", *(["dw"] if weight is not None else [])]
    names += ["dkv0", "dk0"] if start is not None else []
    assert len(names) == len(ours) == len(exact)
    for name, a, b in zip(names, ours, exact, strict=True):
        limit = tolerance or TOLERANCE[v.dtype]
        dim = 2 if name in ("kv", "k", "dkv0", "dk0") else 1
        assert worst_chunk(a, b, dim=dim) < limit, f"{name}: {worst_chunk(a, b, dim=dim):.2e}"


@pytest.fixture
def segmented(monkeypatch):
    """Cuts even short sequences into segments."""
    monkeypatch.setattr(kernels, "LEAST_CHUNKS", 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_segment(dtype, weighted):
    compare(*make(dtype, groups=1, channels=16, weighted=weighted))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments(dtype, weighted, segmented):
    compare(*make(dtype, tokens=130, groups=1, weighted=weighted), final=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_states(cut, weighted, request):
    if cut:
        request.getfixturevalue("segmented")
    if weighted:
        case, start = make(torch.float32, tokens=70, heads=4), initial(1, 2, 8, 16)
    else:
        case, start = make(torch.float32, batch=2, groups=1, weighted=False), initial(2, 1, 8, 16)
    compare(*case, start=start, final=True)


@pytest.mark.parametrize("cut", [False, True])
def test_packed_documents(cut, request):
    if cut:
        request.getfixturevalue("segmented")
    bounds = torch.tensor([0, 33, 33, 34, 80], device=DEVICE)
    case = make(torch.float32, tokens=80, groups=1, columns=24, weighted=not cut)
    compare(*case, start=initial(4, 1, 8, 24), final=True, cu_seqlens=bounds)


@pytest.mark.parametrize("channels", [1, 4, 5, 12, 24, 32, 33])
def test_channels(channels):
    """Powers of two and others, even and odd (whose diagonals differ), and more than the kernels take."""
    compare(*make(torch.float32, tokens=34, heads=1, groups=1, channels=channels), start=initial(1, 1, channels, 16))


@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (2, 50), (32, 16), (65, 24)])
def test_odd_sizes_and_strides(tokens, columns):
    q, k, v, weight = make(torch.float32, tokens=tokens, columns=columns)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.cat([v, v], -1)[..., ::2]
    compare(q, k, v, weight[:, :, :1].expand(-1, -1, 2))


def test_one_hot_selection_is_exact():
    """The dots that select channels (16-bit inputs) and the gathers (fp32) make the same features."""
    q, k, v, weight = make(torch.bfloat16, channels=16)
    exact = reference.taylor_attention(*(t.double() for t in (q, k, v)), key_weight=weight.double())[1]
    assert worst_chunk(kernels.taylor_attention(q, k, v, key_weight=weight)[1], exact) < (1e-2 if GPU else 1e-5)


def test_mixed_dtypes():
    """Based projects q and k in fp32."""
    q, k, v, weight = make(torch.bfloat16)
    compare(q.float(), k.float(), v, weight)


def test_only_some_outputs_have_gradients():
    q, k, v, weight = make(torch.float32, tokens=20, groups=1)
    for pick in (lambda made: made[0], lambda made: made[1], lambda made: made[2].kv, lambda made: made[2].k):
        grads = []
        for function, dtype in ((kernels.taylor_attention, torch.float32), (reference.taylor_attention, torch.float64)):
            leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (q, k, v, weight)]
            made = function(*leaves[:3], key_weight=leaves[3], output_final_state=True)
            # An expanded gradient is not contiguous.
            pick(made).sum().backward()
            grads.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
        for a, b in zip(*grads, strict=True):
            assert worst_chunk(a, b) < 1e-5


def test_pieces_are_the_whole():
    q, k, v, weight = make(torch.float32, tokens=100)
    whole = kernels.taylor_attention(q, k, v, key_weight=weight, output_final_state=True)
    state, outs = None, []
    for piece in (slice(0, 41), slice(41, 42), slice(42, 100)):
        out, z, state = kernels.taylor_attention(
            *(t[:, piece] for t in (q, k, v)),
            key_weight=weight[:, piece],
            initial_state=state,
            output_final_state=True,
        )
        outs.append(torch.cat([out, z.unsqueeze(-1)], -1))
    expected = torch.cat([whole[0], whole[1].unsqueeze(-1)], -1)
    assert worst_chunk(torch.cat(outs, 1), expected) < 1e-5
    assert worst_chunk(state.kv, whole[2].kv, dim=2) < 1e-5 and worst_chunk(state.k, whole[2].k, dim=2) < 1e-5


def test_half_precision_does_not_overflow():
    q, k, v, _ = make(torch.float16)
    out, z, _ = kernels.taylor_attention(q * 20, k * 20, v * 50)
    assert out.dtype == torch.float32 and torch.isfinite(out).all() and torch.isfinite(z).all()


def test_compiled(segmented):
    q, k, v, weight = make(torch.float32, tokens=40, groups=1)
    kv, n = initial(1, 1, 8, 16)
    leaves = [q, k, v, weight, kv, n]

    def run(q, k, v, weight, kv, n):
        state = LinearState(kv, n)
        out, z, last = kernels.taylor_attention(
            q, k, v, key_weight=weight, initial_state=state, output_final_state=True
        )
        near, norm, _ = kernels.taylor_attention(q, k, v)
        return [out + near, z + norm, last.kv, last.k]

    seeds = [torch.randn_like(t) for t in run(*leaves)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(run, leaves, seeds), gradients(compiled, leaves, seeds), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_named():
    q, k, v, weight = make(torch.float32, tokens=5)
    for change, name in [
        ({"k": k[..., :5]}, "k has"),
        ({"v": v[:, :, :1]}, "v is"),
        ({"q": q.int()}, "q is torch.int32"),
        ({"q": q[0]}, "q must be"),
        ({"key_weight": weight[:, :3]}, "key_weight"),
        ({"key_weight": weight > 0}, "key_weight"),
        ({"initial_state": LinearState(torch.zeros(1, 2, 1, 16, device=DEVICE))}, "initial_state.kv"),
        ({"initial_state": LinearState(initial(1, 2, 8, 16)[0], torch.zeros(1, 2, 1, device=DEVICE))}, "state.k"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0], device=DEVICE)}, "cu_seqlens"),
        ({"q": torch.zeros(1, 5, 3, 8, device=DEVICE)}, "q has 3 heads"),
    ]:
        arguments = {"q": q, "k": k, "v": v, **change}
        with pytest.raises(ValueError, match=name):
            kernels.taylor_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long(dtype, channels, weighted):
    case = make(dtype, batch=1, tokens=2111, heads=4, groups=2, channels=channels, columns=128, weighted=weighted)
    compare(*case, final=True)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("columns", [16, 64, 80, 256])
def test_long_packed(columns):
    bounds = torch.tensor([0, 1000, 1000, 1001, 2500], device=DEVICE)
    case = make(torch.bfloat16, tokens=2500, heads=6, groups=2, channels=16, columns=columns)
    compare(*case, start=initial(4, 2, 16, columns), final=True, cu_seqlens=bounds)


@pytest.mark.gpu
@NEEDS_GPU
def test_no_stall():
    """Nothing waits for the device, also with packed documents."""
    q, k, v, weight = make(torch.bfloat16, tokens=600, channels=16, columns=64)
    bounds = torch.tensor([0, 100, 600], device=DEVICE)
    leaves = [t.requires_grad_() for t in (q, k, v, weight)]

    def run():
        out, z, _ = kernels.taylor_attention(*leaves[:3], key_weight=leaves[3], cu_seqlens=bounds)
        torch.autograd.grad([out, z], leaves, [torch.ones_like(out), torch.ones_like(z)])

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
