"""Which of the two implementations an operation takes."""

from __future__ import annotations

import pytest
import torch

from linearize.modeling import dispatch, reference


def inputs(dtype=torch.float32, rows=16):
    return [torch.randn(1, 5, 2, rows, dtype=dtype) for _ in range(3)]


def test_a_cpu_takes_the_reference():
    q, k, v = inputs()
    assert not dispatch.takes_kernels(q, k, v)
    ours, exact = dispatch.linear_attention(q, k, v)[0], reference.linear_attention(q, k, v)[0]
    assert torch.equal(ours, exact)


def test_triton_is_forced_and_agrees(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    q, k, v = inputs()
    assert dispatch.takes_kernels(q, k, v)
    ours, exact = dispatch.linear_attention(q, k, v)[0], reference.linear_attention(q, k, v)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_fp64_and_the_forced_reference_take_no_kernels(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    assert not dispatch.takes_kernels(*inputs(torch.float64))
    monkeypatch.setenv("LINEARIZE_KERNELS", "reference")
    assert not dispatch.takes_kernels(*inputs())


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LINEARIZE_KERNELS is 'cuda'; it may be auto, triton, reference"):
        dispatch.linear_attention(*inputs())


def test_wide_heads_take_the_reference(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    q, k, v = inputs(rows=320)
    assert not dispatch.takes_kernels(q, k, v)
    ours, exact = dispatch.linear_attention(q, k, v)[0], reference.linear_attention(q, k, v)[0]
    assert torch.equal(ours, exact)
