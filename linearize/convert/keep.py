"""`--keep-softmax`: which layers, or which query heads of which layers, stay softmax."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UsageError
from ..modeling import AttentionAnatomy

FORMS = "layers '0,7,14', every n-th layer 'every:6', or heads as layer.head 'heads:18.6,17.3'"


def kept_heads(keep: str | Sequence[int] | None, anatomies: Sequence[AttentionAnatomy]) -> dict[int, list[int]]:
    """Query heads that stay softmax, by layer; a layer with all of its heads is left untouched.

    Args:
        keep: the flag's text, a list of layers, or None. `every:n` keeps layers n-1, 2n-1, ...: the last of each n.
        anatomies: one a layer.

    Raises:
        UsageError: the text is in none of the forms, or an index is out of range.
    """
    count = len(anatomies)

    def layer(text: str | int) -> int:
        index = int(text)
        if not 0 <= index < count:
            raise UsageError(f"--keep-softmax: layer {index} is out of range, the model has layers 0 to {count - 1}")
        return index

    if keep is None or keep == "" or keep == []:
        return {}
    if isinstance(keep, str):
        keep = keep.replace(" ", "")
    if not isinstance(keep, str):
        layers = [layer(index) for index in keep]
    elif match := re.fullmatch(r"every:([1-9]\d*)", keep):
        step = int(match[1])
        layers = list(range(step - 1, count, step))
        if not layers:
            raise UsageError(f"--keep-softmax {keep} keeps nothing: the model has only {count} layers")
    elif re.fullmatch(r"\d+(,\d+)*", keep):
        layers = [layer(index) for index in keep.split(",")]
    elif re.fullmatch(r"heads:\d+\.\d+(,\d+\.\d+)*", keep):
        kept: dict[int, set[int]] = {}
        for pair in keep.removeprefix("heads:").split(","):
            index, head = pair.split(".")
            heads = anatomies[layer(index)].num_heads
            if int(head) >= heads:
                raise UsageError(
                    f"--keep-softmax: head {pair} is out of range, layer {index} has heads 0 to {heads - 1}"
                )
            kept.setdefault(int(index), set()).add(int(head))
        return {index: sorted(heads) for index, heads in sorted(kept.items())}
    else:
        raise UsageError(f"--keep-softmax {keep!r} is not understood; give {FORMS}")
    return {index: list(range(anatomies[index].num_heads)) for index in sorted(set(layers))}
