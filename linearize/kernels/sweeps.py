"""How a sweep is cut into programs, and its launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .common import launch, power_of_2
from .sweep import COLUMNS, MARKED_SCALAR, NONE, ROWS, states_kernel
from .sweep_kernels import forward_kernel, gradients_kernel
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

# Timed on one H200, up to 128 channels: the output's sweep, by whether the text is short, and the gradients', of which
# there are three times as many programs.
FORWARD: dict[bool, Tile] = {False: Tile(64, 4, 2), True: Tile(32, 4, 3)}
GRADIENTS = Tile(64, 4, 2)
STATES = Tile(128, 8, 3)
SPAN = CHUNK * MARKED_SCALAR.value  # a segment is whole marks


class Plan(NamedTuple):
    """Segments of `span` tokens, and whether they are one because the sequence is short."""

    segments: int
    span: int
    short: bool


# What `segment_states` gives, and nothing where there is one segment.
Own = tuple[Tensor | None, Tensor | None, Tensor | None]


def plan_of(documents: int, heads: int, tokens: int, columns: int, gate: int, packed: bool) -> Plan:
    """How one call's sweeps are cut, from shapes alone."""
    if isinstance(tokens, int) and isinstance(documents, int):
        return _plan(documents, heads, tokens, columns, gate, packed)
    return _plan.__wrapped__(documents, heads, tokens, columns, gate, packed)  # the compiler's symbols cannot be keys


@functools.lru_cache(1024)
def _plan(documents: int, heads: int, tokens: int, columns: int, gate: int, packed: bool) -> Plan:
    if tokens <= SHORT or packed:
        return Plan(1, max(tokens, 1), True)
    tile = FORWARD[False]
    programs = documents * heads * -(-columns // min(tile.width, power_of_2(columns)))
    segments = max(1, min(PROGRAMS // programs, tokens // LEAST_SPAN))
    span = -(-tokens // segments)
    span = -(-span // SPAN) * SPAN
    return Plan(-(-tokens // span), span, False)


def _width(tile: Tile, rows: int, columns: int) -> int:
    """Columns of the state that a program holds; fewer where its rows are many."""
    width = min(tile.width, power_of_2(columns))
    return min(width, 32) if rows > 128 else width


def key_tiles(rows: int, columns: int) -> int:
    """How many programs share a key's gradient of `rows` channels."""
    return -(-rows // _width(GRADIENTS, columns, rows))


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
) -> Own:
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: Plan,
    gate: int,
    wide: bool,
    precision: str,
    bounds: Tensor | None,
    *,
    cum: Tensor | None = None,
    scores: Tensor | None = None,
    z: Tensor | None = None,
    initial: tuple[Tensor | None, Tensor | None] = (None, None),
    own: Own = (None, None, None),
    starts: tuple[Tensor | None, Tensor | None] = (None, None),
    end: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Launches the output's sweep; see `forward_kernel`. States come with their normalisers, `own` from
    `segment_states`."""
    batch, tokens, heads, columns = out.shape
    groups, rows = k.shape[2:]
    tile = FORWARD[plan.short]
    width = _width(tile, rows, columns)
    documents = batch if bounds is None else bounds.shape[0] - 1
    launch(
        forward_kernel,
        documents * heads * plan.segments * -(-columns // width),
        (q, k, v, cum, scores, *initial, *own, *starts, *end, out, z, bounds),
        (tokens, plan.span, plan.segments),
        (
            heads,
            groups,
            heads if cum is None else cum.shape[1],
            rows,
            columns,
            power_of_2(rows),
            width,
            CHUNK,
            gate,
            z is not None,
            bounds is not None,
            initial[0] is not None,
            own[0] is not None,
            starts[0] is not None,
            end[0] is not None,
            wide,
            precision,
        ),
        tile.warps,
        1 if wide or rows > 128 else tile.stages,
    )


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    plan: Plan,
    gate: int,
    wide: bool,
    precision: str,
    bounds: Tensor | None,
    *,
    cum: Tensor | None = None,
    scores: Tensor | None = None,
    dz: Tensor | None = None,
    initial: tuple[Tensor | None, Tensor | None] = (None, None),
    starts: tuple[Tensor | None, Tensor | None] = (None, None),
    d_end: tuple[Tensor | None, Tensor | None] = (None, None),
    own: Own = (None, None, None),
    d_initial: tuple[Tensor | None, Tensor | None] = (None, None),
    lines: Tensor | None = None,
    marks: tuple[Tensor | None, Tensor | None] = (None, None),
    d_marks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Launches the gradients' sweeps; see `gradients_kernel`. `marks` and `lines` are for `decay_gradient.py`."""
    batch, tokens, heads, rows = q.shape
    groups, columns = v.shape[2:]
    tile = GRADIENTS
    key_width, value_width = _width(tile, columns, rows), _width(tile, rows, columns)
    documents = batch if bounds is None else bounds.shape[0] - 1
    tiles = 2 * -(-rows // key_width) + -(-columns // value_width)
    launch(
        gradients_kernel,
        documents * heads * plan.segments * tiles,
        (
            *(q, k, v, do, cum, scores, dz),
            *(*initial, *starts, *d_end, *own, *d_initial),
            *(dq, dk, dv, lines, *marks, *d_marks, bounds),
        ),
        (tokens, plan.span, plan.segments),
        (
            heads,
            groups,
            heads if cum is None else cum.shape[1],
            rows,
            columns,
            power_of_2(rows),
            power_of_2(columns),
            key_width,
            value_width,
            CHUNK,
            gate,
            COLUMNS if gate == ROWS else gate,
            dz is not None,
            bounds is not None,
            initial[0] is not None,
            d_end[0] is not None,
            plan.segments > 1,
            marks[0] is not None,
            wide,
            precision,
        ),
        tile.warps,
        1 if wide or max(rows, columns) > 128 else tile.stages,
    )
