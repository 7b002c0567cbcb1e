"""How a sweep is cut into programs, and its launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .common import launch, power_of_2
from .sweep import COLUMNS, MARKED, NONE, ROWS, SCALAR, states_kernel, sweep_kernel
from .vector_decay import CHUNK


class Tile(NamedTuple):
    """How a sweep is cut: `width` state columns a program, its warps, and the stages its loads are ahead."""

    width: int
    warps: int
    stages: int


# Programs that fill the device: two on each of an H100's or H200's 132 multiprocessors.
PROGRAMS = 264
# Up to this many tokens one program runs a whole sequence, with narrow tiles: fewer launches.
SHORT = 4096
LEAST_SPAN = 1024

# (gate, short) to tile, for up to 128 channels; timed on one H200.
TILES: dict[tuple[int, bool], Tile] = {
    (NONE, False): Tile(64, 4, 3),
    (NONE, True): Tile(32, 4, 3),
    (SCALAR, False): Tile(64, 4, 2),
    (SCALAR, True): Tile(32, 4, 3),
    (ROWS, False): Tile(64, 4, 3),
    (ROWS, True): Tile(32, 4, 3),
    (COLUMNS, False): Tile(64, 4, 3),
    (COLUMNS, True): Tile(32, 4, 3),
}
STATES = Tile(128, 8, 3)
MARK = CHUNK * MARKED.value  # tokens between the states that a decay's gradient begins from


class Plan(NamedTuple):
    """Segments of `span` tokens, and whether they are one because the sequence is short."""

    segments: int
    span: int
    short: bool


def plan_of(documents: int, heads: int, tokens: int, columns: int, gate: int, packed: bool) -> Plan:
    """How one call's sweeps are cut, from shapes alone."""
    if isinstance(tokens, int) and isinstance(documents, int):
        return _plan(documents, heads, tokens, columns, gate, packed)
    return _plan.__wrapped__(documents, heads, tokens, columns, gate, packed)  # the compiler's symbols cannot be keys


@functools.lru_cache(1024)
def _plan(documents: int, heads: int, tokens: int, columns: int, gate: int, packed: bool) -> Plan:
    if tokens <= SHORT or packed:
        return Plan(1, max(tokens, 1), True)
    tile = TILES[gate, False]
    programs = documents * heads * -(-columns // min(tile.width, power_of_2(columns)))
    segments = max(1, min(PROGRAMS // programs, tokens // LEAST_SPAN))
    span = -(-tokens // segments)
    span = -(-span // MARK) * MARK
    return Plan(-(-tokens // span), span, False)


@functools.lru_cache(1024)
def width_of(gate: int, short: bool, rows: int, columns: int) -> int:
    """Columns of the state that a program holds; fewer where its rows are many."""
    width = min(TILES[gate, short].width, power_of_2(columns))
    return min(width, 32) if rows > 128 else width


def segment_states(
    b: Tensor,
    c: Tensor,
    cum: Tensor | None,
    weight: Tensor | None,
    heads: int,
    plan: Plan,
    gate: int,
    normalizer: bool,
    reverse: bool,
    wide: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Own states of the segments [B, heads, S, A, W], normalisers [B, heads, S, A], log decays [B, heads, S(, A)]."""
    batch, tokens = b.shape[:2]
    rows, columns = b.shape[3], c.shape[3]
    shape = (batch, heads, plan.segments)
    update = torch.empty(*shape, rows, columns, dtype=torch.float32, device=b.device)
    norm = update.new_empty(*shape, rows) if normalizer else None
    total = None if cum is None else update.new_empty(*shape, *((rows,) if gate == ROWS else ()))
    block = power_of_2(rows)
    width = min(STATES.width if block <= 128 else 64, power_of_2(columns))
    launch(
        states_kernel,
        batch * heads * (plan.segments - 1) * -(-columns // width),
        (b, c, cum, weight, update, norm, total),
        (
            tokens,
            plan.span,
            plan.segments,
            0 if reverse else plan.segments - 1,
        ),
        (
            heads,
            b.shape[2],
            c.shape[2],
            heads if cum is None else cum.shape[1],
            rows,
            columns,
            block,
            width,
            CHUNK,
            gate,
            normalizer,
            weight is not None,
            reverse and gate != NONE,
            wide,
            precision,
        ),
        STATES.warps,
        1 if wide else STATES.stages,
    )
    return update, norm, total


def sweep(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    plan: Plan,
    gate: int,
    wide: bool,
    precision: str,
    bounds: Tensor | None,
    *,
    reverse: bool = False,
    transposed: bool = False,
    cum: Tensor | None = None,
    scores: Tensor | None = None,
    z: Tensor | None = None,
    dz: Tensor | None = None,
    begin: Tensor | None = None,
    begin_n: Tensor | None = None,
    update: Tensor | None = None,
    update_n: Tensor | None = None,
    total: Tensor | None = None,
    starts: Tensor | None = None,
    starts_n: Tensor | None = None,
    keep: bool = False,
    end: Tensor | None = None,
    end_n: Tensor | None = None,
    state_heads: int = 0,
    other: Tensor | None = None,
    partner: Tensor | None = None,
    dg: Tensor | None = None,
    decay_gradient: int = 0,
    marks: Tensor | None = None,
    marks_n: Tensor | None = None,
    final: Tensor | None = None,
    final_n: Tensor | None = None,
) -> None:
    """Launches one sweep of a, b, c into `out`; see `sweep_kernel`. `transposed`: states lie in memory as [W, A]."""
    batch, tokens, heads, columns = out.shape
    rows = a.shape[3]
    tile = TILES[gate, plan.short]
    width = width_of(gate, plan.short, rows, columns)
    documents = batch if bounds is None else bounds.shape[0] - 1
    launch(
        sweep_kernel,
        documents * heads * plan.segments * -(-columns // width),
        (
            a,
            b,
            c,
            cum,
            scores,
            dz,
            begin,
            begin_n,
            update,
            update_n,
            total,
            starts,
            starts_n,
            end,
            end_n,
            out,
            z,
            other,
            partner,
            dg,
            marks,
            marks_n,
            final,
            final_n,
            bounds,
        ),
        (
            tokens,
            plan.span,
            plan.segments,
        ),
        (
            heads,
            a.shape[2],
            b.shape[2],
            c.shape[2],
            heads if cum is None else cum.shape[1],
            state_heads or heads,
            heads if begin is None else begin.shape[1],
            heads if other is None else other.shape[2],
            1 if transposed else columns,
            rows if transposed else 1,
            rows,
            columns,
            power_of_2(rows),
            width,
            CHUNK,
            gate,
            1 if z is not None else 0 if dz is None else 2,
            reverse,
            bounds is not None,
            begin is not None,
            1 if update is not None else 0 if starts is None else 2,
            keep,
            end is not None,
            decay_gradient,
            wide,
            precision,
        ),
        tile.warps,
        1 if wide or rows > 128 else tile.stages,
    )
