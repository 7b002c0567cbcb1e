"""Which of the two implementations an operation takes."""

from __future__ import annotations

import pytest
import torch

from linearize.modeling import dispatch, reference


def inputs(dtype=torch.float32, rows=16):
    return [torch.randn(1, 5, 2, rows, dtype=dtype) for _ in range(3)]


def test_a_cpu_takes_the_reference():
    q, k, v = inputs()
    assert not dispatch.takes_kernels("linear_attention", q, k, v)
    ours, exact = dispatch.linear_attention(q, k, v)[0], reference.linear_attention(q, k, v)[0]
    assert torch.equal(ours, exact)


def test_triton_is_forced_and_agrees(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    q, k, v = inputs()
    assert dispatch.takes_kernels("linear_attention", q, k, v)
    ours, exact = dispatch.linear_attention(q, k, v)[0], reference.linear_attention(q, k, v)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_fp64_and_the_forced_reference_take_no_kernels(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    assert not dispatch.takes_kernels("linear_attention", *inputs(torch.float64))
    monkeypatch.setenv("LINEARIZE_KERNELS", "reference")
    assert not dispatch.takes_kernels("linear_attention", *inputs())


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LINEARIZE_KERNELS is 'cuda'; it may be auto, triton, reference"):
        dispatch.linear_attention(*inputs())


def test_a_gpu_takes_a_kernel_only_where_it_was_checked():
    def admitted(name, rows, columns, vector=False):
        return dispatch._admitted(name, torch.empty(1, 1, 1, rows), torch.empty(1, 1, 1, columns), vector)

    assert admitted("linear_attention", 16, 16) and admitted("linear_attention", 256, 128)
    assert not admitted("linear_attention", 16, 16, vector=True) and admitted("linear_attention", 128, 128, True)
    assert admitted("window_attention", 64, 64) and not admitted("window_attention", 256, 256)
    assert admitted("delta_rule", 128, 128) and not admitted("delta_rule", 16, 128)
