"""The YAML at the head of a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the text below it. Raises ValueError where it is no YAML mapping."""
    found = _HEAD.match(text)
    if found is None:
        return {}, text
    try:
        fields = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"its front matter is not valid YAML: {' '.join(str(error).split())}") from error
    if fields is not None and not isinstance(fields, dict):
        raise ValueError("its front matter is not a YAML mapping")
    return fields or {}, text[found.end() :]


def join(fields: Mapping[str, Any], body: str) -> str:
    """A card of the two."""
    head = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body}"
