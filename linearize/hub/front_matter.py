"""The YAML at the head of a model card, read and written by huggingface_hub."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import one_line


def split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the text below it. Raises ValueError where it is no YAML mapping."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text.removeprefix("\ufeff"), ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"its front matter is not valid YAML: {one_line(error)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"its front matter is not a YAML mapping of names ({error})") from error
    return card.data.to_dict(), card.text


def join(fields: Any, body: str) -> str:
    """A card of `fields`, a ModelCardData, and the text below it."""
    return f"---\n{fields.to_yaml()}\n---\n\n{body}"
