"""Stepwise replacement: for a stage, some swapped layers run the teacher's attention (Mamba-in-Llama, 2408.15237)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UsageError


def active_layers(active: str, swapped: Sequence[int]) -> set[int]:
    """The layers that `--active` names: "0,2,4", or "every:2" for layers 1, 3, 5, ... of those that are swapped.

    Raises UsageError for another form, for a layer that is not swapped, and for none.
    """
    text = active.replace(" ", "")
    if match := re.fullmatch(r"every:([1-9]\d*)", text):
        layers = {layer for layer in swapped if (layer + 1) % int(match[1]) == 0}
    elif re.fullmatch(r"\d+(,\d+)*", text):
        layers = {int(layer) for layer in text.split(",")}
    else:
        raise UsageError(f"--active {active!r} is not understood; give layers 0,2,4 or every:2")
    if not layers or layers - set(swapped):
        raise UsageError(f"--active {active}: the swapped layers are {', '.join(map(str, swapped))}")
    return layers


@contextmanager
def teacher_attention(student: Any, teacher: Any, active: str | None) -> Iterator[list[str]]:
    """Inside, the swapped layers that are not `active` run the teacher's attention, whose weights stay the teacher's.

    Gives the paths of those modules. The student's own come back, as they were, at the end.
    """
    if active is None:
        yield []
        return
    swapped = dict(student.mixer_layers())
    layers = active_layers(active, list(swapped))
    own = {attention.path: attention for layer, attention in swapped.items() if layer not in layers}
    config = student.base_model.config
    implementation = config._attn_implementation_internal
    for path in own:
        # shallow: the weights are shared, the training flag is not
        student.set_submodule(path, copy.copy(teacher.get_submodule(path)))
    # with softmax inside, the masks that softmax needs
    config._attn_implementation_internal = teacher.config._attn_implementation
    try:
        yield list(own)
    finally:
        config._attn_implementation_internal = implementation
        for path, attention in own.items():
            student.set_submodule(path, attention)
