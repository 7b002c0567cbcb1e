"""`taylor_attention`, Based's second-order Taylor linear attention, on the kernels of taylor_kernels.py.

Shapes, as in `linearize.modeling.reference`:
    q [B, T, H, D]   k [B, T, G, D]   v [B, T, G, V]   key_weight [B, T, G]   out [B, T, H, V]   z [B, T, H]
    state [N, G, F, V] and [N, G, F], F = 1 + D + D (D + 1) / 2   C tokens of a chunk   S segments of time

Where heads alone are too few programs, time is cut into segments: a first launch adds up each segment's own state, and
the programs of the next ones join those before their own. The backward pass has a launch for dq, which starts from the
forward pass's states, one for the states that go back in time, and one each for dv (with the weights' gradient) and dk.
The sums of features before each chunk, which the normaliser's gradient needs, are kept by the sweeps of out and dv.

Source: Arora et al. 2024 (Based, 2402.18668); the segments are those of sequence parallelism (LASP-2, 2502.07563).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from linearize.modeling.reference import LinearState
from linearize.modeling.reference import taylor_attention as reference_taylor_attention

from .common import (
    INTERPRETED,
    Launch,
    check_bounds,
    check_heads,
    check_shape,
    on_device,
    opaque,
    power_of_2,
    precision,
    prepared,
    refuse_second_derivative,
)
from .taylor_kernels import gradient_kernel, sweep_kernel


class Tile(NamedTuple):
    """State columns and features of a block, warps of a program, loads in flight."""

    width: int
    block: int
    warps: int
    stages: int


# (launch, regime) to tile: 16-bit operands, fp32 ones, and either with more than MANY features.
TILES: dict[tuple[str, str], Tile] = {
    ("states", "half"): Tile(64, 64, 4, 3),
    ("sweep", "half"): Tile(64, 64, 4, 2),
    ("gradient", "half"): Tile(64, 64, 4, 2),
    ("states", "float"): Tile(32, 64, 4, 1),
    ("sweep", "float"): Tile(32, 64, 4, 1),
    ("gradient", "float"): Tile(16, 64, 4, 1),
    ("states", "many"): Tile(16, 128, 4, 1),
    ("sweep", "many"): Tile(16, 128, 4, 1),
    ("gradient", "many"): Tile(16, 128, 4, 1),
}
# Tokens of a chunk, the same in all launches of a call.
CHUNK = {"half": 64, "float": 32, "many": 32}
MANY = 256
# Programs that fill the device: two on each of an H100's or H200's 132 multiprocessors.
PROGRAMS = 264
# Chunks of a segment, at least, and segments at most: the last program reads all states before its own.
LEAST_CHUNKS = 4
MOST_SEGMENTS = 32
# More channels than this have too many features for registers: the reference takes them.
MOST_CHANNELS = 32


class _Plan:
    """What all launches of one shape share, worked out once: short texts would wait for the host."""

    def __init__(
        self,
        documents: int,
        tokens: int,
        heads: int,
        groups: int,
        channels: int,
        columns: int,
        packed: bool,
        regime: str,
        operand: tl.dtype,
        precision: str,
    ) -> None:
        self.documents, self.tokens, self.heads, self.groups = documents, tokens, heads, groups
        self.channels, self.columns, self.packed, self.regime = channels, columns, packed, regime
        self.operand, self.precision = operand, precision
        self.features = 1 + channels + channels * (channels + 1) // 2
        chunk = CHUNK[regime]
        # how many chunks are numbered, over all documents
        self.chunks = tokens // chunk + documents if packed else documents * -(-tokens // chunk)
        self.sweep_tiles, self.gradient_tiles = self.tile("sweep")[1], self.tile("gradient")[1]
        self.forward_segments, self.backward_segments = self._segments(heads), self._segments(groups)
        self.launches: dict[tuple[bool | int, ...], tuple[Launch, int]] = {}

    def tile(self, kind: str) -> tuple[Tile, int, tuple[int, ...]]:
        """The tile of a launch, how many cover the columns, and the kernels' constants D to LAST."""
        tile = TILES[kind, self.regime]
        width = min(tile.width, power_of_2(self.columns))
        blocks = -(-self.features // tile.block)
        last = power_of_2(self.features - (blocks - 1) * tile.block)
        block = last if blocks == 1 else tile.block
        chunk = CHUNK[self.regime]
        constants = (self.channels, self.columns, power_of_2(self.channels), width, chunk, blocks, block, last)
        return tile, -(-self.columns // width), constants

    def _segments(self, heads: int) -> int:
        """Segments of time for a sweep over `heads`, from shapes alone."""
        programs = self.documents * heads * self.sweep_tiles
        chunks = self.tokens // CHUNK[self.regime] // (self.documents if self.packed else 1)
        return max(1, min(PROGRAMS // max(programs, 1), chunks // LEAST_CHUNKS, MOST_SEGMENTS))

    def sweep(
        self, states: bool, reverse: bool, segments: int, weighted: bool, begun: bool, ended: bool, totals: bool
    ) -> tuple[Launch, int]:
        """`sweep_kernel` and its programs; `states` for the segments' own states alone."""
        key = (states, reverse, segments, weighted, begun, ended, totals)
        if key not in self.launches:
            tile, tiles, shape = self.tile("states" if states else "sweep")
            heads = self.groups if reverse or states else self.heads
            constants = (
                *shape,
                self.heads // self.groups if reverse else 1,
                32 * tile.warps,
                not states,
                reverse,
                weighted,
                int(begun),
                ended,
                totals,
                self.packed,
                self.operand,
                self.precision,
            )
            programs = self.documents * (segments - states) * heads * tiles
            self.launches[key] = prepared(sweep_kernel, constants, tile.warps, tile.stages), programs
        return self.launches[key]

    def gradient(self, reverse: bool, segments: int, weighted: bool, begun: bool) -> tuple[Launch, int]:
        """`gradient_kernel` and its programs."""
        key = (reverse, segments, weighted, begun)
        if key not in self.launches:
            tile, tiles, shape = self.tile("gradient")
            constants = (
                *shape,
                self.heads // self.groups if reverse else 1,
                32 * tile.warps,
                reverse,
                weighted,
                int(begun),
                self.packed,
                self.operand,
                self.precision,
            )
            programs = self.documents * segments * (self.groups if reverse else self.heads) * tiles
            self.launches[key] = prepared(gradient_kernel, constants, tile.warps, tile.stages), programs
        return self.launches[key]


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    """One call's plan. 16-bit operands are bf16, because fp16's range does not hold states; the interpreter's stay
    fp32, because it truncates where the device rounds."""
    batch, tokens, heads, channels = q.shape
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    groups, columns = v.shape[2:]
    make = _plan_of if isinstance(tokens, int) and isinstance(documents, int) else _plan_of.__wrapped__
    return make(documents, tokens, heads, groups, channels, columns, cu_seqlens is not None, v.dtype)


@functools.lru_cache(256)  # whose keys the compiler's symbols cannot be
def _plan_of(
    documents: int, tokens: int, heads: int, groups: int, channels: int, columns: int, packed: bool, dtype: torch.dtype
) -> _Plan:
    wide = dtype == torch.float32
    many = 1 + channels + channels * (channels + 1) // 2 > MANY
    return _Plan(
        documents,
        tokens,
        heads,
        groups,
        channels,
        columns,
        packed,
        "many" if many else "float" if wide else "half",
        tl.float32 if wide or INTERPRETED else tl.bfloat16,
        precision(dtype),
    )


def _joined(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums the tiles' shares [tiles, ...]."""
    if partial.shape[0] == 2:
        one, two = partial.unbind(0)
        return torch.add(one, two, out=torch.empty_like(one, dtype=dtype))
    return partial.sum(0).to(dtype)


def _sweep(
    plan: _Plan,
    x: Tensor | None,
    y: Tensor,
    c: Tensor,
    out: Tensor | None,
    parts: tuple[Tensor | None, Tensor | None],
    segments: int,
    begun: bool,
    weight: Tensor | None,
    bounds: Tensor | None,
    *,
    extra: Tensor | None = None,
    partner: Tensor | None = None,
    z: Tensor | None = None,
    totals: Tensor | None = None,
    end: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Launches `sweep_kernel`, in reverse where there is `extra`; without `x` for the segments' own states alone."""
    states, reverse = x is None, extra is not None
    start, programs = plan.sweep(
        states, reverse, segments, weight is not None, begun, end[0] is not None, totals is not None
    )
    start(
        programs,
        (x, y, c, weight, extra, partner, out, z, totals, *parts, *end, bounds),
        (plan.tokens, segments, plan.groups if reverse or states else plan.heads, plan.groups),
    )


def _gradient(
    plan: _Plan,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    c: Tensor,
    parts: Tensor | None,
    segments: int,
    begun: bool,
    weight: Tensor | None,
    bounds: Tensor | None,
    extra: Tensor,
    totals: Tensor,
    reverse: bool,
) -> Tensor:
    """Launches `gradient_kernel` and returns x's gradient in x's dtype."""
    tiles = plan.gradient_tiles
    start, programs = plan.gradient(reverse, segments, weight is not None, begun)
    out = torch.empty_like(x) if tiles == 1 else None
    partial = torch.empty(tiles, *x.shape, dtype=torch.float32, device=x.device) if out is None else out
    start(
        programs,
        (x, y, a, c, weight, extra, totals, parts, bounds, partial),
        (plan.tokens, segments, plan.groups if reverse else plan.heads, plan.groups),
    )
    return _joined(partial, x.dtype) if out is None else out


def _parts(
    plan: _Plan,
    segments: int,
    y: Tensor,
    c: Tensor,
    weight: Tensor | None,
    extra: Tensor | None,
    begin: Tensor | None,
    begin_k: Tensor | None,
    bounds: Tensor | None,
    parts: Tensor | None,
    parts_k: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The states that segments begin with, as the kernels add them up: `begin`, then the segments' own, in `parts`."""
    if parts is None or parts_k is None:
        return begin, begin_k
    if begin is not None and begin_k is not None:
        parts[0].copy_(begin)
        parts_k[0].copy_(begin_k)
    _sweep(plan, None, y, c, None, (parts, parts_k), segments, begin is not None, weight, bounds, extra=extra)
    return parts, parts_k


def _room(plan: _Plan, segments: int, begun: bool, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where the segments' own states go; nowhere for one segment."""
    if segments == 1:
        return None, None
    shape = (segments - 1 + begun, plan.documents, plan.groups, plan.features)
    parts = torch.empty(*shape, plan.columns, dtype=torch.float32, device=like.device)
    return parts, torch.empty(shape, dtype=torch.float32, device=like.device)


def _forward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    begin: Tensor | None,
    begin_k: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, z, the last states, and for the backward pass the segments' states and the totals."""
    plan = _plan(q, v, cu_seqlens)
    # fp16 holds no sum over many tokens, before it is divided by z.
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    out = torch.empty(*q.shape[:3], plan.columns, dtype=dtype, device=q.device)
    z = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    end = end_k = totals = None
    if output_state:
        end = z.new_empty(plan.documents, plan.groups, plan.features, plan.columns)
        end_k = z.new_empty(plan.documents, plan.groups, plan.features)
    if keep:
        totals = z.new_empty(plan.chunks, plan.groups, plan.features)
    parts = _room(plan, plan.forward_segments, begin is not None, q)
    return out, z, end, end_k, totals, *parts  # type: ignore[return-value]


@opaque("taylor_attention_forward", _forward_outputs)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    begin: Tensor | None,
    begin_k: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _forward_outputs(q, k, v, weight, begin, begin_k, cu_seqlens, output_state, keep)
    out, z, end, end_k, totals, parts, parts_k = made
    plan = _plan(q, v, cu_seqlens)
    segments, begun = plan.forward_segments, begin is not None
    with on_device(q):
        first = _parts(plan, segments, k, v, weight, None, begin, begin_k, cu_seqlens, parts, parts_k)
        _sweep(
            plan, q, k, v, out, first, segments, begun, weight, cu_seqlens, z=z, totals=totals, end=(end, end_k)
        )  # fmt: skip
    return made


def _backward_outputs(
    do: Tensor,
    dz: Tensor,
    d_end: Tensor | None,
    d_end_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    begin: Tensor | None,
    cu_seqlens: Tensor | None,
    totals: Tensor,
    parts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of the gradients of q, k, v, the weight and the initial state."""
    return (  # type: ignore[return-value]
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        None if weight is None else torch.empty_like(weight),
        None if begin is None else torch.empty_like(begin),
        None if begin is None else torch.empty_like(begin[..., 0]),
    )


@opaque("taylor_attention_backward", _backward_outputs)
def _backward(
    do: Tensor,
    dz: Tensor,
    d_end: Tensor | None,
    d_end_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    begin: Tensor | None,
    cu_seqlens: Tensor | None,
    totals: Tensor,
    parts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(q, v, cu_seqlens)
    forward, back = plan.forward_segments, plan.backward_segments
    begun, ended = begin is not None, d_end is not None
    dv = torch.empty_like(v)
    d_begin = d_begin_k = dw = None
    if begin is not None:
        d_begin, d_begin_k = torch.empty_like(begin), torch.empty_like(begin[..., 0])
    if weight is not None:
        dw = torch.empty(plan.sweep_tiles, *weight.shape, dtype=torch.float32, device=q.device)
    ahead = torch.empty_like(totals)
    with on_device(q):
        first = begin if forward == 1 else parts
        dq = _gradient(plan, q, k, do, v, first, forward, begun, weight, cu_seqlens, dz, totals, False)
        room = _room(plan, back, ended, q)
        last = _parts(plan, back, q, do, None, dz, d_end, d_end_k, cu_seqlens, *room)
        _sweep(
            plan, k, q, do, dv, last, back, ended, weight, cu_seqlens,
            extra=dz, partner=v, z=dw, totals=ahead, end=(d_begin, d_begin_k),
        )  # fmt: skip
        dk = _gradient(plan, k, q, v, do, last[0], back, ended, weight, cu_seqlens, dz, ahead, True)
    if dw is not None and weight is not None:
        dw = _joined(dw, weight.dtype)
    return dq, dk, dv, dw, d_begin, d_begin_k  # type: ignore[return-value]


class _TaylorAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        begin: Tensor | None,
        begin_k: Tensor | None,
        cu_seqlens: Tensor | None,
        output_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        made = _forward(q, k, v, weight, begin, begin_k, cu_seqlens, output_state, True)
        out, z, end, end_k, totals, parts, _ = made
        ctx.save_for_backward(q, k, v, weight, begin, cu_seqlens, totals, parts)
        ctx.set_materialize_grads(False)
        ctx.output_state = output_state
        return out, z, end, end_k

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dz: Tensor | None, d_end: Tensor | None, d_end_k: Tensor | None):
        refuse_second_derivative()
        q, k, v, weight, begin, cu_seqlens, totals, parts = ctx.saved_tensors
        state = (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2], totals.shape[2])
        do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.contiguous()
        dz = torch.zeros(q.shape[:3], device=q.device) if dz is None else dz.float().contiguous()
        if not ctx.output_state:
            d_end = d_end_k = None
        elif d_end is not None or d_end_k is not None:
            d_end = totals.new_zeros(*state, v.shape[3]) if d_end is None else d_end.float().contiguous()
            d_end_k = totals.new_zeros(state) if d_end_k is None else d_end_k.float().contiguous()
        dq, dk, dv, dw, d_begin, d_begin_k = _backward(
            do, dz, d_end, d_end_k, q, k, v, weight, begin, cu_seqlens, totals, parts
        )
        if weight is None:
            dw = None
        if begin is None:
            d_begin = d_begin_k = None
        return dq, dk, dv, dw, d_begin, d_begin_k, None, None


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_weight: Tensor | None = None,
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearState | None]:
    """Linear attention with the weights w_j (1 + s + s^2 / 2), s = q_t . k_j; arguments as in `modeling.reference`.

    q and k are rounded to v's dtype where it is narrower. Above 32 channels the reference runs.

    Returns:
        Output [B, T, H, V], unnormalised, in v's dtype (fp32 for fp16), the normaliser [B, T, H] in fp32, and the final
        state in fp32 or None.

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument.
    """
    check_heads(q, k, v)
    cu_seqlens = check_bounds(cu_seqlens, q)
    batch, tokens, groups, channels = k.shape
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = 1 + channels + channels * (channels + 1) // 2
    begin, begin_k = (None, None) if initial_state is None else (initial_state.kv, initial_state.k)
    check_shape("key_weight", key_weight, (batch, tokens, groups), q)
    check_shape("initial_state.kv", begin, (documents, groups, features, v.shape[3]), q)
    check_shape("initial_state.k", begin_k, (documents, groups, features), q)
    if channels > MOST_CHANNELS:
        out, norm, state = reference_taylor_attention(
            q, k, v, key_weight=key_weight, initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        assert norm is not None
        return (out if v.dtype == torch.float16 else out.to(v.dtype)), norm, state
    if begin is not None:
        begin = begin.float().contiguous()
        begin_k = torch.zeros_like(begin[..., 0]) if begin_k is None else begin_k.float().contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    key_weight = None if key_weight is None else key_weight.contiguous()
    tensors = (q, k, v, key_weight, begin, begin_k)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, z, end, end_k = _TaylorAttention.apply(*tensors, cu_seqlens, output_final_state)
    else:
        out, z, end, end_k = _forward(*tensors, cu_seqlens, output_final_state, False)[:4]
    return out, z, LinearState(end, end_k) if output_final_state else None
