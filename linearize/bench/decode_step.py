"""One token of decoding: the recurrent step over states that are there, whose floor is the state read and written.

The state is [B, G, D, D] in fp32 with a scalar decay, and every query head of a key head reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modeling import dispatch
from .ops import GATE_TEMPERATURE, Shape
from .timing import Clock, said

Step = Callable[[], object]


def _ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Step:
    token = (q[:, 0], k[:, 0], v[:, 0], state)
    return lambda: dispatch.linear_step(*token, log_decay=log_decay[:, 0])


def _fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Step:
    step = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        raise ValueError("one state a query head only; this one has grouped heads")
    return lambda: step(q, k, v, g=log_decay, scale=1.0, initial_state=state, output_final_state=True)


STEPS = {"linearize": _ours, "fla": _fla}


@torch.no_grad()
def measure(provider: str, shape: Shape, clock: Clock, copy_gbps: float) -> dict[str, Any]:
    """A row: ms, GB/s of state read and written, and its share of the copy's bandwidth."""
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    batch, heads, groups, dim = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    row: dict[str, Any] = {
        "provider": provider,
        **{name: value for name, value in shape.to_dict().items() if name != "tokens"},
        "state_bytes": 4 * batch * groups * dim * dim,
        "ms": None,
        "gbps": None,
        "fraction_of_copy": None,
    }
    try:
        q = torch.randn(batch, 1, heads, dim, device=device, dtype=dtype)
        k, v = (torch.randn(batch, 1, groups, dim, device=device, dtype=dtype) for _ in range(2))
        log_decay = torch.randn(batch, 1, groups, device=device).sigmoid().log() / GATE_TEMPERATURE
        state = torch.randn(batch, groups, dim, dim, device=device)
        step = STEPS[provider](q, k, v, log_decay, state)
        step()
        run, row["cuda_graph"] = _captured(step, clock)
        row["ms"] = clock.milliseconds(run)
        row["gbps"] = 2 * row["state_bytes"] / row["ms"] / 1e6
        row["fraction_of_copy"] = row["gbps"] / copy_gbps
    except Exception as error:
        row["error"] = said(error)
    return row


def _captured(step: Step, clock: Clock) -> tuple[Step, bool]:
    """The step as a CUDA graph, as decoding runs it; as it is where it cannot be captured."""
    if not clock.on_gpu:
        return step, False
    try:
        clock.synchronize()
        stream = torch.cuda.Stream(clock.device)
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        clock.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        clock.synchronize()
    except Exception:
        clock.synchronize()
        return step, False
    return graph.replay, True
