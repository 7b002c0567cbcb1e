"""How many tokens a model has positions for, where it has learned them one by one."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import UsageError


def room_of(*models: Any) -> int | None:
    """The most tokens that all of the models (None for one that is not there) have positions for. None where they have
    no end: rotation and ALiBi go on past `max_position_embeddings`, which is then how long training texts were.
    """
    return min((room for model in models if (room := _learned(model)) is not None), default=None)


def _learned(model: Any) -> int | None:
    """`max_position_embeddings` of a model that has an embedding of so many rows beside its tokens'. It is read off the
    modules, which families that are not converted, and students that kept every layer, have too."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int) or not isinstance(model, nn.Module):
        return None
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    words = set() if tokens is None else set(tokens.modules())
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part not in words]
    # OPT's begins some rows later.
    return most if any(table.num_embeddings - getattr(table, "offset", 0) == most for table in tables) else None


def check_room(room: int | None, what: str, tokens: int, advice: str) -> None:
    """Raises UsageError, with the `advice`, where `what` (a flag and its value) takes more than `room` positions."""
    if room is not None and tokens > room:
        raise UsageError(
            f"{what} takes {tokens} positions, and the model has learned {room} (max_position_embeddings): {advice}"
        )
