"""Data parallel training: a batch is the batch of all processes together, and each takes some of its rows.

So the number of processes changes how long a step takes, and nothing else: the order of the data, the steps and the
losses are those of one process, and a checkpoint goes on under another number. Losses are sums over a batch's rows or
tokens divided by the whole batch's, so gradients and figures are summed over the processes once a step, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import processes
from ..errors import UsageError
from .feed import Item
from .options import TrainOptions

_BUCKET = 2**24  # numbers that are summed at once


def check_batch(options: TrainOptions) -> None:
    """Raises UsageError for a batch of which some process would have no row."""
    if options.batch_size < processes.count():
        raise UsageError(
            f"--batch-size {options.batch_size} is the batch of all {processes.count()} processes together, and each "
            "needs a row of it: raise it (and lower --gradient-accumulation), or start fewer processes"
        )


def own_rows(batch: Item) -> Item:
    """Of a whole batch the rows that are this process's: neighbours, at most one more here than there."""
    if not processes.several():
        return batch
    rows = len(next(iter(batch.values())))
    here, all_of_them = processes.rank(), processes.count()
    mine = slice(rows * here // all_of_them, rows * (here + 1) // all_of_them)
    return {name: value[mine] for name, value in batch.items()}


def total(value: Tensor) -> Tensor:
    """The sum of a tensor without gradient over all processes."""
    if not processes.several():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def totals(loss: Tensor, parts: dict[str, Tensor], asked: bool) -> tuple[Tensor, dict[str, Tensor], bool]:
    """The sums over all processes of a loss and its parts, and whether any of them was `asked` to stop."""
    flat = [loss.detach().flatten(), *(part.detach().flatten().to(loss.dtype) for part in parts.values())]
    sums = total(torch.cat([*flat, loss.new_tensor([float(asked)])]))
    pieces = sums.split([len(piece) for piece in flat] + [1])
    shaped = [piece.view(like.shape) for piece, like in zip(pieces, [loss, *parts.values()], strict=False)]
    return shaped[0], dict(zip(parts, shaped[1:], strict=True)), bool(pieces[-1].item())


def meet() -> None:
    """Waits until every process has come here."""
    if processes.several():
        dist.barrier()


@torch.no_grad()
def same_start(parameters: Iterable[nn.Parameter]) -> None:
    """What trains begins as the main process has it."""
    if processes.several():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums gradients over the processes, in place.

    A parameter that got none anywhere keeps None, as in one process, where the optimizer passes it over: layers that a
    step leaves out, the windows or the linear branches that it switches off.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    present = total(torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device))
    found = [p for p, here in zip(trained, present.tolist(), strict=True) if here]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in found if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(held.numel() for held in bucket) + gradient.numel() > _BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
