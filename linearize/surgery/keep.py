"""`--keep-softmax`: which layers, or which query heads of which layers, stay softmax."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..modeling import AttentionAnatomy

FORMS = (
    "layers '0,7,14', every n-th layer 'every:6', heads as layer.head 'heads:18.6,17.3', or by measured scores "
    "'auto:5' layers and 'heads:auto:10%' of the KV bytes"
)


@dataclass(frozen=True)
class Wanted:
    """What `auto` asks for: `count` layers, or `count` key groups; with `partial` of no layer all of them."""

    layers: bool
    count: int
    partial: bool = False


def parse_auto(
    keep: str | Sequence[int] | None, anatomies: Sequence[AttentionAnatomy], keep_window: int | None = None
) -> Wanted | None:
    """What `auto:5`, `auto:20%`, `heads:auto:9` or `heads:auto:10%` asks for; None for every other form.

    Only layers whose keys the teacher does not bound by a window of its own are to choose from, and shares are of them.
    Bounded by `keep_window`, heads stay in layers that have a mixer too.

    Raises:
        UsageError: a number out of range.
    """
    match = re.fullmatch(r"(heads:)?auto:(\d+(?:\.\d+)?)(%?)", keep.replace(" ", "")) if isinstance(keep, str) else None
    if match is None:
        return None
    free = [anatomy for anatomy in anatomies if anatomy.window is None]
    whole = sum(anatomy.num_kv_heads for anatomy in free) if match[1] else len(free)
    what = "key groups" if match[1] else "layers"
    if not whole:
        raise UsageError(f"--keep-softmax {keep}: the teacher's own window bounds every layer; name what to keep")
    partial = keep_window is not None
    if partial and not match[1]:
        raise UsageError(
            f"--keep-window bounds heads, and --keep-softmax {keep} keeps whole layers: give heads:auto:..."
        )
    room = whole - len(free) if partial else whole
    amount = float(match[2])
    if match[3]:
        if not 0 < amount <= 100:
            raise UsageError(f"--keep-softmax {keep}: a share is above 0 and at most 100 %")
        amount = max(1, int(whole * amount / 100 + 1e-9))
    if amount != int(amount) or not 1 <= amount <= room:
        given = " with --keep-window, which leaves each layer one" if partial else ""
        raise UsageError(f"--keep-softmax {keep}: the model has {room} {what} to choose from{given}; give 1 to {room}")
    return Wanted(not match[1], int(amount), partial)


def check_keep_window(
    keep_window: int | None, kept: Mapping[int, Sequence[int]], anatomies: Sequence[AttentionAnatomy]
) -> None:
    """Raises UsageError for a window of kept heads that is out of range, or that has no heads, or whole layers, which
    stay the teacher's own."""
    if keep_window is None:
        return
    if keep_window < 2:
        raise UsageError(f"--keep-window must be at least 2, got {keep_window}")
    if not kept:
        raise UsageError("--keep-window is for heads that stay softmax: name them with --keep-softmax heads:...")
    whole = [index for index, heads in kept.items() if len(heads) == anatomies[index].num_heads]
    if whole:
        raise UsageError(
            f"--keep-window bounds heads, and layer {', '.join(map(str, whole))} is kept whole, as the teacher's own "
            "module: leave it a key group"
        )


def as_many(wanted: Wanted, anatomies: Sequence[AttentionAnatomy]) -> str | list[int]:
    """As many layers or key groups as are wanted, spread evenly: what a plan counts with before scores are measured."""
    free = [index for index, anatomy in enumerate(anatomies) if anatomy.window is None]
    if wanted.layers:
        return [free[(2 * i + 1) * len(free) // (2 * wanted.count)] for i in range(wanted.count)]
    groups = [(index, group) for index in free for group in range(anatomies[index].num_kv_heads - wanted.partial)]
    chosen = [groups[(2 * i + 1) * len(groups) // (2 * wanted.count)] for i in range(wanted.count)]
    return heads_text(chosen, anatomies)


def heads_text(groups: Sequence[tuple[int, int]], anatomies: Sequence[AttentionAnatomy]) -> str:
    """`heads:...` of all query heads of the (layer, key group) pairs."""
    heads = []
    for layer, group in groups:
        size = anatomies[layer].group_size
        heads += [f"{layer}.{group * size + member}" for member in range(size)]
    return "heads:" + ",".join(heads)


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
    if parse_auto(keep, anatomies) is not None:
        raise UsageError(f"--keep-softmax {keep} is chosen by scores, which `linearize convert` measures first")
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
