"""What others will read says nothing of this machine: paths are cut to their last part, and a token is refused.

Records and results are text that anyone will read; weights, tokenizer and code go up as they are.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .rows import SUFFIXES

# A folder of the Hub's cache tells the model and its commit.
CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")
_FILES = (*SUFFIXES, ".gguf", ".safetensors", ".json", ".yaml", ".yml")
_STARTS = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file://")
# In running text: a slash that begins a word, not one inside a URL, a Hub id or a fraction.
_IN_TEXT = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:|\.\.?)?(?:[/\\][\w.@+%~-]+)+[/\\]?")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
# Of a config: where transformers notes what it was loaded from.
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def cut(piece: str) -> str:
    """A path of this machine to its last part; a Hub id, a number or a word as it is."""
    if cached := CACHED.search(piece.replace("\\", "/") + "/"):
        return f"{cached['owner']}/{cached['name']}"
    if _STARTS.match(piece) or piece.endswith(_FILES):
        parts = [part for part in re.split(r"[/\\]", piece.removeprefix("file:")) if part not in ("", ".", "..", "~")]
        return parts[-1] if parts else "."
    return piece


def word(text: str) -> str:
    """A word of a command, `--flag=FILE,FILE` as well as `FILE`."""
    return "".join(part if part in "=,:" else cut(part) for part in re.split(r"([=,])", text))


def text(value: str) -> str:
    """A text that may have paths in it: a name, a list of files, a command, an error's message."""
    if _STARTS.match(value) or not re.search(r"\s", value):
        return word(value)
    return _IN_TEXT.sub(lambda found: cut(found[0]), value)


def command(line: str) -> str:
    """A command line, word by word."""
    try:
        return shlex.join(word(part) for part in shlex.split(line))
    except ValueError:
        return text(line)


def record(value: Any) -> Any:
    """Plain data of a record or a result, its keys too, with `text` applied."""
    return _walk(value, lambda key, found: command(found) if key == "command" else text(found), keys=True)


def _places(value: Any) -> Any:
    return _walk(value, lambda key, found: cut(found) if key in _PLACES else found, keys=False)


def _walk(value: Any, said: Callable[[str | None, str], str], *, keys: bool, key: str | None = None) -> Any:
    if isinstance(value, str):
        return said(key, value)
    if isinstance(value, list):
        return [_walk(part, said, keys=keys, key=key) for part in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, entry in value.items():
        shown = unique = text(name) if keys else name
        while unique in found:  # two files of one name
            unique += "'"
        found[unique] = _walk(entry, said, keys=keys, key=shown)
    return found


def contents(name: str, path: Path, *, told: bool) -> bytes | None:
    """What goes up in place of the file `path`, which will be `name`; None for the file itself, to the byte.

    Args:
        told: it is a record or a result, and not a part of the model.

    Raises:
        UserError: a token of the Hub stands in it, or it is not the text that its name says.
    """
    if name.endswith((".safetensors", ".png")):
        return None
    raw = path.read_bytes()
    refuse_token(str(path), raw)
    try:
        if name.endswith(".json") and (told or name.endswith("config.json")):
            before = json.loads(raw)
            after = record(before) if told else _places(before)
            return None if after == before else (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()
        if told and name.endswith(".jsonl"):
            lines = [json.loads(line) for line in raw.decode().splitlines() if line.strip()]
            after = [record(line) for line in lines]
            return None if after == lines else "".join(json.dumps(line) + "\n" for line in after).encode()
        if told and name.endswith(".yaml"):
            shown = "".join(_IN_TEXT.sub(lambda found: cut(found[0]), line) for line in raw.decode().splitlines(True))
            return None if shown.encode() == raw else shown.encode()
    except ValueError as error:
        raise UserError(f"{path} is not what its name says ({error}); repair or remove it") from error
    return None


def refuse_token(where: str, raw: bytes) -> None:
    """Raises UserError where a token of the Hub stands in `raw`: pushed, it would be anyone's."""
    if found := _TOKEN.search(raw):
        raise UserError(
            f"{where} holds a token of the Hub ({found[0][:6].decode()}...): take it out, and revoke it at "
            "https://huggingface.co/settings/tokens if others have seen it; nothing was pushed"
        )
