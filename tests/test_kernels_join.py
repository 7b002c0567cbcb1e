"""The joins' kernels against the fp64 reference: the joined output and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, Draw, gradients, worst_chunk

from linearize.kernels.join import join_norm, join_share
from linearize.modeling import join_reference as reference

SHAPES = [(2, 33, 3, 16), (1, 70, 2, 80), (1, 9, 4, 128), (1, 5, 1, 256), (1, 1, 2, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(ours, exact, names, dtype):
    for name, a, b in zip(names, ours, exact, strict=True):
        error = worst_chunk(a, b) if a.dim() > 2 else float((a.double().cpu() - b.cpu()).norm() / b.norm().cpu())
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


def check_share(dtype, window, shape, line_first=False):
    draw = Draw(dtype)
    batch, tokens, heads, _ = shape
    z = draw(batch, tokens, heads, dtype=torch.float32).abs() + 0.1
    z[:, 0] = 0  # no far key yet
    leaves = [draw(*shape), z]
    if window:
        lse = draw(batch, tokens, heads, dtype=torch.float32)
        lse[:, 1:2] = -20000.0  # below what counts as a window
        leaves += [draw(*shape), lse]
    if line_first:  # as the sweep leaves its normaliser
        leaves = [x if x.dim() == 4 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]

    def run(function):
        return lambda *given: [function(*given, *[None] * (4 - len(given)))]

    seeds = [draw(*shape)]
    ours = gradients(run(join_share), leaves, seeds)
    exact = gradients(run(reference.join_share), [x.double() for x in leaves], seeds)
    assert ours[0].dtype == dtype
    compare(ours, exact, ["joined", "dout", "dz", "dnear", "dlse"][: len(ours)], dtype)


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_share(shape, window, poisoned):
    check_share(torch.float32, window, shape)


def test_share_of_a_line_first_normaliser(poisoned):
    check_share(torch.float32, True, (2, 33, 3, 16), line_first=True)


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_share_in_half_precision(dtype, window, poisoned):
    check_share(dtype, window, (2, 33, 3, 16))


def check_norm(dtype, window, scaled, shape):
    draw = Draw(dtype)
    heads, channels = shape[2:]
    leaves = [draw(*shape), 1 + 0.1 * draw(heads, channels), draw(heads)]
    if window:
        leaves.append(draw(*shape))
    if scaled:
        leaves.append(1 + 0.1 * draw(heads))

    def run(function):
        def call(out, weight, scale, near=None, window_scale=None):
            return [function(out, near, weight, scale, window_scale, 1e-6)]

        return call

    seeds = [draw(*shape)]
    ours = gradients(run(join_norm), leaves, seeds)
    exact = gradients(run(reference.join_norm), [x.double() for x in leaves], seeds)
    assert ours[0].dtype == dtype
    compare(ours, exact, ["joined", "dout", "dweight", "dlinear", "dnear", "dwindow"][: len(ours)], dtype)


@pytest.mark.parametrize(("window", "scaled"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, window, scaled, poisoned):
    check_norm(torch.float32, window, scaled, shape)


def test_norm_of_many_parts(poisoned):
    check_norm(torch.float32, True, True, (2, 101, 2, 16))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_norm_in_half_precision(dtype, poisoned):
    check_norm(dtype, True, True, (2, 33, 3, 16))


def test_an_unscaled_window_keeps_its_dtype(poisoned):
    draw = Draw(torch.bfloat16)
    out, near = draw(1, 4, 2, 16, dtype=torch.float32), draw(1, 4, 2, 16)
    z, lse = torch.ones(1, 4, 2, device=DEVICE), torch.zeros(1, 4, 2, device=DEVICE)
    assert join_share(out, z, near, lse).dtype == torch.bfloat16
    assert join_share(out, z, None, None).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", {"out": torch.zeros(4, 2, 16)}),
        ("out", {"out": torch.zeros(1, 4, 2, 16, dtype=torch.float64)}),
        ("near", {"near": torch.zeros(1, 4, 2, 8)}),
        ("z", {"z": torch.zeros(1, 4, 3)}),
        ("lse", {"lse": torch.zeros(1, 3, 2)}),
    ],
)
def test_wrong_arguments_of_share_are_named(name, change):
    given = {"out": torch.zeros(1, 4, 2, 16), "z": torch.ones(1, 4, 2)}
    given |= {"near": torch.zeros(1, 4, 2, 16), "lse": torch.zeros(1, 4, 2)} | change
    with pytest.raises(ValueError, match=f"^{name} "):
        join_share(**{key: x.to(DEVICE) for key, x in given.items()})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("near", {"near": torch.zeros(1, 4, 2, 8)}),
        ("norm_weight", {"norm_weight": torch.zeros(2, 8)}),
        ("linear_scale", {"linear_scale": torch.zeros(3)}),
        ("window_scale", {"window_scale": torch.zeros(1)}),
    ],
)
def test_wrong_arguments_of_norm_are_named(name, change):
    given = {"out": torch.zeros(1, 4, 2, 16), "near": torch.zeros(1, 4, 2, 16), "norm_weight": torch.ones(2, 16)}
    given |= {"linear_scale": torch.ones(2), "window_scale": torch.ones(2)} | change
    with pytest.raises(ValueError, match=f"^{name} "):
        join_norm(**{key: x.to(DEVICE) for key, x in given.items()}, eps=1e-6)


def test_no_second_derivative():
    out = torch.ones(1, 2, 1, 16, device=DEVICE, requires_grad=True)
    joined = join_share(out, torch.ones(1, 2, 1, device=DEVICE), None, None)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(joined.sum(), out, create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 64, 80, 128, 256])
def test_on_a_gpu(channels, dtype):
    shape = (2, 1030, 4, channels)
    for window in (True, False):
        check_share(dtype, window, shape)
        check_norm(dtype, window, window, shape)


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    draw = Draw(torch.bfloat16)
    out, near = draw(1, 100, 2, 64), draw(1, 100, 2, 64)
    z, lse = draw(1, 100, 2, dtype=torch.float32).abs() + 0.1, draw(1, 100, 2, dtype=torch.float32)
    weight, scale = draw(2, 64), draw(2)

    def both(out, z, near, lse, weight, scale):
        shared = join_share(out, z, near, lse)
        return [join_norm(shared, None, weight, scale, None, 1e-6) + join_share(out, z, None, None)]

    leaves, seeds = [out, z, near, lse, weight, scale], [draw(1, 100, 2, 64)]
    plain = gradients(both, leaves, seeds)
    for a, b in zip(gradients(torch.compile(both, fullgraph=True), leaves, seeds), plain, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
