"""Steers around a fault of ptxas 12.8, which Triton 3.4 to 3.7.0 bring, on Hopper.

A matrix product finds its operands in shared memory by 64-bit descriptors, made by adding constants to an address. The
high word of the constant is the operand's layout. Two operands of different layouts that lie at one address, one after
the other, share the register of that address, and then this ptxas adds some of the constants to registers that hold
something else, the stack pointer or the block's number:

    add.s64 %rd64, %rd100, -9223371899415822334;   becomes   UIADD3 UR6, UP0, UR20, 0x2, URZ;      (UR20 = CTAID.X)
                                                             UIADD3.X UR7, UR20, -0x7fffffe0, URZ, UP0;

The product reads with a wrong layout, elsewhere, or outside its memory: wrong numbers, NaN or a fault, depending on the
shape of the tile. ptxas 13.1 does it right. Made of two words, without a 64-bit addition, the same descriptors come out
right of 12.8 too. Addresses have 14 bits, so nothing carries.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import triton
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager

FIXED = (13, 1)  # the first ptxas seen without the fault
_ADDED = re.compile(r"^\s*(?:add\.s64|or\.b64)\s+(%rd\d+), (%rd\d+), (-?\d+);", re.MULTILINE)


def separated(ptx: str) -> str:
    """The same program with descriptors made of two words, where one address serves several layouts."""
    layouts: dict[str, set[int]] = {}
    for _, address, constant in _ADDED.findall(ptx):
        layouts.setdefault(address, set()).update(_layout(constant))

    def split(match: re.Match[str]) -> str:
        made, address, constant = match.groups()
        if len(layouts[address]) < 2 or not _layout(constant):
            return match[0]
        low, high = int(constant) & 0xFFFFFFFF, int(constant) >> 32 & 0xFFFFFFFF
        return (
            f"\n\t{{ .reg .b32 %low; cvt.u32.u64 %low, {address}; "
            f"add.s32 %low, %low, {low}; mov.b64 {made}, {{%low, {high}}}; }}"
        )

    return _ADDED.sub(split, ptx)


def _layout(constant: str) -> set[int]:
    """The layout that a descriptor's constant names: a swizzle in the two highest bits, a stride of 14 bits."""
    high = int(constant) >> 32 & 0xFFFFFFFF
    return {high} if high >> 30 and not high & 0x3FFFC000 else set()


def reassembled(compiled: Any) -> bytes | None:
    """The machine code of Triton's compiled kernel without the fault; None where there is none to avoid. Kept in
    Triton's cache beside its own."""
    target = compiled.metadata.target
    if target.backend != "cuda" or target.arch != 90:
        return None
    version = triton.knobs.nvidia.ptxas.version
    if tuple(map(int, version.split("."))) >= FIXED:
        return None
    ptx = compiled.asm["ptx"]
    better = separated(ptx)
    if better == ptx:
        return None
    cache = get_cache_manager(hashlib.sha256(f"ptxas {version}\n{better}".encode()).hexdigest())
    found = cache.get_file("kernel.cubin")
    if found is None:
        backend = make_backend(target)
        options = backend.parse_options(compiled.metadata._asdict())
        found = cache.put(backend.make_cubin(better, {}, options, target.arch), "kernel.cubin")
    return Path(found).read_bytes()
