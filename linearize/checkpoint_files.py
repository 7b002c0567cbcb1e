"""Reading the headers of weight files, to refuse a damaged one by name before anything is loaded from it."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import UserError
from .json_files import parse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "transformers_weights"  # the key of a config.json that names another file
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER = 100 << 20  # the limit of the safetensors library itself
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16},
    **{"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


def check_folder(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Checks every weight file that `from_pretrained` would read in `folder`, without reading weights.

    Returns:
        By tensor the file that it lies in, and what that file's header says of it: dtype, shape, data_offsets.

    Raises:
        UserError: no safetensors (pickles are not loaded), a name or a link that leads out of the folder, a shard that
            is missing, truncated or corrupt, a config.json that names another file.
    """
    single, index = folder / SINGLE, folder / INDEX
    _check_named(folder, SINGLE if single.is_file() else INDEX)
    if single.is_file():  # transformers prefers it to an index, too
        _check_inside(folder, SINGLE)
        return {tensor: (single, entry) for tensor, entry in check_safetensors(single).items()}
    if not index.is_file():
        raise UserError(_no_weights(folder))
    _check_inside(folder, INDEX)
    shards = shards_of(index)
    try:
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    except OSError as error:  # a name that is too long
        raise _no_index(index, error) from error
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(shards)} shards named in {index.name} are missing "
            f"({_some(missing)}); download the model again"
        )
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    placed: dict[str, tuple[Path, dict[str, Any]]] = {}
    for shard, tensors in sorted(shards.items()):
        _check_inside(folder, shard)
        held = check_safetensors(folder / shard)
        absent = sorted(set(tensors) - set(held))
        if absent:
            raise UserError(
                f"{folder / shard} lacks {len(absent)} tensors that {index.name} places there "
                f"({_some(absent)}); "
                "download the model again"
            )
        found |= {tensor: (folder / shard, entry) for tensor, entry in held.items()}
        placed |= {tensor: (folder / shard, held[tensor]) for tensor in tensors}
    return found | placed  # transformers loads what an index forgets, too


