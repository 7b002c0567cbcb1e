"""Where an operation runs: tensors on a GPU take the Triton kernels, all others the reference in plain torch.

`LINEARIZE_KERNELS=reference` or `=triton` forces one of the two; unset or `auto` chooses by device. fp64 and heads of
more than 256 channels always take the reference. This folder is copied beside the weights, so the kernels are looked
for and not required: without linearize installed the reference runs on the GPU too.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .delta_reference import delta_rule as reference_delta_rule
from .join_reference import join_norm as reference_join_norm
from .join_reference import join_share as reference_join_share
from .reference import linear_attention as reference_linear_attention
from .reference import taylor_attention as reference_taylor_attention
from .reference import window_attention as reference_window_attention
from .step_reference import linear_step as reference_linear_step
from .step_reference import window_step as reference_window_step

Operation = TypeVar("Operation", bound=Callable[..., Any])
CHOICES = ("auto", "triton", "reference")
MOST_CHANNELS = 256  # of a head, in a kernel


# Each operation's module in linearize.kernels; "" for the package.
_PLACES = {
    "delta_rule": "",
    "linear_attention": "",
    "taylor_attention": "",
    "window_attention": "",
    "join_norm": ".join",
    "join_share": ".join",
    "linear_step": ".step",
    "window_step": ".step_window",
}


_loaded: dict[str, Callable[..., Any]] = {}


@functools.cache
def _load() -> ImportError | None:
    """Finds all kernels, or gives what says why there are none. The dictionary is filled at once: what another thread
    or compiled code has read of it must not change under them."""
    try:
        found = {name: getattr(importlib.import_module("linearize.kernels" + at), name) for name, at in _PLACES.items()}
    except ImportError as error:
        return error
    _loaded.update(found)
    return None


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"running the pure-torch operations on the GPU ({reason}): same numbers, slower. "
        "`pip install linearize` with triton brings the Triton kernels",
        stacklevel=2,
    )


def wants_kernels(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` takes the kernels.

    Raises:
        ValueError: LINEARIZE_KERNELS has an unknown value, or asks for kernels that cannot be imported.
    """
    return _choose(tensor.device.type == "cuda", tensor.dtype == torch.float64)


@torch.compiler.assume_constant_result
def _choose(on_gpu: bool, wide: bool) -> bool:
    """`wants_kernels`, and loads them. Compiled code is made with the answer."""
    choice = os.environ.get("LINEARIZE_KERNELS", "auto") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"LINEARIZE_KERNELS is {choice!r}; it may be {', '.join(CHOICES)}")
    if choice == "reference" or wide or (choice == "auto" and not on_gpu):
        return False
    missing = _load()
    if missing is None:
        return True
    if choice == "triton":
        raise ValueError(f"LINEARIZE_KERNELS=triton, but the kernels cannot be imported: {missing}")
    _say_once(str(missing))
    return False


def takes_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether an operation runs its kernel on these tensors; raises as `wants_kernels`."""
    return max(k.shape[-1], v.shape[-1]) <= MOST_CHANNELS and wants_kernels(q)


def _routed(reference: Operation, takes: Callable[..., bool] = takes_kernels) -> Operation:
    name = reference.__name__

    @functools.wraps(reference)
    def run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        if takes(q, k, v):
            return _loaded[name](q, k, v, *args, **kwargs)
        return reference(q, k, v, *args, **kwargs)

    return cast(Operation, run)


def _steps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """A decoding step's kernel takes heads of any size."""
    return wants_kernels(q)


def _joins(out: Tensor, *_: Any) -> bool:
    return out.shape[-1] <= MOST_CHANNELS and wants_kernels(out)


delta_rule = _routed(reference_delta_rule)
join_norm = _routed(reference_join_norm, _joins)
join_share = _routed(reference_join_share, _joins)
linear_attention = _routed(reference_linear_attention)
linear_step = _routed(reference_linear_step, _steps)
taylor_attention = _routed(reference_taylor_attention)
window_attention = _routed(reference_window_attention)
window_step = _routed(reference_window_step, _steps)
