"""`linearize bench kernels`: every operation by every provider at every length, in one run.

A provider that raises, refuses its backward pass or runs out of memory gives a row with what it did give and the error;
the run goes on. Results are written after every row, so that a run that is cut short loses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, UserError
from ..source import parse_device, parse_dtype
from . import decode_step, record
from .children import Say, cold_starts, warm_cache
from .ops import Shape, backward_bytes, forget_gradients, forward_bytes, make_inputs
from .options import DECODE, OPS, PROVIDERS, KernelOptions
from .providers import ALL, Provider, Setup, path_taken
from .record import Row
from .timing import GIB, Clock, said

FILE = "kernels.json"
# Rounding in bf16 and a chunk's order of sums stay below; another function does not.
SAME = 0.05


def bench_kernels(
    options: KernelOptions | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    command: str | Sequence[str] = "linearize.bench.bench_kernels",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measures the operations.

    Args:
        dtype: of the inputs; "auto" is bfloat16 on an accelerator and float32 on a CPU.
        device: where; on a CPU the reference runs, timed by the wall clock and without peak memory.
        out: folder for kernels.json, written as the run goes on; None writes nothing.
        say: takes a line of progress at a time.

    Returns:
        What kernels.json holds: the run's facts, `rows` (`op, provider, tokens, forward_ms, forward_backward_ms,
        forward_peak_gib, forward_backward_peak_gib`, the HBM floors, the output's difference from this package's at the
        shortest length, each with commit, versions and command), `decode` and `cold_start`. Figures that could not be
        taken are None, with `error`.

    Raises:
        UsageError, UserError: an option, a device or `out` is wrong, or nothing of what was asked for is installed.
    """
    options = options or KernelOptions()
    place = parse_device(device)
    shape = Shape(
        batch=options.batch,
        tokens=options.lengths()[0],
        heads=options.heads,
        kv_heads=options.groups(),
        head_dim=options.head_dim,
        dtype=_dtype_name(dtype, place),
        device=str(place),
    )
    found = _installed(options, say)
    results = _Results(options, shape, out, command)
    tasks = [provider for provider, _ in found if provider.triton]
    if options.timing:
        jobs = options.warm_cache
        if jobs is None:
            jobs = os.cpu_count() or 1 if place.type == "cuda" else 0
        if jobs and tasks:
            warm_cache(tasks, shape, backward=not options.only_forward, jobs=min(jobs, len(tasks)), say=say)
    if options.cold_start:
        rows = cold_starts(tasks, shape, backward=not options.only_forward, jobs=options.jobs, say=say)
        results.add("cold_start", rows)
    if options.timing:
        _time_all(options, shape, found, results, say)
    return results.write()


def _dtype_name(dtype: str, place: torch.device) -> str:
    chosen = parse_dtype(dtype)
    if not isinstance(chosen, torch.dtype):
        chosen = torch.float32 if place.type == "cpu" else torch.bfloat16
    return str(chosen).removeprefix("torch.")


def _installed(options: KernelOptions, say: Say) -> list[tuple[Provider, Setup]]:
    """The providers that were asked for and are there, with what they loaded."""
    ops, names = options.chosen_ops(), options.chosen_providers()
    found: list[tuple[Provider, Setup]] = []
    missing: dict[str, list[str]] = {}
    for provider in ALL:
        if provider.op in ops and provider.name in names:
            try:
                found.append((provider, provider.load()))
            except Exception as error:  # a peer can fail its own import in any way
                missing.setdefault(f"{provider.name}: {said(error)}", []).append(provider.op)
    for reason, left_out in missing.items():
        say(f"left out {', '.join(left_out)} of {reason}")
    if not found and DECODE not in ops:
        raise UserError(
            f"nothing to measure: none of --providers {','.join(names)} has --ops {','.join(ops)} here"
            + ("; what is missing was said above" if missing else "")
        )
    return found


def _time_all(
    options: KernelOptions, shape: Shape, found: list[tuple[Provider, Setup]], results: _Results, say: Say
) -> None:
    clock = Clock(shape.device)
    results.facts["copy_gbps"] = copy_gbps = clock.copy_gbps()
    clock.free()
    say(f"{results.facts['hardware']}: copies at {copy_gbps:.0f} GB/s")
    for op in dict.fromkeys(provider.op for provider, _ in found):
        ours: Tensor | None = None
        for tokens in options.lengths():
            for provider, setup in found:
                if provider.op != op or (provider.quadratic and tokens > options.softmax_max_tokens):
                    continue
                with torch.autograd.set_multithreading_enabled(options.autograd_thread):
                    row, out = _measure(provider, setup, replace(shape, tokens=tokens), clock, options.only_forward)
                for name in ("forward", "forward_backward"):
                    floor = row.pop(f"{name}_bytes", None)
                    row[f"{name}_floor_ms"] = None if floor is None else floor / copy_gbps / 1e6
                if tokens == shape.tokens and out is not None:
                    if provider.name == "linearize":
                        ours = out
                    elif ours is not None and not (op == "retention" and shape.heads != shape.kv_heads):
                        # With grouped heads the peers' retention has a decay a query head.
                        row["difference"] = _difference(out, ours)
                        if not row["difference"] < SAME:
                            say(f"{op} of {provider.name} differs from linearize's by {row['difference']:.2g}")
                del out
                results.add("rows", [row])
                results.write()
                say(_line(row))
                clock.free()
    if DECODE in options.chosen_ops():
        for name in [name for name in options.chosen_providers() if name in decode_step.STEPS]:
            for batch in options.decode_batches():
                row = decode_step.measure(name, replace(shape, batch=batch, tokens=1), clock, copy_gbps)
                if "No module named" in row.get("error", ""):
                    say(f"left out decode of {name}: {row['error']}")
                    break
                results.add("decode", [row])
                say(f"decode {name} batch {batch}: " + (row.get("error") or f"{row['ms']:.4f} ms"))
                clock.free()


