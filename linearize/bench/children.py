"""Child processes: Triton's cache filled by many at once, and cold starts from an empty one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .ops import Shape
from .providers import Provider

TIMEOUT = 900.0  # of one child, in seconds
Say = Callable[[str], None]
_ROOT = Path(__file__).resolve().parents[2]


def _run(provider: Provider, shape: Shape, backward: bool, environment: dict[str, str]) -> dict[str, Any]:
    spec = {"op": provider.op, "provider": provider.name, "backward": backward, **asdict(shape)}
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        result = subprocess.run(
            [sys.executable, "-m", "linearize.bench.child", json.dumps(spec)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {TIMEOUT:.0f} s"}
    try:
        return json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "nothing said")
        return {"error": f"the child ended with code {result.returncode}: {last.strip()[:240]}"}


def warm_cache(tasks: Sequence[Provider], shape: Shape, *, backward: bool, jobs: int, say: Say) -> None:
    """Runs every task once, `jobs` at a time, so that the kernels it compiles lie in Triton's cache on disk.

    What a peer's autotuning finds on a crowded GPU is not kept (FLA_CACHE_RESULTS): it tunes again, alone, with the
    kernels compiled already.
    """

    def one(provider: Provider) -> None:
        found = _run(provider, shape, backward, {"FLA_CACHE_RESULTS": "0"})
        if "error" in found:
            say(f"warming {provider.op} of {provider.name}: {found['error']}")

    say(f"filling Triton's cache: {len(tasks)} operations, {jobs} at a time")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, tasks))


def cold_starts(
    tasks: Sequence[Provider], shape: Shape, *, backward: bool, jobs: int, say: Say
) -> list[dict[str, Any]]:
    """A row a task: seconds of its first calls in a new process with empty caches on disk."""

    def one(provider: Provider) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="linearize-cold-") as empty:
            places = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
            found = _run(provider, shape, backward, places)
        row = {"op": provider.op, "provider": provider.name, "tokens": shape.tokens, "jobs": jobs, **found}
        seconds = row.get("forward_backward_s") or row.get("forward_s")
        say(f"cold start, {row['op']} {row['provider']}: {found.get('error') or f'{seconds:.1f} s'}")
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, tasks))
