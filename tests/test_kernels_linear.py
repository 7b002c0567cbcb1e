"""The sweep engine against the fp64 reference: outputs, final states and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DECAY_TOLERANCE, DEVICE, TOLERANCE, Draw, gradients, worst_chunk

from linearize.kernels import linear as kernels
from linearize.kernels import sweeps
from linearize.modeling import reference
from linearize.modeling.reference import LinearState

pytestmark = pytest.mark.usefixtures("poisoned")
GPU = torch.cuda.is_available()
ON_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")])
KINDS = ["none", "constant", "scalar", "vector"]


def make(kind, dtype, batch=1, tokens=70, heads=2, groups=2, rows=16, columns=16, seed=0):
    draw = Draw(dtype, seed)
    q, k = draw(batch, tokens, heads, rows, scale=rows**-0.5), draw(batch, tokens, groups, rows)
    v = draw(batch, tokens, groups, columns)
    g = None
    if kind == "constant":
        g = draw.log_decay(1, 1, groups).expand(batch, tokens, groups)
    elif kind == "scalar":
        g = draw.log_decay(batch, tokens, groups)
    elif kind == "vector":
        g = draw.log_decay(batch, tokens, groups, rows)
    return q, k, v, g


def compare(q, k, v, g, *, normalizer=False, initial=None, final=False, cu_seqlens=None, tolerance=None, decay=None):
    """Checks outputs and gradients of the kernels against the reference on the same inputs in fp64."""
    leaves = [tensor for tensor in (q, k, v, g) if tensor is not None] + list(initial or ())
    count = 3 + (g is not None)

    def run(function, widen):
        def call(*tensors):
            state = None
            if initial is not None:
                state = LinearState(tensors[count], tensors[count + 1] if normalizer else None)
            out, z, last = function(
                *tensors[:3],
                log_decay=tensors[3] if g is not None else None,
                normalizer=normalizer,
                initial_state=state,
                output_final_state=final,
                cu_seqlens=cu_seqlens,
            )
            return [t for t in (out, z, last and last.kv, last and last.k) if t is not None]

        made = [leaf.double() for leaf in leaves] if widen else leaves
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            shapes = [out.shape for out in call(*made)]
        seeds = [torch.randn(shape, generator=generator).to(v.dtype).to(DEVICE) for shape in shapes]
        return gradients(call, made, seeds), len(shapes)

    (exact, outputs), (ours, _) = run(reference.linear_attention, True), run(kernels.linear_attention, False)
    names = [*["out", "z", "kv", "n"][:outputs], "dq", "dk", "dv", *(["dg"] if g is not None else []), "d0", "dn0"]
    if not normalizer and final:
        names[1] = "kv"
    tolerance = tolerance or TOLERANCE[v.dtype]
    for name, a, b in zip(names, ours, exact, strict=False):
        limit = (decay or DECAY_TOLERANCE[v.dtype]) if name == "dg" else tolerance
        assert worst_chunk(a, b) < limit, f"{name}: {worst_chunk(a, b):.2e}"


@pytest.fixture
def segmented(monkeypatch):
    """Cuts even short sequences into segments."""
    monkeypatch.setattr(sweeps, "SHORT", 0)
    monkeypatch.setattr(sweeps, "LEAST_SPAN", 64)
    sweeps._plan.cache_clear()
    yield
    sweeps._plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_program_a_sequence(kind, dtype):
    compare(*make(kind, dtype, batch=2, groups=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind, dtype, segmented):
    """Of whole marks, from which a decay's gradient begins anew."""
    tokens = 2 * sweeps.SPAN + 20
    assert sweeps.plan_of(1, 2, tokens, 16, 0, False).segments == 3
    compare(*make(kind, dtype, tokens=tokens, groups=1))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_normalizer_and_states(kind, cut, request):
    if cut:
        request.getfixturevalue("segmented")
    tokens = sweeps.SPAN + 20 if cut else 40
    q, k, v, g = make(kind, torch.float32, tokens=tokens, heads=2, groups=1, rows=16, columns=24)
    initial = (torch.randn(1, 1, 16, 24, device=DEVICE), torch.rand(1, 1, 16, device=DEVICE))
    q, k = q.abs(), k.abs()
    compare(q, k, v, g, normalizer=True, initial=initial, final=True)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents(kind):
    q, k, v, g = make(kind, torch.float32, tokens=90, rows=20, columns=17)
    bounds = torch.tensor([0, 33, 34, 90], device=DEVICE)
    initial = (torch.randn(3, 2, 20, 17, device=DEVICE), torch.rand(3, 2, 20, device=DEVICE))
    compare(q, k, v, g, normalizer=True, initial=initial, final=True, cu_seqlens=bounds)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_packed_documents_of_several_marks(kind):
    mark = sweeps.SPAN
    q, k, v, g = make(kind, torch.float32, tokens=2 * mark + 120, groups=1)
    bounds = torch.tensor([0, 30, mark + 70, mark + 70, 2 * mark + 70, 2 * mark + 120], device=DEVICE)
    initial = (torch.randn(5, 1, 16, 16, device=DEVICE), torch.rand(5, 1, 16, device=DEVICE))
    compare(q.abs(), k.abs(), v, g, normalizer=True, initial=initial, final=True, cu_seqlens=bounds)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_odd_lengths_and_strides(tokens):
    q, k, v, g = make("scalar" if tokens > 1 else "none", torch.float32, tokens=tokens)  # one token has no decay
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.cat([v, v], -1)[..., ::2]
    compare(q, k, v, g)