def shards_of(index: Path) -> dict[str, list[str]]:
    """The shards that an index names, each with the tensors that it places there.

    Raises:
        UserError: it is no index, or names a file outside its folder.
    """
    shards: dict[str, list[str]] = {}
    try:
        for tensor, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if not isinstance(shard, str):
                raise TypeError(f"{tensor} is placed in {shard!r}")
            shards.setdefault(shard, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise _no_index(index, error) from error
    if not shards:
        raise UserError(f"{index} names no tensors; download the model again")
    for shard, tensors in shards.items():
        paths = PurePosixPath(shard), PureWindowsPath(shard)
        if any(path.anchor or ".." in path.parts for path in paths) or "\0" in shard or not PurePosixPath(shard).name:
            raise UserError(
                f"{index} places {tensors[0]} in {shard!r}, which is no file of its own folder; do not use this model, "
                "or download it again from a place that you trust"
            )
    return shards


def _no_index(index: Path, error: Exception) -> UserError:
    return UserError(f"{index} is not a shard index ({repr(error)[:300]}); download the model again")


def _check_named(folder: Path, read: str) -> None:
    """Refuses a config.json by which transformers would load another file than `read`. A student's config has its
    teacher's inside, which is asked for what it does not say itself."""
    path = folder / "config.json"
    try:
        config = parse(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):  # said by what reads the config
        return
    for fields in (config, config.get("parent_config") if isinstance(config, dict) else None):
        named = fields.get(NAMED) if isinstance(fields, dict) else None
        if named not in (None, read):
            raise UserError(
                f"{path} names {str(named)[:300]!r} as the weights ({NAMED}), and {SINGLE} or {INDEX} is what is read: "
                "take that key out, and give the weights one of these names"
            )


def _check_inside(folder: Path, name: str) -> None:
    """Refuses a link out of the folder; the Hub's cache links to its blobs, which are named by their hash."""
    target = (folder / name).resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not in_cache and not target.is_relative_to(folder.resolve()):
        raise UserError(f"{folder / name} is a link out of its folder, to {target}; put the file itself there")


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file (name -> dtype, shape, data_offsets), once it is found to match the
    file.

    Raises:
        UserError: the file is truncated or corrupt.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > _MAX_HEADER:
            raise UserError(_damaged(path, f"its {size} bytes do not start with the length of a header"))
        if length > size - 8:
            raise UserError(_truncated(path, length + 8, size))
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted((*_span(entry), name) for name, entry in tensors.items())
        bits = {name: _BITS.get(entry["dtype"]) for name, entry in tensors.items()}
        counts = {name: math.prod(_lengths(entry)) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(_damaged(path, f"its header cannot be read ({error!r})")) from error
    end = 0
    for start, stop, name in spans:
        width = bits[name]
        if start != end or (width is not None and (stop - start) * 8 != counts[name] * width):
            raise UserError(_damaged(path, f"its header contradicts itself at tensor {name}"))
        end = stop
    held = size - 8 - length
    if held < end:
        raise UserError(_truncated(path, end + 8 + length, size))
    if held > end:
        raise UserError(_damaged(path, f"{held - end} bytes follow the last tensor"))
    return tensors


def _span(entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise ValueError(f"data_offsets {start!r}, {stop!r}")
    return start, stop


def _lengths(entry: Any) -> list[int]:
    shape = entry["shape"]
    if type(shape) is not list or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"shape {shape!r}")
    return shape


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself: metadata (arrays as their length) and its tensors' ggml types."""

    metadata: dict[str, Any]
    types: dict[str, int]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


def check_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file (versions 2 and 3), once its tensors are found to lie inside the file.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        UserError: not a GGUF file, truncated, corrupt, one part of several, or the gguf package is missing.
    """
    sizes = block_sizes()
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file: it does not start with GGUF; check its name or download it again"
            )
        if size < 24:
            raise UserError(_damaged(path, f"its {size} bytes are less than a header"))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            return _parse_gguf(path, blob, size, sizes)


def block_sizes() -> dict[int, tuple[int, int]]:
    """ggml type -> (elements, bytes) of a block. Raises UserError when the gguf package is missing."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise UserError("reading GGUF needs the gguf package: pip install 'linearize[gguf]'") from error
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _parse_gguf(path: Path, blob: mmap.mmap, size: int, sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    version, tensor_count, key_count = struct.unpack_from("<IQQ", blob, 4)
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF version {version}, and only little-endian versions 2 and 3 are read")
    reader = _Reader(blob, 24)
    try:
        metadata = {}
        for _ in range(key_count):
            key = reader.string()
            metadata[key] = reader.value(reader.number("<I"))
        tensors = {}
        for _ in range(tensor_count):
            name = reader.string()
            shape = [reader.number("<Q") for _ in range(reader.number("<I"))]
            tensors[name] = (shape, reader.number("<I"), reader.number("<Q"))
    except (struct.error, IndexError) as error:
        raise UserError(f"{path} is truncated: its {size} bytes end inside the header; download it again") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise UserError(_damaged(path, f"its header cannot be read ({error})")) from error
    if "general.architecture" not in metadata:
        raise UserError(_damaged(path, "its header names no architecture"))
    for name in ("split.count", "general.alignment"):
        if not (isinstance(metadata.get(name, 1), int) and metadata.get(name, 1) > 0):
            raise UserError(_damaged(path, f"its header says {name} {metadata[name]!r}"))
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path} is one part of {metadata['split.count']}; join them first: llama-gguf-split --merge "
            f"{path.name} OUT.gguf"
        )
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.position // alignment) * alignment
    end = start
    for shape, kind, offset in tensors.values():
        if kind in sizes:
            elements, block = sizes[kind]
            end = max(end, start + offset + math.prod(shape) // elements * block)
    if end > size:
        raise UserError(_truncated(path, end, size))
    return GgufHeader(metadata, {name: kind for name, (_, kind, _) in tensors.items()})


class _Reader:
    """Walks the values of a GGUF header."""

    def __init__(self, blob: mmap.mmap, position: int) -> None:
        self.blob, self.position = blob, position

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.blob, self.position)
        self.position += struct.calcsize(code)
        return value

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes; gives where they started."""
        start = self.position
        if start + count > len(self.blob):
            raise IndexError("past the end of the file")
        self.position += count
        return start

    def string(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        return self.blob[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        element, count = self.number("<I"), self.number("<Q")
        if element in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"an array of unknown type {element}")
        return count


def gguf_names(folder: Path) -> list[str]:
    """The .gguf files of a folder."""
    return sorted(path.name for path in folder.glob("*.gguf"))


def _no_weights(folder: Path) -> str:
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        return (
            f"{folder} has {_some(parts)} but neither {SINGLE} nor {INDEX}: the download is not whole; "
            "download the model again"
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights only as pickles ({_some(pickles)}), which can run code and are not "
            "loaded; "
            "get the safetensors version of the model, or save it as one with transformers' save_pretrained"
        )
    if gguf := gguf_names(folder):
        return f"{folder} has no safetensors but GGUF files ({_some(gguf)}): pass one with --gguf-file {gguf[0]}"
    return f"{folder} has a config but no weights (no {SINGLE}, no {INDEX}); download the whole model"


def _some(names: Container[str] | list[str]) -> str:
    assert isinstance(names, list)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _truncated(path: Path, expected: int, size: int) -> str:
    return f"{path} is truncated: its header speaks of {expected} bytes, the file has {size}; download it again"


def _damaged(path: Path, why: str) -> str:
    return f"{path} is corrupt: {why}; download it again"
