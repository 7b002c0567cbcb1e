"""One operation's first call in a process of its own: `python -m linearize.bench.child JSON`, the result on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch

from . import providers
from .ops import Shape, make_inputs
from .timing import Clock, said


def first_call(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a forward, and of a forward and a backward, of a process that has not run the operation before.

    `spec` has `op`, `provider`, `backward` and the fields of `Shape`. The imports are told apart; the device's own
    start and the making of the inputs do not count.
    """
    op, name, backward = spec.pop("op"), spec.pop("provider"), spec.pop("backward")
    shape = Shape(**spec)
    found: dict[str, Any] = {"import_s": None, "forward_s": None, "forward_backward_s": None}
    try:
        clock = Clock(shape.device)
        inputs = make_inputs(op, shape)
        (inputs["q"] @ inputs["q"].mT).sum().item()
        started = time.perf_counter()
        setup = providers.find(op, name).load()
        found["import_s"] = time.perf_counter() - started
        call = setup(inputs)
        clock.synchronize()
        started = time.perf_counter()
        out = call()
        clock.synchronize()
        found["forward_s"] = time.perf_counter() - started
        if backward:
            out.backward(torch.ones_like(out))
            clock.synchronize()
            found["forward_backward_s"] = time.perf_counter() - started
    except Exception as error:
        found["error"] = said(error)
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what a peer prints is no result
        result = first_call(json.loads(sys.argv[1]))
    print(json.dumps(result))
