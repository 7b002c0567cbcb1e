"""Where the chunks of the delta rule's documents lie, and how its kernels are cut and started."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, power_of_2, precision
from .packed import packed_chunks

CHUNK = 64


class Chunks(NamedTuple):
    """Chunks of all documents. Packed: `spans` [chunks, 2], first row and the row past the document, empty past the
    last chunk; `first` [N + 1], each document's first chunk; `bounds` [N + 1]. Else all alike and None."""

    documents: int
    total: int
    tokens: int
    each: int
    spans: Tensor | None = None
    first: Tensor | None = None
    bounds: Tensor | None = None


def chunks_of(k: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """Reads no values: packed documents get the most chunks that there could be."""
    batch, tokens = k.shape[:2]
    each = -(-tokens // CHUNK)
    if cu_seqlens is None:
        return Chunks(batch, batch * each, tokens, each)
    documents = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.long().clamp(0, tokens)
    first, document, place = packed_chunks(bounds, tokens, CHUNK)
    spans = torch.stack([bounds[document] + place * CHUNK, bounds[document + 1]], dim=1)
    return Chunks(documents, spans.shape[0], tokens, each, spans, first, bounds)


@triton.jit
def chunk_span(chunk, spans, tokens, each, C: tl.constexpr):
    """First row of a chunk and how many rows it has; none past the last chunk."""
    if spans is None:
        document = chunk // each
        done = (chunk - document * each) * C
        start = document.to(tl.int64) * tokens + done
        left = tokens - done
    else:
        start = tl.load(spans + 2 * chunk)
        left = (tl.load(spans + 2 * chunk + 1) - start).to(tl.int32)
    return start, left


@triton.jit
def document_span(n, first, bounds, tokens, each):
    """A document's first row, its length, its first chunk and how many chunks it has."""
    if bounds is None:
        start = n.to(tl.int64) * tokens
        length = tokens
        chunk = n.to(tl.int64) * each
        count = each
    else:
        start = tl.load(bounds + n)
        length = (tl.load(bounds + n + 1) - start).to(tl.int32)
        chunk = tl.load(first + n)
        count = (tl.load(first + n + 1) - chunk).to(tl.int32)
    return start, length, chunk, count


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE for BLOCK indices; nothing to test at run time where blocks fit."""
    if SIZE % BLOCK == 0:
        return tl.full([BLOCK], True, tl.int1)
    else:
        return index < SIZE


class Tile(NamedTuple):
    """How a kernel is cut: `width` value channels a program or a step, warps, stages of its loads."""

    width: int
    warps: int
    stages: int


# (kernel, fp32) to tile, for up to 128 channels.
TILES: dict[tuple[str, bool], Tile] = {
    ("prepare", False): Tile(128, 4, 2),
    ("sweep", False): Tile(16, 4, 3),
    ("output", False): Tile(64, 4, 1),
    ("local", False): Tile(128, 4, 1),
    ("reverse", False): Tile(16, 4, 3),
    ("query", False): Tile(64, 4, 2),
    ("key", False): Tile(128, 4, 1),
    ("prepare", True): Tile(64, 8, 1),
    ("sweep", True): Tile(32, 8, 1),
    ("output", True): Tile(64, 8, 1),
    ("local", True): Tile(32, 8, 1),
    ("reverse", True): Tile(32, 8, 1),
    ("query", True): Tile(32, 8, 1),
    ("key", True): Tile(32, 8, 1),
}
# Kernels with a program for each tile of value channels; the others step through them.
TILED = ("sweep", "local", "reverse")


def tile_of(kernel: str, k: Tensor, channels: int) -> Tile:
    tile = TILES[kernel, k.dtype == torch.float32]
    width = min(tile.width, power_of_2(channels))
    if max(k.shape[-1], channels) > 128:
        return Tile(max(16, min(width, 32)), 8, 1)
    return tile._replace(width=width)


def start_kernel(
    kernel: Any,
    name: str,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    chunks: Chunks,
    k: Tensor,
    channels: int,
    heads: int | None = None,
) -> None:
    """Starts a kernel of delta.py or delta_backward.py; `programs` leaves out the tiles of value channels."""
    tile = tile_of(name, k, channels)
    groups, rows = k.shape[2:]
    launch(
        kernel,
        programs * (-(-channels // tile.width) if name in TILED else 1),
        tensors,
        (chunks.tokens, chunks.each),
        (
            *(() if heads is None else (heads,)),
            groups,
            rows,
            channels,
            power_of_2(rows),
            tile.width,
            CHUNK,
            precision(k.dtype),
        ),
        tile.warps,
        tile.stages,
    )
