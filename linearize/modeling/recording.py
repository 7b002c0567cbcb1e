"""Recording what a function launches as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def records_on(device: torch.device) -> bool:
    return device.type == "cuda" and not _broken


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
    with torch.cuda.device(device):
        numbers = torch.cuda.default_generators[torch.cuda.current_device()]
    kept = numbers.clone_state()
    stream.wait_stream(torch.cuda.current_stream(device))
    collects = gc.isenabled()
    gc.disable()  # what the collector frees on the device would spoil the recording
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on using the device
            try:
                out = function()
            except BaseException:
                with suppress(RuntimeError):  # which says less than what broke it off
                    _end(graph)
                raise
            _end(graph)
    finally:
        if graph in _broken:  # the random numbers would wait for a recording that never ends
            numbers.graphsafe_set_state(kept)
        torch.cuda.current_stream(device).wait_stream(stream)
        if collects:
            gc.enable()
    return graph.replay, out


def _end(graph: torch.cuda.CUDAGraph) -> None:
    _broken.append(graph)
    graph.capture_end()
    _broken.remove(graph)


_streams: dict[torch.device, torch.cuda.Stream] = {}
# Recordings that could not even be ended: the allocator goes on asking them. Nothing is recorded after one.
_broken: list[Any] = []
