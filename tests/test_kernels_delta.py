"""The gated delta rule's kernels against the fp64 reference: outputs, final states and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DECAY_TOLERANCE, DEVICE, TOLERANCE, Draw, gradients, worst_chunk

from linearize.kernels import delta as kernels
from linearize.modeling.delta_reference import delta_rule
from linearize.modeling.reference import LinearState

pytestmark = pytest.mark.usefixtures("poisoned")
GPU = torch.cuda.is_available()


def make(dtype, batch=1, tokens=70, heads=2, groups=2, rows=16, columns=16, strength=1.0, seed=0):
    draw = Draw(dtype, seed)
    q, k = draw(batch, tokens, heads, rows, scale=rows**-0.5), draw(batch, tokens, groups, rows, dtype=torch.float32)
    k = torch.nn.functional.normalize(k, dim=-1).to(dtype)
    v = draw(batch, tokens, groups, columns)
    beta = torch.sigmoid(draw(batch, tokens, groups, dtype=torch.float32))
    return q, k, v, beta, draw.log_decay(batch, tokens, groups, strength=strength)


def compare(q, k, v, beta, decay, *, initial=None, final=True, cu_seqlens=None, tolerance=None, strided=False):
    """Checks outputs and gradients of the kernels against the reference on the same inputs in fp64."""
    leaves = [tensor for tensor in (q, k, v, beta, decay, initial) if tensor is not None]
    names = ["out", *(["final"] if final else []), "dq", "dk", "dv", "dbeta"]
    names += [*(["ddecay"] if decay is not None else []), *(["dinitial"] if initial is not None else [])]

    def run(function, wide):
        def call(*tensors):
            rest = list(tensors[4:])
            out, last = function(
                *tensors[:3],
                beta=tensors[3],
                log_decay=rest.pop(0) if decay is not None else None,
                initial_state=LinearState(rest.pop(0)) if initial is not None else None,
                output_final_state=final,
                cu_seqlens=cu_seqlens,
            )
            if strided:  # so that its gradient comes with other strides
                out = out.transpose(1, 2).flip(1)
            return [out] if last is None else [out, last.kv]

        made = [leaf.double() if wide else leaf for leaf in leaves]
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            shapes = [out.shape for out in call(*made)]
        seeds = [torch.randn(shape, generator=generator).to(v.dtype).to(DEVICE) for shape in shapes]
        return gradients(call, made, seeds)

    tolerance = tolerance or TOLERANCE[v.dtype]
    for name, ours, exact in zip(names, run(kernels.delta_rule, False), run(delta_rule, True), strict=True):
        if name == "out":
            assert ours.dtype == v.dtype
        if name == "final":
            assert ours.dtype == torch.float32
        gate = name in ("dbeta", "ddecay") and tolerance == TOLERANCE[v.dtype]
        error = worst_chunk(ours, exact)
        assert error < (DECAY_TOLERANCE[v.dtype] if gate else tolerance), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 1])
def test_outputs_and_gradients(dtype, groups):
    compare(*make(dtype, batch=2, groups=groups))


@pytest.mark.parametrize("groups", [2, 1])
def test_initial_states_and_widths_that_are_no_power_of_two(groups):
    compare(*make(torch.float32, batch=2, tokens=130, groups=groups, rows=20, columns=17), initial=states(2, groups))


def states(documents, groups, rows=20, columns=17):
    return torch.randn(documents, groups, rows, columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("groups", [2, 1])
def test_packed_documents(groups):
    bounds = torch.tensor([0, 3, 3, 67, 150], device=DEVICE)  # one is empty
    tensors = make(torch.float32, tokens=150, groups=groups, rows=20, columns=17)
    compare(*tensors, initial=states(4, groups), cu_seqlens=bounds)
    compare(*tensors, final=False, cu_seqlens=bounds.int())


def test_a_document_does_not_read_the_next():
    q, k, v, beta, decay = make(torch.float32, tokens=100)
    bounds = torch.tensor([0, 37, 100], device=DEVICE)
    arguments = {"beta": beta, "log_decay": decay, "output_final_state": True, "cu_seqlens": bounds}
    out, state = kernels.delta_rule(q, k, v, **arguments)
    q, k, v = (torch.cat([x[:, :37], torch.full_like(x[:, 37:], float("nan"))], 1) for x in (q, k, v))
    again, left = kernels.delta_rule(q, k, v, **arguments)
    assert torch.equal(out[:, :37], again[:, :37]) and torch.equal(state.kv[0], left.kv[0])


@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_odd_lengths_and_strides(tokens):
    q, k, v, beta, decay = make(torch.float32, tokens=tokens)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.cat([v, v], -1)[..., ::2]
    decay = decay[..., :1].expand(-1, -1, 2) if tokens > 1 else None  # one token alone has nothing to fade
    compare(q, k, v, beta, decay, final=False, strided=True)


def test_more_value_channels_than_a_tile():
    compare(*make(torch.float32, rows=16, columns=80, groups=1))


def test_no_decay_and_mixed_dtypes():
    q, k, v, beta, _ = make(torch.float32)
    compare(q, k, v, beta, None, final=False)
    out, state = kernels.delta_rule(q, k, v.bfloat16(), beta=beta.bfloat16())
    assert out.dtype == torch.bfloat16 and state is None
    exact, _ = delta_rule(*(x.double() for x in (q, k, v.bfloat16())), beta=beta.bfloat16().double())
    assert worst_chunk(out, exact) < 1e-2


def test_the_state_alone_gives_gradients():
    q, k, v, beta, decay = (x.requires_grad_() for x in make(torch.float32))
    _, state = kernels.delta_rule(q, k, v, beta=beta, log_decay=decay, output_final_state=True)
    state.kv.sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (k, v, beta, decay)]
    _, exact = delta_rule(q.detach().double(), *wide[:2], beta=wide[2], log_decay=wide[3], output_final_state=True)
    exact.kv.sum().backward()
    assert (q.grad == 0).all()
    for ours, theirs in zip((k, v, beta, decay), wide, strict=True):
        assert worst_chunk(ours.grad, theirs.grad) < 1e-4


def test_keys_that_repeat_and_strong_decays_stay_exact():
    """The worst case for the inverse: every key the same, written whole."""
    q, k, v, beta, decay = make(torch.float32, tokens=130)
    k = k[:, :1].expand_as(k)
    compare(q, k, v, torch.ones_like(beta), None, tolerance=1e-4)
    out, _ = kernels.delta_rule(q, k, v, beta=beta, log_decay=decay * 100)
    exact, _ = delta_rule(*(x.double() for x in (q, k, v)), beta=beta.double(), log_decay=decay.double() * 100)
    assert worst_chunk(out, exact) < 1e-5


def test_compiled():
    def run(q, k, v, beta, decay):
        out, state = kernels.delta_rule(q, k, v, beta=beta, log_decay=decay, output_final_state=True)
        return [out, state.kv]

    leaves = list(make(torch.float32, tokens=20))
    seeds = [torch.ones(1, 20, 2, 16), torch.ones(1, 2, 16, 16)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(run, leaves, seeds), gradients(compiled, leaves, seeds), strict=True):
        torch.testing.assert_close(b, a)


def test_wrong_arguments_are_named():
    q, k, v, beta, decay = make(torch.float32)
    for change, name in [
        ({"k": k[..., :5]}, "k has"),
        ({"v": v[:, :, :1]}, "v is"),
        ({"q": q.double()}, "q is torch.float64"),
        ({"q": q[0]}, "q must be"),
        ({"beta": beta[..., :1]}, "beta must be"),
        ({"beta": beta.long()}, "beta is"),
        ({"log_decay": decay[:, :5]}, "log_decay"),
        ({"initial_state": LinearState(torch.zeros(1, 1, 1, 1, device=DEVICE))}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0], device=DEVICE)}, "cu_seqlens"),
        ({"q": torch.zeros(1, 70, 3, 16, device=DEVICE)}, "q has 3 heads"),
    ]:
        arguments = {"q": q, "k": k, "v": v, "beta": beta, **change}
        with pytest.raises(ValueError, match=name):
            kernels.delta_rule(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("tokens", [2048, 9001])
def test_real_sizes(dtype, groups, tokens):
    tensors = make(dtype, tokens=tokens, heads=4, groups=groups, rows=128, columns=128, strength=0.1)
    compare(*tensors, initial=states(1, groups, 128, 128))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("rows,columns", [(64, 64), (80, 80), (16, 256), (256, 16), (256, 256), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_head_sizes(rows, columns, dtype):
    for groups in (4, 2):
        compare(*make(dtype, tokens=1500, heads=4, groups=groups, rows=rows, columns=columns, strength=0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_many_packed_documents():
    generator = torch.Generator().manual_seed(3)
    bounds = torch.cat([torch.tensor([0]), torch.randint(0, 300, (40,), generator=generator).cumsum(0)]).to(DEVICE)
    tensors = make(torch.bfloat16, tokens=int(bounds[-1]), heads=4, groups=2, rows=64, columns=64, strength=0.1)
    compare(*tensors, initial=states(40, 2, 64, 64), cu_seqlens=bounds)