def _measure(
    provider: Provider, setup: Setup, shape: Shape, clock: Clock, only_forward: bool
) -> tuple[Row, Tensor | None]:
    """A row of one provider at one length, and its output."""
    row: Row = {
        "op": provider.op,
        "provider": provider.name,
        "tokens": shape.tokens,
        "forward_ms": None,
        "forward_backward_ms": None,
        "forward_peak_gib": None,
        "forward_backward_peak_gib": None,
    }
    out: Tensor | None = None
    try:
        inputs = make_inputs(provider.op, shape)
        if (path := path_taken(provider, inputs)) is not None:
            row["path"] = path
        # The floor is that of the operation's own inputs, whatever a peer makes of them.
        given = dict(inputs)
        call = setup(inputs)
        with torch.no_grad():
            out = call()  # the first call compiles and tunes
            row["forward_bytes"] = forward_bytes(given, out)
            row["forward_backward_bytes"] = row["forward_bytes"] + backward_bytes(given, out)
            row["forward_peak_gib"] = _gib(clock.peak_bytes(call))
            row["forward_ms"] = clock.milliseconds(call)
        if only_forward:
            return row, out
        grad = torch.randn_like(out)

        def both() -> None:
            call().backward(grad)

        both()
        forget_gradients(inputs)
        row["forward_backward_peak_gib"] = _gib(clock.peak_bytes(both))
        row["forward_backward_ms"] = clock.milliseconds(both, lambda: forget_gradients(inputs))
    except Exception as error:
        row["error"] = said(error)
    return row, out


def _gib(count: int | None) -> float | None:
    return None if count is None else count / GIB


def _difference(out: Tensor, reference: Tensor) -> float:
    """Relative L2 difference."""
    if out.shape != reference.shape:
        return float("inf")
    reference = reference.float()
    return float((out.float() - reference).norm() / reference.norm().clamp(min=1e-30))


def _line(row: Row) -> str:
    def shown(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.3f}"

    times = f"{shown('forward_ms')} / {shown('forward_backward_ms')} ms"
    tail = f" ({row['error']})" if "error" in row else ""
    return f"{row['op']} {row['provider']} {row['tokens']}: {times}{tail}"


def _place(row: Row) -> tuple[int, int, int]:
    """Where a row stands in the file, whichever run made it."""
    return OPS.index(row["op"]), PROVIDERS.index(row["provider"]), row["tokens"]


class _Results:
    """The growing results, and what an earlier run left in the file."""

    KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("rows", ("op", "provider", "tokens")),
        ("decode", ("provider", "batch")),
        ("cold_start", ("op", "provider")),
    )

    def __init__(
        self, options: KernelOptions, shape: Shape, out: str | Path | None, command: str | Sequence[str]
    ) -> None:
        self.path: Path | None = None
        self.old: Row = {}
        if out is not None:
            where = record.folder(out, FILE, merge=options.merge, hint=", or pass --merge to replace its rows")
            self.path = where / FILE
        elif options.merge:
            raise UsageError("--merge needs -o/--out: the folder whose rows are kept")
        facts = shape.to_dict() | {"tokens": options.lengths(), "autograd_thread": options.autograd_thread}
        self.facts: Row = {**record.header(command, shape.device), **facts}
        if self.path is not None and self.path.exists():
            self.old = record.read(self.path)
            same = ("batch", "heads", "kv_heads", "head_dim", "dtype", "hardware", "autograd_thread")
            record.check_same(self.path, self.old, self.facts, same)
        self.new: dict[str, list[Row]] = {name: [] for name, _ in self.KEYS}

    def add(self, name: str, rows: list[Row]) -> None:
        """Adds rows, each with what made it, so that rows of several runs can lie in one file."""
        origin = {key: self.facts[key] for key in ("commit", "versions", "command")}
        if "copy_gbps" in self.facts and name != "cold_start":
            origin["copy_gbps"] = self.facts["copy_gbps"]
        self.new[name] += [row | origin for row in rows]

    def write(self) -> Row:
        """The results so far, written where there is a file."""
        results = dict(self.facts)
        if "copy_gbps" not in results and "copy_gbps" in self.old:
            results["copy_gbps"] = self.old["copy_gbps"]
        for name, key in self.KEYS:
            results[name] = record.merged(self.old.get(name, []), self.new[name], key)
        results["rows"].sort(key=_place)
        results["tokens"] = sorted({row["tokens"] for row in results["rows"]}) or results["tokens"]
        if self.path is not None:
            record.write(self.path, results)
        return results
