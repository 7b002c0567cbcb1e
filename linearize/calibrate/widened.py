"""Measuring in fp32 what a CPU holds in bf16 or fp16: without instructions for these it takes several times as long."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from ..memory import free_memory

HALVES = (torch.bfloat16, torch.float16)
# Of the memory that is free: activations need some, too.
_MOST = 0.6


@contextmanager
def widened(*models: nn.Module, trained: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, the models' half-precision tensors on the CPU are fp32, where memory allows it; a context manager.

    They are what they were afterwards, but for `trained`, which are rounded.
    """
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models):
        if tensor.device.type == "cpu" and tensor.dtype in HALVES:
            held[id(tensor)] = tensor, tensor.data
    # tensors that share memory still do: what is trained in one is trained in all
    sizes = {_place(data): 2 * data.nbytes for _, data in held.values()}
    if sum(sizes.values()) > _MOST * free_memory():
        held = {}
    wide: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    changed = {id(parameter) for parameter in trained}
    try:
        for tensor, data in held.values():
            place = _place(data)
            if place not in wide:
                wide[place] = data.float()
            tensor.data = wide[place]
        yield
    finally:
        for name, (tensor, data) in held.items():
            if name in changed:
                data.copy_(tensor.data)
            tensor.data = data


def _place(data: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return data.data_ptr(), data.shape, data.stride()
