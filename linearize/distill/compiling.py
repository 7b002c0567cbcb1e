"""What `--compile` compiles: whole decoder layers where a stage runs them, else swapped attention, else the mixers.

Layers of one shape share one compiled program, the student's and the teacher's each their own. It joins what surrounds
the products and kernels: casts, norms, rotations, feature maps, gates, residuals, and their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Programs of one layer's code: each number of kept key groups and each branch that is switched off has its own.
PROGRAMS = 64


def mixers(student: Any) -> list[nn.Module]:
    return [attention.mixer for _, attention in student.mixer_layers()]


def attentions(student: Any) -> list[Any]:
    """The swapped attention modules, with the tensors that compiled code cannot make for all of them alike."""
    found = []
    for _, attention in student.mixer_layers():
        attention.routes(attention.device)
        attention.bend(attention.device)
        found.append(attention)
    return found


def decoder_layers(student: Any, model: Any) -> list[nn.Module]:
    """Every layer of `model`, the student or its teacher, that lies beside the student's swapped ones."""
    attentions(student)
    return stacked_layers(student, model)


def stacked_layers(student: Any, model: Any) -> list[nn.Module]:
    """As `decoder_layers`, for other uses."""
    stacks = dict.fromkeys(attention.anatomy.stack_path for _, attention in student.mixer_layers())
    return [layer for path in stacks for layer in model.get_submodule(path)]


@contextmanager
def compiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, calls of the modules run compiled; they are left as they were."""
    modules = list(modules)
    for module in modules:
        module.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
