"""Which key groups matter most as softmax: scores measured on the teacher itself.

"gradient": the teacher with all far keys behind gates (probe.py) is brought back from its window and sinks to itself,
and each head's share of the fall in KL(teacher || probe) is the integral of the gradient along the way (integrated
gradients, Sundararajan et al. 2017, 1703.01365). The best units are kept open and the rest is measured again, because
heads work together: of two that do the same only one is needed, and a pair that needs each other shows once one is
there. The text is passages that come twice, so that both prose and recall count.

"induction": attention from a token to what followed its previous occurrence, the mean over the second copy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..distill.losses import IGNORED, head_losses, head_of, prove_head
from ..errors import UsageError
from ..surgery.keep import Wanted, heads_text
from .capture import attentions_of, watch
from .probe import probe_of
from .statistics import probabilities
from .widened import widened

METHODS = ("gradient", "induction")
# Points of the way from the window alone to the teacher: the fall is steepest at its beginning.
POINTS = (0.05, 0.3)
ROUNDS = 3
CHUNK = 512


@dataclass
class Scores:
    """Measured scores [layers, groups], None where the teacher's own window bounds the keys, and what was chosen:
    (layer, group) pairs."""

    method: str
    scores: list[list[float | None]]
    chosen: list[tuple[int, int]]
    keep_softmax: str
    passages: int
    length: int
    window: int
    sinks: int
    seconds: float = 0.0
    text: str | None = None  # where the passages are from: a DATASET, or "embedded"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    teacher: Any, passages: Tensor, wanted: Wanted, *, window: int, sinks: int, method: str = "gradient"
) -> Scores:
    """Chooses `wanted` by scores measured on `passages` [N, L] of ids, each shown twice.

    Raises:
        UsageError: no such method.
    """
    if method not in METHODS:
        raise UsageError(f"--keep-score must be one of {', '.join(METHODS)}, got {method!r}")
    started = time.monotonic()
    device = next(teacher.parameters()).device
    probe = probe_of(teacher, window=window, sinks=sinks)
    passages = passages.to(device)
    anatomies = [attention.anatomy for _, attention in probe.mixer_layers()]
    unbounded = [anatomy.window is None for anatomy in anatomies]
    assert any(unbounded), "parse_auto refuses such a teacher"
    with widened(teacher, probe):
        if method == "induction":
            scores = _induction(teacher, probe, passages)
            chosen = _best(scores, [], wanted, unbounded)
        else:
            scores, chosen = _gradient(teacher, probe, passages, wanted, unbounded)
    return Scores(
        method=method,
        scores=[[None if x != x else round(x, 6) for x in row] for row in scores.tolist()],
        chosen=sorted(chosen),
        keep_softmax=heads_text(sorted(chosen), anatomies),
        passages=len(passages),
        length=passages.shape[1],
        window=window,
        sinks=sinks,
        seconds=round(time.monotonic() - started, 1),
    )


Pair = tuple[int, int]


def _best(scores: Tensor, kept: Sequence[Pair], wanted: Wanted, unbounded: Sequence[bool]) -> list[Pair]:
    """`kept`, and the best of the others until there are as many as are wanted."""
    groups = scores.shape[1]
    if wanted.layers:
        have = sorted({layer for layer, _ in kept})
        total = scores.nansum(1)
        free = [i for i in range(len(total)) if unbounded[i] and i not in have]
        free.sort(key=lambda i: -float(total[i]))
        layers = [*have, *free[: wanted.count - len(have)]]
        return [(layer, group) for layer in layers for group in range(groups)]
    free_pairs = [(i, g) for i in range(len(scores)) for g in range(groups) if unbounded[i] and (i, g) not in set(kept)]
    free_pairs.sort(key=lambda pair: -float(scores[pair]))
    chosen = list(kept)
    for pair in free_pairs:
        if len(chosen) == wanted.count:
            break
        if not wanted.partial or sum(layer == pair[0] for layer, _ in chosen) < groups - 1:
            chosen.append(pair)
    return chosen


@torch.no_grad()
def _induction(teacher: Any, probe: Any, passages: Tensor) -> Tensor:
    """Attention [layers, groups] of the group's best head from a token of the second copy to the one after its
    first."""
    attentions = attentions_of(probe)
    length = passages.shape[1]
    sums: dict[int, Tensor] = {}
    row = torch.arange(length, 2 * length, device=passages.device)

    def add(layer: int, seen: Any) -> None:
        p = probabilities(attentions[layer].anatomy, seen, 0)[:, length:]
        found = p[:, row - length, row - length + 1].mean(-1)
        sums[layer] = sums[layer] + found if layer in sums else found

    for passage in logging.tqdm(passages, desc="scoring"):
        watch(teacher, attentions, passage.repeat(2)[None], add)
    rows = [sums[layer].unflatten(0, (attentions[layer].anatomy.num_kv_heads, -1)).amax(1) for layer in sorted(sums)]
    return (torch.stack(rows) / len(passages)).cpu()


@torch.enable_grad()
def _gradient(
    teacher: Any, probe: Any, passages: Tensor, wanted: Wanted, unbounded: Sequence[bool]
) -> tuple[Tensor, list[Pair]]:
    """The scores of the first round, and what all rounds chose."""
    gates = [attention.mixer.gate for _, attention in probe.mixer_layers()]
    groups = probe.mixer_layers()[0][1].anatomy.num_kv_heads
    rows = passages.repeat(1, 2)
    prove_head(teacher)
    with torch.no_grad():
        targets = [teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state for ids in rows.split(2)]
    bounded = torch.tensor([not free for free in unbounded])
    first: Tensor | None = None
    chosen: list[Pair] = []
    bar = logging.tqdm(total=ROUNDS * len(POINTS) * len(targets), desc="scoring")
    for turn in range(1, ROUNDS + 1):
        total = torch.zeros(len(gates), gates[0].numel(), dtype=torch.float64)
        base = torch.zeros(len(gates), groups)
        for layer, group in chosen:
            base[layer, group] = 1
        # What is bounded already costs nothing and stays as it is.
        base[bounded] = 1
        base = base.repeat_interleave(gates[0].numel() // groups, dim=1)
        for point in POINTS:
            with torch.no_grad():
                for gate, value in zip(gates, base + (1 - base) * point, strict=True):
                    gate.copy_(value)
            for ids, target in zip(rows.split(2), targets, strict=True):
                hidden = probe.base_model(input_ids=ids, use_cache=False).last_hidden_state
                labels = ids.clone()
                labels[:, 0] = IGNORED
                kl, _ = head_losses(
                    hidden, labels, head_of(probe), teacher_hidden=target, teacher_head=head_of(teacher), chunk=CHUNK
                )
                for layer, slope in enumerate(torch.autograd.grad(kl, gates)):
                    total[layer] -= slope.double().cpu() / (len(POINTS) * rows.numel())
                bar.update()
        scores = total.unflatten(1, (groups, -1)).sum(-1)
        scores[bounded] = float("nan")
        first = scores if first is None else first
        part = replace(wanted, count=-(-wanted.count * turn // ROUNDS))
        chosen = _best(scores, chosen, part, unbounded)
    bar.close()
    assert first is not None
    return first, chosen
