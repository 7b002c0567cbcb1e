"""Click options made from option dataclasses, and the groups of options that verbs share."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import click

from .errors import UsageError

Command = Callable[..., Any]


def _plain(annotation: Any) -> Any:
    """The type behind `X | None`."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def dataclass_options(*kinds: type, skip: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """One flag a field of the dataclasses, None where it is not given, so that each class keeps its own default."""

    def decorate(command: Command) -> Command:
        seen: dict[str, list[str]] = {}
        helps: dict[str, tuple[Any, str]] = {}
        for kind in kinds:
            hints = typing.get_type_hints(kind)
            for entry in fields(kind):
                if entry.name in skip:
                    continue
                default = "" if entry.default in (None, MISSING) else str(entry.default)
                seen.setdefault(entry.name, []).append(default)
                helps[entry.name] = (_plain(hints[entry.name]), entry.metadata.get("help", ""))
        for name, (kind_of, text) in reversed(helps.items()):
            flag = "--" + name.replace("_", "-")
            defaults = [value for value in dict.fromkeys(seen[name]) if value]
            shown = f"{text}  [default: {' or '.join(defaults)}]" if defaults else text
            if typing.get_origin(kind_of) is not None:  # a mapping, given as REGEX=NUMBER
                command = click.option(flag, name, multiple=True, metavar="REGEX=NUMBER", help=shown)(command)
            elif kind_of is bool:
                command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=shown)(command)
            else:
                command = click.option(flag, name, type=kind_of, default=None, help=shown)(command)
        return command

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; `lr_scale` pairs become a mapping."""
    chosen = {name: value for name, value in options.items() if value is not None and value != ()}
    if "lr_scale" in chosen:
        chosen["lr_scale"] = {
            key: _number("--lr-scale", value) for key, value in _pairs("--lr-scale", chosen["lr_scale"])
        }
    return chosen


def _pairs(flag: str, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise UsageError(f"{flag} wants NAME=VALUE, got {text!r}")
        pairs.append((name, value))
    return pairs


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{flag}: {text!r} is not a number") from None


def mixer_options(texts: tuple[str, ...], **named: Any) -> dict[str, Any]:
    """`--mixer-option key=value` pairs (numbers and true or false read as such) beside the named ones.

    Raises:
        UsageError: a text that is no pair, or an option that has a flag of its own.
    """
    values: dict[str, Any] = {}
    for name, text in _pairs("--mixer-option", texts):
        if name in (*named, "window", "sinks"):
            raise UsageError(f"--mixer-option {name}: it has a flag of its own, --{name.replace('_', '-')} {text}")
        values[name] = _value(text)
    return values | given(named)


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def model_options(whose: str = "MODEL") -> Callable[[Command], Command]:
    """Where a model comes from and how it is loaded; `whose` says which of a verb's models is meant."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option("--trust-remote-code", is_flag=True, help=f"Run code that the repository of {whose} ships."),
            click.option("--gguf-file", metavar="NAME", help=f"Read the weights from this GGUF file of {whose}."),
            click.option("--revision", metavar="REV", help=f"Branch, tag or commit of {whose} on the Hub."),
        ):
            command = option(command)
        return command

    return decorate


def run_options(default: str = "the accelerator, else cpu") -> Callable[[Command], Command]:
    """Precision and place; `default` says which place."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option("--device", default=None, help=f"cpu, cuda, cuda:1, mps.  [default: {default}]"),
            click.option(
                "--dtype", default="auto", show_default=True, help="float32, bfloat16, float16; auto: as stored."
            ),
        ):
            command = option(command)
        return command

    return decorate


def swap_options(command: Command) -> Command:
    """What `convert` and `plan` share."""
    for option in (
        click.option("--mixer-option", "extra", multiple=True, metavar="KEY=VALUE", help="Any other of the mixer's."),
        click.option("--state-heads", default=None, help="key: a state a key head (default); query: a query head."),
        click.option("--feature-dim", type=int, default=None, help="based: channels of the projection (16)."),
        click.option("--feature-map", default=None, help="hedgehog, t2r, elu, softmax or identity."),
        click.option(
            "--sinks", type=int, default=None, help="First tokens always visible.  [default: 1 with a window]"
        ),
        click.option("--window", type=int, default=None, help="Keys of exact softmax, 0 for none.  [default: 64]"),
        click.option(
            "--keep-softmax",
            metavar="WHAT",
            help="Leave softmax: 0,7,14 | every:6 | heads:18.6,17.3 | auto:5 layers | heads:auto:10% of the KV bytes.",
        ),
        click.option(
            "--keep-window",
            type=int,
            default=None,
            help="Keys that kept heads see.  [default: all; the cache grows]",
        ),
        click.option(
            "--to", required=True, metavar="MIXER", help="linear, retention, gla, mamba2, gated_delta, based."
        ),
    ):
        command = option(command)
    return command


def calibrate_options(command: Command) -> Command:
    """What `convert` measures on text before it writes."""
    for option in (
        click.option("--text-field", default="text", show_default=True, help="The field with the text."),
        click.option(
            "--keep-score",
            type=click.Choice(["gradient", "induction"]),
            help="How --keep-softmax auto scores: the share of the KL that it brings back, or attention to repeats.  "
            "[default: gradient]",
        ),
        click.option("--calibrate-passes", type=int, help="Passes of the short alignment, 0 for none.  [default: 4]"),
        click.option("--calibrate-length", type=int, help="Tokens of a sequence.  [default: 1024]"),
        click.option("--calibrate-sequences", type=int, help="Sequences, at most 64.  [default: 64]"),
        click.option(
            "--calibrate",
            "calibrate_on",
            metavar="DATASET",
            help="Start the mixers from the teacher's attention on this text; scores are measured on it too.",
        ),
    ):
        command = option(command)
    return command
