"""The losses of the three stages, in fp32 whatever the models' precision.

Shapes: B sequences, T positions, D hidden size, V vocabulary, N valid tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import UserError

Head = Callable[[Tensor], Tensor]
IGNORED = -100
# Of what `prove_head` tries, and how far it may be off, relative: bf16 has two digits.
HEAD_TOKENS, HEAD_TOLERANCE = 8, 0.02


def widened(tensor: Tensor) -> Tensor:
    """At least fp32: half precision is widened, fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def itself(value: Tensor) -> Tensor:
    return value


def relative_loss(
    student: Tensor,
    teacher: Tensor,
    unit: Tensor,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = itself,
) -> Tensor:
    """|s - t|^2 / |u|^2, a scalar, from [B, T, D] each; `valid` [B, T] bool leaves padding out of both sums.

    `total` makes the whole batch's |u|^2 of this process's, where the batch is that of several."""
    if valid is not None:
        student, teacher, unit = student[valid], teacher[valid], unit[valid]
    energy = total(widened(unit).square().sum())
    error = (widened(student) - widened(teacher)).square().sum()
    return error / energy.clamp_min(torch.finfo(energy.dtype).tiny)


def transfer_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    kind: str = "relative",
    total: Callable[[Tensor], Tensor] = itself,
) -> Tensor:
    """The error of an attention layer's output, a scalar: see `TransferOptions` for the kinds.

    `student`, `teacher` [B, T, D]; `valid` [B, T] bool leaves padding out. The unit of "relative" makes layers
    comparable: late layers have far larger outputs and would own a plain sum of squares.
    """
    if kind == "relative":
        return relative_loss(student, teacher, teacher, valid, total)
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    error = widened(student) - widened(teacher)
    if kind == "mse":
        return error.square().mean()
    assert kind == "l2", kind
    # a norm has no gradient at 0, where a layer is its teacher already
    tiny = torch.finfo(error.dtype).tiny
    return error.square().mean(-1).clamp_min(tiny).sqrt().mean()


def next_token_labels(labels: Tensor) -> Tensor:
    """`labels` [B, T] moved so that position t holds the label of its prediction, token t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def count_targets(labels: Tensor) -> Tensor:
    """Number of predictions that `labels` [B, T] score."""
    return (labels[:, 1:] != IGNORED).sum()


def scored_tokens(labels: Tensor) -> Tensor:
    """Places of the predictions that `labels` [B, T] score among the B * T flattened ones, LongTensor [N]."""
    return (next_token_labels(labels).flatten() != IGNORED).nonzero().squeeze(-1)


def head_of(model: torch.nn.Module) -> Head:
    """From final hidden states [..., D] to logits [..., V] as `model` computes them, factor and soft cap included."""
    project = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    # Cohere's and Granite's factors
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None and factor == 1.0:
        return project
    if cap is None:
        return lambda hidden: project(hidden) * factor
    return lambda hidden: cap * torch.tanh(project(hidden) * factor / cap)


@torch.no_grad()
def prove_head(model: Any) -> None:
    """Raises UserError where `head_of` does not give the model's own logits, tried on a few tokens."""
    weight = model.get_output_embeddings().weight
    ids = torch.arange(HEAD_TOKENS, device=weight.device).remainder(weight.shape[0])[None]
    training = model.training
    model.eval()
    try:
        theirs = widened(model(input_ids=ids, use_cache=False).logits)
        ours = widened(head_of(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state))
    finally:
        model.train(training)
    if not float((ours - theirs).norm()) <= HEAD_TOLERANCE * float(theirs.norm()):
        raise UserError(
            f"{type(model).__name__} does more to its logits than its head and what is known (final_logit_softcapping, "
            "logit_scale, logits_scaling): its logits cannot be made from hidden states"
        )


def _chunk_losses(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    head: Head,
    teacher_head: Head | None,
    temperature: float,
    with_ce: bool,
) -> tuple[Tensor, Tensor]:
    logits = widened(head(hidden))
    kl = logits.new_zeros(())
    ce = logits.new_zeros(())
    if teacher_head is not None:
        assert teacher_hidden is not None
        with torch.no_grad():
            target = F.log_softmax(widened(teacher_head(teacher_hidden)) / temperature, dim=-1)
        log_student = F.log_softmax(logits / temperature, dim=-1)
        kl = F.kl_div(log_student, target, reduction="sum", log_target=True) * temperature**2
    if with_ce:
        ce = F.cross_entropy(logits, labels, reduction="sum")
    return kl, ce


@functools.cache
def _compiled_chunk_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_chunk_losses)


def head_losses(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    with_ce: bool = False,
    scored: Tensor | None = None,
    chunk: int = 1024,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums over the scored tokens of KL(teacher || student) and of cross-entropy, a chunk at a time.

    `hidden`, `teacher_hidden` [B, T, D] are final hidden states, `labels` [B, T] unshifted with -100 where
    nothing is scored; `scored` is `scored_tokens(labels)`, for who has it. Without a teacher KL is 0; without `with_ce`
    cross-entropy is 0. KL is multiplied by temperature^2, so that its gradient keeps its size (Hinton, 1503.02531).

    Each chunk is recomputed in the backward pass: at most `chunk` x V logits of each model exist at any time. With
    `compiled` they are read fewer times.
    """
    scored = scored_tokens(labels) if scored is None else scored
    targets = next_token_labels(labels).flatten().index_select(0, scored)
    hidden = hidden.flatten(0, 1).index_select(0, scored)
    # chunks of one size, where they can be: a compiled program is for one
    count = max(math.ceil(len(targets) / chunk), 1)
    chunk = max(math.ceil(len(targets) / count), 1)
    losses = _compiled_chunk_losses() if compiled else _chunk_losses
    # split, not slices: backward, a split is one concatenation, each slice a full-size tensor of zeros
    chunks = hidden.split(chunk)
    teacher_chunks: tuple[Tensor | None, ...] = (None,) * len(chunks)
    if teacher_hidden is not None:
        teacher_chunks = teacher_hidden.flatten(0, 1).index_select(0, scored).split(chunk)
    kl = ce = widened(hidden.new_zeros(()))
    for part, teacher_part, target in zip(chunks, teacher_chunks, targets.split(chunk), strict=True):
        part_kl, part_ce = checkpoint(
            losses,
            part,
            teacher_part,
            target,
            head,
            teacher_head,
            temperature,
            with_ce,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        kl, ce = kl + part_kl, ce + part_ce
    return kl, ce