def test_half_precision_with_a_normaliser_does_not_overflow():
    q, k, v, _ = make("none", torch.float16)
    k = k.abs() * 100
    out, z, _ = kernels.linear_attention(q.abs() * 100, k, v * 50, normalizer=True)
    assert out.dtype == torch.float32 and torch.isfinite(out).all() and torch.isfinite(z).all()


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_strong_decays_stay_finite(kind):
    q, k, v, g = make(kind, torch.float32)
    out, _, _ = kernels.linear_attention(q, k, v, log_decay=g * 100)
    exact, _, _ = reference.linear_attention(*(t.double() for t in (q, k, v)), log_decay=g.double() * 100)
    assert worst_chunk(out, exact) < 1e-5


def test_wrong_arguments_are_named():
    q, k, v, g = make("scalar", torch.float32)
    for change, name in [
        ({"k": k[..., :5]}, "k has"),
        ({"v": v[:, :, :1]}, "v is"),
        ({"q": q.int()}, "q is torch.int32"),
        ({"q": q[0]}, "q must be"),
        ({"log_decay": g[:, :5]}, "log_decay"),
        ({"initial_state": LinearState(torch.zeros(1, 1, 1, 1, device=DEVICE))}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0], device=DEVICE)}, "cu_seqlens"),
        ({"q": torch.zeros(1, 70, 3, 16, device=DEVICE)}, "q has 3 heads"),
    ]:
        arguments = {"q": q, "k": k, "v": v, **change}
        with pytest.raises(ValueError, match=name):
            kernels.linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2048, 9001])
def test_real_sizes(kind, dtype, tokens):
    compare(*make(kind, dtype, tokens=tokens, heads=4, groups=2, rows=128, columns=128))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("rows,columns", [(256, 128), (256, 64), (64, 64), (80, 80), (16, 256), (256, 256)])
def test_real_head_sizes(rows, columns):
    for kind in ("none", "scalar", "vector"):
        q, k, v, g = make(kind, torch.bfloat16, tokens=5000, heads=4, groups=2, rows=rows, columns=columns)
        compare(q.abs(), k.abs(), v, g, normalizer=True)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_alone(kind, dtype):
    """Without gradients and a final state, as evaluation has it: what is not stored is not in the program."""
    for rows, columns, groups in ((16, 16, 2), (64, 64, 3), (128, 64, 3), (256, 128, 3)):
        q, k, v, g = make(kind, dtype, tokens=1000, heads=2 * groups, groups=groups, rows=rows, columns=columns)
        q, k = q.abs(), k.abs()
        with torch.no_grad():
            out, z, _ = kernels.linear_attention(q, k, v, log_decay=g, normalizer=True)
            wide = None if g is None else g.double()
            expected, z_expected, _ = reference.linear_attention(
                q.double(), k.double(), v.double(), log_decay=wide, normalizer=True
            )
        tolerance = TOLERANCE[dtype]
        for ours, theirs in ((out, expected), (z, z_expected)):
            assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < tolerance


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_compiled_without_a_break(kind):
    def run(*tensors):
        decay = tensors[3] if len(tensors) > 3 else None
        out, z, state = kernels.linear_attention(
            *tensors[:3], log_decay=decay, normalizer=True, output_final_state=True
        )
        return (out.square().sum() + z.sum() + state.kv.sum()) * 0.5

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (70, 90):  # the second length is traced with a symbol in its place
        made = make(kind, torch.float32, tokens=tokens)
        leaves = [t.detach().requires_grad_() for t in made if t is not None]
        plain = torch.autograd.grad(run(*leaves), leaves)
        ours = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_laid_out_as_the_compiler_is_told(kind):
    q, k, v, g = make(kind, torch.float32, groups=2, heads=4)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, g) if t is not None]
    out, _, _ = kernels.linear_attention(*leaves[:3], log_decay=leaves[3] if g is not None else None)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.is_contiguous()


def test_a_second_derivative_is_refused():
    q, k, v, _ = make("none", torch.float32)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative: set LINEARIZE_KERNELS=reference"):
        torch.autograd.grad(kernels.linear_attention(q, k, v)[0].sum(), q, create_graph=True)


def test_bounds_with_gaps_in_memory():
    q, k, v, g = make("scalar", torch.float32, tokens=20)
    bounds = torch.tensor([0, 99, 9, 99, 20], device=DEVICE)
    exact = kernels.linear_attention(q, k, v, log_decay=g, cu_seqlens=bounds[::2].clone())[0]
    assert torch.equal(kernels.linear_attention(q, k, v, log_decay=g, cu_seqlens=bounds[::2])[0], exact)
