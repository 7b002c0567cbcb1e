"""Damage of every kind, drawn from a seed: to bytes, JSON and YAML, the headers of weights, names on a disk."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Draw = random.Random
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -1e300, math.nan, math.inf, -math.inf),
    *("", "none", "\0", "\ud800", "x" * 5000, "../../outside/secret.txt", "/etc/passwd", "~", "-1", "1e3", "a\nb"),
    *(
        [],
        {},
        [[]],
        [None],
        [1, "a"],
        {"": None},
        {"a": {"b": []}},
        "{{ 7 * 7 }}",
        "${HOME}",
        "!!python/object:os.system",
    ),
)
_DEEP = 3000
_NAMES = ("../outside/stolen.safetensors", "/etc/passwd", "..", ".", "", "a/../../outside/secret.txt", "\0", "x" * 300)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every entry inside a value of JSON."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, entry in entries:
        found += [(*path, key), *places(entry, (*path, key))]
    return found


def _owner(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def _nested(draw: Draw) -> Any:
    value: Any = 1
    for _ in range(draw.choice((3, 40))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def change_value(value: Any, draw: Draw) -> Any:
    """One entry replaced, removed, renamed, doubled, wrapped, or put in another's place."""
    found = places(value)
    if not found or draw.random() < 0.04:
        return copy.deepcopy(draw.choice(_VALUES))
    # Evenly over the depths: most entries lie in lists, and the keys above them decide more.
    depth = draw.choice(sorted({len(path) for path in found}))
    path = draw.choice([path for path in found if len(path) == depth])
    owner, key = _owner(value, path), path[-1]
    what = draw.random()
    if what < 0.55:
        owner[key] = copy.deepcopy(draw.choice(_VALUES))
    elif what < 0.65:
        del owner[key]
    elif what < 0.72:
        owner[key] = _nested(draw)
    elif what < 0.80:
        other = draw.choice(found)
        owner[key] = json.loads(json.dumps(_owner(value, other)[other[-1]]))
    elif what < 0.88:
        owner[key] = [owner[key]] if draw.random() < 0.5 else {"value": owner[key]}
    elif isinstance(owner, dict):
        owner[draw.choice((*_NAMES, str(key) + "s", "__class__"))] = owner.pop(key) if draw.random() < 0.5 else 1
    else:
        owner += owner[:3] * draw.choice((1, 50))
    return value


def damage_bytes(raw: bytes, draw: Draw) -> bytes:
    """Cut, flipped, blanked, shuffled, repeated or other bytes."""
    at = draw.randrange(len(raw)) if raw else 0
    kind = draw.randrange(9)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[: draw.randrange(1, 40)]
    if kind == 2:
        return b""
    if kind == 3:
        broken = bytearray(raw)
        for _ in range(draw.choice((1, 8, 200))):
            # The beginning of a file says what the rest is.
            place = draw.randrange(len(raw) if draw.random() < 0.5 else min(len(raw), 400))
            broken[place] ^= 1 << draw.randrange(8)
        return bytes(broken)
    if kind == 4:
        return raw[:at] + bytes(draw.randrange(1, 500)) + raw[at + 1 :]
    if kind == 5:
        return raw[:at] + b"\xff\xfe\xc3\x28" + raw[at:]
    if kind == 6:
        return raw + raw[:at]
    if kind == 7:
        return draw.randbytes(draw.choice((7, 8, 64, 5000)))
    return raw[at:] + raw[:at]


def damage_json(raw: bytes, draw: Draw) -> bytes:
    """JSON with another value in it, or that is no JSON or a strange one."""
    kind = draw.random()
    if kind < 0.12:
        return damage_bytes(raw, draw)
    if kind < 0.16:
        return b"[" * _DEEP + b"]" * _DEEP
    if kind < 0.20:
        return b'{"a":' * _DEEP + b"1" + b"}" * _DEEP
    value = json.loads(raw.decode(errors="replace"))
    if kind < 0.26 and isinstance(value, dict) and value:  # a key twice: the second counts
        key = draw.choice(list(value))
        return raw.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(_VALUES))}}}".encode()
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = change_value(value, draw)
    return json.dumps(value).encode()


def damage_jsonl(raw: bytes, draw: Draw) -> bytes:
    """One line or all of them damaged as JSON."""
    if draw.random() < 0.15:
        return damage_bytes(raw, draw)
    lines = raw.splitlines()
    for at in [draw.randrange(len(lines))] if draw.random() < 0.7 else range(len(lines)):
        lines[at] = damage_json(lines[at], draw)
    return b"\n".join(lines) + b"\n"


