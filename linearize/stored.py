"""Tensors where they lie in safetensors files: read one at a time, or copied from file to file without being read.

The files are never mapped whole, so what a program holds of a model is what it asked for.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .checkpoint_files import check_folder, check_safetensors
from .errors import UserError

PIECE = 16 << 20  # bytes that are in memory while a tensor is converted, or copied where the system cannot
# In the order in which the safetensors library lays out a file, backwards: wide types first, so that all are aligned.
DTYPES: dict[str, torch.dtype] = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16},
    **{"BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32},
    **{"F64": torch.float64, "I64": torch.int64, "U64": torch.uint64},
}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_ORDER = {kind: place for place, kind in enumerate(DTYPES)}
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its `dtype` as the file spells it, its bytes from `start` on."""

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type that this package does not know."""
        return DTYPES.get(self.kind)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, in its dtype or another.

        Raises:
            UserError: the file has become shorter.
        """
        assert self.dtype is not None
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if self.size:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                self._fill(file, bytes_of(tensor))
        return tensor if dtype is None else tensor.to(dtype)

    def mapped(self) -> Tensor:
        """The tensor mapped from its file: memory holds the rows that are looked at. It must not be written to."""
        assert self.dtype is not None
        if self.start % self.dtype.itemsize or not self.size:
            return self.read()
        import numpy as np

        raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=(self.size,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to
            return torch.from_numpy(raw).view(self.dtype).view(self.shape)

    def copy_to(self, out: BinaryIO, dtype: torch.dtype) -> None:
        """Appends the tensor's bytes to an unbuffered file, as `dtype`, without holding the tensor."""
        with self.path.open("rb", buffering=0) as file:
            if dtype == self.dtype:
                self._copy(file, out)
                return
            assert self.dtype is not None
            file.seek(self.start)
            left = self.size
            while left:
                piece = torch.empty(min(left, PIECE), dtype=torch.uint8)
                self._fill(file, bytes_of(piece))
                write(out, piece.view(self.dtype).to(dtype))
                left -= len(piece)

    def _copy(self, file: BinaryIO, out: BinaryIO) -> None:
        position, end = self.start, self.start + self.size
        try:  # the system copies without the program, and shares blocks where the file system can
            while position < end and hasattr(os, "copy_file_range"):
                count = os.copy_file_range(file.fileno(), out.fileno(), end - position, offset_src=position)
                if count == 0:
                    raise self._short()
                position += count
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        file.seek(position)
        while position < end:
            piece = memoryview(bytearray(min(end - position, PIECE)))
            self._fill(file, piece)
            _write_all(out, piece)
            position += len(piece)

    def _fill(self, file: Any, view: memoryview) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise self._short()
            view = view[count:]

    def _short(self) -> UserError:
        return UserError(f"{self.path} ended inside tensor {self.name}: it has changed; download it again")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors in a model's folder by name.

    Raises:
        UserError: as `check_folder`.
    """
    found = check_folder(folder)
    ends: dict[Path, int] = {}
    for path, entry in found.values():
        ends[path] = max(ends.get(path, 0), entry["data_offsets"][1])
    return {name: _placed(name, path, entry, ends[path]) for name, (path, entry) in found.items()}


def tensors_of(path: Path) -> dict[str, Stored]:
    """The tensors in one file. Raises UserError: as `check_safetensors`."""
    entries = check_safetensors(path)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return {name: _placed(name, path, entry, end) for name, entry in entries.items()}


def _placed(name: str, path: Path, entry: dict[str, Any], end: int) -> Stored:
    start, stop = entry["data_offsets"]
    data = path.stat().st_size - end  # what is left of a file is its header: `check_safetensors` saw to it
    return Stored(name, path, entry["dtype"], tuple(entry["shape"]), data + start, stop - start)


def laid_out(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which the safetensors library writes their tensors."""
    return sorted(tensors, key=lambda name: (-_ORDER[_KINDS[tensors[name].dtype]], name))


def header(tensors: Mapping[str, Tensor], names: Sequence[str]) -> bytes:
    """The beginning of a file with `names` of `tensors` (which may be on the meta device), as the safetensors library
    writes it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write(out: BinaryIO, tensor: Tensor) -> None:
    """Appends a tensor's bytes to an unbuffered file."""
    if tensor.numel():
        _write_all(out, bytes_of(tensor.contiguous()))


def _write_all(out: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[out.write(view) :]
