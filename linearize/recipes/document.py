"""A recipe's text: YAML read safely, `--set` texts, keys and types; the unknown is refused with the nearest name."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, UserError, one_line


class _Loader(yaml.SafeLoader):
    """YAML as people write numbers (1e-3 is one, as in YAML 1.2), and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UsageError, naming `where` it stands, for what is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError(f"{where} is no YAML: {one_line(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises UserError for a file that cannot be read, UsageError for other content."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {error}") from None
    found = parse(text, f"the recipe {path}")
    if not isinstance(found, dict):
        raise UsageError(f"the recipe {path} is no mapping of keys to values")
    return found


def settings_of(settings: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted paths and values from `--set` texts "path=value", the value in YAML, or from a mapping."""
    if isinstance(settings, Mapping):
        return list(settings.items())
    pairs = []
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"--set wants KEY=VALUE, as stages.transfer.learning_rate=1e-3, got {text!r}")
        pairs.append((path.strip(), parse(value, f"--set {text}: the value")))
    return pairs


def check_keys(found: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raises UsageError for a key that is not `known`, with the nearest one that is."""
    known = list(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UsageError(f"{where}: there is no key {str(key)!r}{hint} There are: {', '.join(known)}")


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` wants it. Raises UsageError for another type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if kind is float and number:
            return float(value)
        if kind is int and isinstance(value, float) and value.is_integer():  # 1e7 tokens
            return int(value)
        if kind is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if origin in (Mapping, dict):
            if isinstance(value, dict):
                inner = (*typing.get_args(kind), Any, Any)[1]
                return {str(key): typed(entry, inner, where) for key, entry in value.items()}
        elif kind is Any or (isinstance(value, origin) and (origin is bool or not isinstance(value, bool))):
            return value
    names = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", "mapping") for kind in kinds)
    raise UsageError(f"{where} must be {names}, got {value!r}")
