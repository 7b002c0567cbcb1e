"""Recording what a function launches as a CUDA graph, and what code that is recorded must not do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def records_on(device: torch.device) -> bool:
    return device.type == "cuda"


def cannot_look() -> bool:
    """Whether the code that runs now is compiled or recorded, and may not wait for a tensor's value."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # a build for CPUs has no such call


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everything is recorded."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def record(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Records what `function` launches, without running it: a function that runs it, and the output it writes.

    Raises:
        RuntimeError: it does something that a CUDA graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    stream = stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    collects = gc.isenabled()
    gc.disable()  # what the collector frees on the device would spoil the recording
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on using the device
            try:
                out = function()
            finally:
                graph.capture_end()
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
        if collects:
            gc.enable()
    return graph.replay, out


_streams: dict[torch.device, torch.cuda.Stream] = {}