def damage_gzip(raw: bytes, draw: Draw) -> bytes:
    """The file damaged, or what is packed in it."""
    if draw.random() < 0.5:
        return damage_bytes(raw, draw)
    return gzip.compress(damage_jsonl(gzip.decompress(raw), draw))


def damage_yaml(raw: bytes, draw: Draw) -> bytes:
    """A recipe with other values, aliases that grow, tags that would run code, or damaged bytes."""
    kind = draw.random()
    if kind < 0.15:
        return damage_bytes(raw, draw)
    if kind < 0.25:
        tags = ("!!python/object/apply:os.system [touch stolen]", "!!python/name:os.system", "!!binary x", "!!set {a}")
        return raw + f"\nname: {draw.choice(tags)}\n".encode()
    if kind < 0.32:
        rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        return "\n".join(rows).encode() + (b"\n" + raw if draw.random() < 0.5 else b"")
    if kind < 0.38:
        return raw + b"\nsummary: " + b"[" * _DEEP
    if kind < 0.42:
        return raw + b"\nconvert: &a {to: *a, <<: *a}\n"
    value = json.loads(json.dumps(yaml.safe_load(raw)))  # no aliases
    for _ in range(draw.choice((1, 1, 2))):
        value = change_value(value, draw)
    return (
        json.dumps(value).encode()
        if draw.random() < 0.3
        else yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )


def damage_safetensors(raw: bytes, draw: Draw) -> bytes:
    """The header with another value in it, or the file damaged."""
    length = struct.unpack("<Q", raw[:8])[0]
    kind = draw.random()
    if kind < 0.35:
        return damage_bytes(raw, draw)
    if kind < 0.45:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + raw[8:]
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    if kind < 0.55:
        entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "NOPE", "F4", ""))
    elif kind < 0.65:
        entry["shape"] = draw.choice(([], entry["shape"][::-1], [*entry["shape"], 1], [-1, -1], [2**62, 4], [0]))
    elif kind < 0.72:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind < 0.78:
        header[draw.choice((*_NAMES, "model.norm.weights"))] = header.pop(name)
    elif kind < 0.84:  # numbers that are none
        start, end = 8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1]
        count = (end - start) // 4
        return raw[:start] + struct.pack("<f", draw.choice((math.nan, math.inf, 3e38))) * count + raw[end:]
    else:
        header = change_value(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def damage_index(raw: bytes, draw: Draw) -> bytes:
    """A shard index with other names in it."""
    if draw.random() < 0.5:
        return damage_json(raw, draw)
    index = json.loads(raw)
    names = list(index["weight_map"])
    for name in draw.sample(names, draw.choice((1, len(names)))):
        index["weight_map"][name] = draw.choice((*_NAMES, *index["weight_map"].values(), "config.json"))
    return json.dumps(index).encode()


def damage_gguf(raw: bytes, draw: Draw) -> bytes:
    """The file damaged, most of the time in its header: counts, lengths, types, offsets."""
    if draw.random() < 0.3:
        return damage_bytes(raw, draw)
    broken = bytearray(raw)
    for _ in range(draw.choice((1, 2))):
        at = draw.randrange(4, min(len(raw), 5200) - 8)
        width = draw.choice((1, 4, 8))
        number = draw.choice((0, 1, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 2 ** (8 * width)
        broken[at : at + width] = number.to_bytes(width, "little")
    return bytes(broken)


def damage_text(raw: bytes, draw: Draw) -> bytes:
    return damage_bytes(raw, draw)


KINDS: dict[str, Callable[[bytes, Draw], bytes]] = {
    ".json": damage_json,
    ".jsonl": damage_jsonl,
    ".gz": damage_gzip,
    ".yaml": damage_yaml,
    ".safetensors": damage_safetensors,
    ".gguf": damage_gguf,
    "index.json": damage_index,
}


def damage_place(path: Path, outside: Path, draw: Draw) -> None:
    """Something else where a file should be: nothing, a folder, a link that leads out, round or nowhere, a pipe."""
    path.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        return
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(outside / "secret.txt")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to(outside / "nowhere" / path.name)
    else:
        os.mkfifo(path)  # reading it would wait for ever


def damage(path: Path, outside: Path, draw: Draw) -> str:
    """Damages one file; gives what was done."""
    if draw.random() < 0.10:
        damage_place(path, outside, draw)
        return f"place of {path.name}"
    kind = next((kind for end, kind in reversed(KINDS.items()) if path.name.endswith(end)), damage_bytes)
    raw = path.read_bytes()
    path.write_bytes(kind(raw, draw))
    return f"{kind.__name__} of {path.name}"


def put(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
