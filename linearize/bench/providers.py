"""Who computes an operation: this package, PyTorch's softmax attention, and the peers where they are installed.

A provider's `load` imports what it needs and gives a `Setup`, which takes inputs and gives the call that is timed.
Every provider of an operation computes the same function of the same inputs (scale 1, normalised where it is `based`),
so that outputs can be compared. Peers without grouped heads get their keys and values repeated inside the call, as a
model that used them would have to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling import dispatch
from .ops import SINKS, WINDOW, Inputs
from .options import SDPA_CUDNN, SDPA_FLASH

Call = Callable[[], Tensor]
Setup = Callable[[Inputs], Call]

MAMBA_CHUNK = 256  # mamba_ssm's own default


@dataclass(frozen=True)
class Provider:
    """One way to compute `op`. `load` raises ImportError where it is not installed."""

    op: str
    name: str
    load: Callable[[], Setup]
    quadratic: bool = False
    triton: bool = True


# This package -----------------------------------------------------------------------------------------------------


def _ours(name: str, call: Callable[[Any, Inputs], Tensor]) -> Callable[[], Setup]:
    """`name` of modeling/dispatch.py: the kernels on a GPU, the reference elsewhere."""

    def load() -> Setup:
        operation = getattr(dispatch, name)
        return lambda inputs: lambda: call(operation, inputs)

    return load


def _plain(operation: Any, x: Inputs) -> Tensor:
    return operation(x["q"], x["k"], x["v"], log_decay=x.get("log_decay"))[0]


def _taylor(operation: Any, x: Inputs) -> Tensor:
    out, z, _ = operation(x["q"], x["k"], x["v"])
    return dispatch.join_share(out, z, None, None).to(x["v"].dtype)


def _delta(operation: Any, x: Inputs) -> Tensor:
    return operation(x["q"], x["k"], x["v"], beta=x["beta"], log_decay=x["log_decay"])[0]


def _window(operation: Any, x: Inputs) -> Tensor:
    return operation(x["q"], x["k"], x["v"], window=WINDOW, sinks=SINKS, scale=x["q"].shape[-1] ** -0.5)[0]


# PyTorch's softmax attention --------------------------------------------------------------------------------------


def _sdpa(backend: str) -> Callable[[], Setup]:
    def load() -> Setup:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def setup(x: Inputs) -> Call:
            grouped = x["q"].shape[1] != x["k"].shape[1]

            def call() -> Tensor:
                with sdpa_kernel(chosen):
                    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, enable_gqa=grouped)

            return call

        return setup

    return load


# The peers --------------------------------------------------------------------------------------------------------


def _peer(module: str, name: str, call: Callable[[Any, Inputs], Any]) -> Callable[[], Setup]:
    def load() -> Setup:
        operation = getattr(importlib.import_module(module), name)

        def setup(x: Inputs) -> Call:
            def run() -> Tensor:
                out = call(operation, _ungrouped(x))
                return out[0] if isinstance(out, tuple) else out

            return run

        return setup

    return load


def _ungrouped(x: Inputs) -> Inputs:
    """Every tensor with as many heads as the queries."""
    repeat = x["q"].shape[2] // x["k"].shape[2]
    if repeat == 1:
        return x
    return {name: t if name == "q" else t.repeat_interleave(repeat, dim=2) for name, t in x.items()}


def _fla_delta(f: Any, x: Inputs) -> Any:
    return f(x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"], scale=1.0)


def _mamba_ssm() -> Setup:
    """C = q, B = k, dt = -log_decay, A = -1, x = v / dt: the same decays and, dt x being v, the same output."""
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    scan = module.mamba_chunk_scan_combined

    def setup(x: Inputs) -> Call:
        dt = (-x["log_decay"]).detach()
        x["v"] = (x["v"].detach() / dt.unsqueeze(-1)).to(x["v"].dtype).requires_grad_()
        x["log_decay"] = dt.requires_grad_()
        rate = -torch.ones(x["q"].shape[2], device=dt.device)

        def call() -> Tensor:
            y = _ungrouped(x)
            return scan(y["v"], y["log_decay"], rate, y["k"], y["q"], chunk_size=MAMBA_CHUNK)

        return call

    return setup


ALL = [
    Provider("linear", "linearize", _ours("linear_attention", _plain)),
    Provider(
        "linear",
        "fla",
        _peer(
            "fla.ops.linear_attn",
            "chunk_linear_attn",
            lambda f, x: f(x["q"], x["k"], x["v"], scale=1.0, normalize=False),
        ),
    ),
    Provider("retention", "linearize", _ours("linear_attention", _plain)),
    Provider(
        "retention",
        "fla",
        _peer("fla.ops.retention", "chunk_retention", lambda f, x: f(x["q"], x["k"], x["v"], scale=1.0)),
    ),
    Provider("mamba2", "linearize", _ours("linear_attention", _plain)),
    Provider(
        "mamba2",
        "fla",
        _peer(
            "fla.ops.simple_gla",
            "chunk_simple_gla",
            lambda f, x: f(x["q"], x["k"], x["v"], g=x["log_decay"], scale=1.0),
        ),
    ),
    Provider("mamba2", "mamba_ssm", _mamba_ssm),
    Provider("gla", "linearize", _ours("linear_attention", _plain)),
    Provider(
        "gla",
        "fla",
        _peer("fla.ops.gla", "chunk_gla", lambda f, x: f(x["q"], x["k"], x["v"], x["log_decay"], scale=1.0)),
    ),
    Provider("based", "linearize", _ours("taylor_attention", _taylor)),
    Provider(
        "based",
        "fla",
        _peer("fla.ops.based", "fused_chunk_based", lambda f, x: f(x["q"], x["k"], x["v"], scale=1.0)),
    ),
    Provider(
        "based",
        "fla-parallel",
        _peer("fla.ops.based", "parallel_based", lambda f, x: f(x["q"], x["k"], x["v"], scale=1.0)),
        quadratic=True,
    ),
    Provider("gated_delta", "linearize", _ours("delta_rule", _delta)),
    Provider("gated_delta", "fla", _peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _fla_delta)),
    Provider("window", "linearize", _ours("window_attention", _window)),
    Provider("softmax", SDPA_CUDNN, _sdpa("CUDNN_ATTENTION"), quadratic=True, triton=False),
    Provider("softmax", SDPA_FLASH, _sdpa("FLASH_ATTENTION"), quadratic=True, triton=False),
]


def find(op: str, name: str) -> Provider:
    """The provider `name` of `op`. Raises KeyError where there is none."""
    for provider in ALL:
        if (provider.op, provider.name) == (op, name):
            return provider
    raise KeyError(f"{name} has no {op}")


def path_taken(provider: Provider, inputs: Inputs) -> str | None:
    """Whether this package's call takes the kernels or the plain-torch reference; None for other providers."""
    if provider.name != "linearize":
        return None
    takes = dispatch.takes_kernels(inputs["q"], inputs["k"], inputs["v"])
    return "triton" if takes else "reference"
