"""Milliseconds and bytes of a call: CUDA events with the L2 cache flushed on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

GIB = 2**30
_FLUSH_BYTES = 256 * 2**20  # as triton.testing.do_bench: several times an L2 cache
_ENOUGH_MS = 200.0
_WARM_MS = 25.0

Run = Callable[[], object]


def _nothing() -> None:
    return None


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._flush: torch.Tensor | None = None
        if self.on_gpu:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        elif self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def milliseconds(self, run: Run, before: Run = _nothing) -> float:
        """Median of a call that has run already: at least 0.2 s or 10 calls, whichever is longer, and 3 calls of one
        that lasts. `before` runs ahead of each call and is not timed."""
        once = statistics.median(self._times(run, before, 2))
        self._times(run, before, min(int(_WARM_MS / max(once, 1e-3)), 100))
        return statistics.median(self._times(run, before, _repeats(once)))

    def _times(self, run: Run, before: Run, count: int) -> list[float]:
        if not self.on_gpu:
            return [self._wall(run, before) for _ in range(count)]
        assert self._flush is not None
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        with torch.cuda.device(self.device):
            for start, end in zip(starts, ends, strict=True):
                before()
                self._flush.zero_()
                start.record()
                run()
                end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]

    def _wall(self, run: Run, before: Run) -> float:
        before()
        self.synchronize()
        started = time.perf_counter()
        run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - started)

    def peak_bytes(self, run: Run) -> int | None:
        """Bytes that one call needs above what is there before it, its result included; None without a GPU."""
        if not self.on_gpu:
            run()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        there = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - there

    def copy_gbps(self) -> float:
        """Measured bandwidth of a large copy in GB/s, bytes read and written together: what the floors divide by."""
        size = 64 * 2**20
        if self.on_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            size = min(4 * GIB, free // 8)
        source = torch.empty(size, dtype=torch.int8, device=self.device).zero_()
        target = torch.empty_like(source)
        return 2 * size / self.milliseconds(lambda: target.copy_(source)) / 1e6

    def free(self) -> None:
        """Gives cached memory back, so that one measurement's leftovers are not another's trouble."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def _repeats(milliseconds: float) -> int:
    """How often a call that lasts `milliseconds` is timed."""
    milliseconds = max(milliseconds, 1e-3)
    ten_if_short = min(10, int(2000 / milliseconds))
    return max(3, ten_if_short, min(int(_ENOUGH_MS / milliseconds), 1000))


def said(error: BaseException) -> str:
    """What went wrong as one line of a row."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:240]}"
