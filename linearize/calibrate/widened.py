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
    if sum(2 * data.nbytes for _, data in held.values()) > _MOST * free_memory():
        held = {}
    wide: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for tensor, data in held.values():
        # tensors that share memory still do: what is trained in one is trained in all
        key = data.data_ptr(), data.shape, data.stride()
        tensor.data = wide.setdefault(key, data.float())
    try:
        yield
    finally:
        changed = {id(parameter) for parameter in trained}
        for name, (tensor, data) in held.items():
            if name in changed:
                data.copy_(tensor.data)
            tensor.data = data
