"""What the verbs' files share: how a model is named, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from ..flags import mixer_options


def command_line() -> list[str]:
    return ["linearize", *sys.argv[1:]]


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def quiet() -> None:
    """transformers' progress and advice stay on stderr; its loading reports say nothing that a verb does not."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()


def source_of(model: str, options: dict[str, Any]) -> Any:
    from ..source import ModelSource

    return ModelSource(
        model=model,
        revision=options.pop("revision", None),
        gguf_file=options.pop("gguf_file", None),
        trust_remote_code=options.pop("trust_remote_code", False),
    )


def flags_of(source: Any) -> str:
    """How the model is named in the next command."""
    named = {"--revision": source.revision, "--gguf-file": source.gguf_file}
    return " ".join([source.model, *(f"{flag} {value}" for flag, value in named.items() if value)])


def swap_of(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `convert` from the flags of `swap_options`."""
    names = ("feature_map", "feature_dim", "state_heads")
    extra = mixer_options(options.pop("extra"), **{name: options.pop(name) for name in names})
    swap = {name: options.pop(name) for name in ("keep_softmax", "keep_window", "window", "sinks")}
    return swap | {"mixer_options": extra}


def say(text: str) -> None:
    click.echo(text, err=True)
