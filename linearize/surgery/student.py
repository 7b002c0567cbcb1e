"""The student's config: which layers and heads are swapped, for what, with which options."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UsageError
from ..modeling import MIXERS, SOFTMAX, LinearizeConfig, Mixer
from ..modeling.joins import UnnormalizedMixer
from .anatomy import read_anatomy
from .keep import check_keep_window, kept_heads

DEFAULT_WINDOW, DEFAULT_SINKS = 64, 1
_OF_THE_ANATOMY = ("num_heads", "num_kv_heads", "head_dim", "hidden_size", "scale")


def check_mixer(name: str) -> None:
    """Raises UsageError, with the nearest name, where there is no such mixer."""
    if name not in MIXERS:
        near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UsageError(f"--to: there is no mixer {name!r}{hint} There are: {', '.join(sorted(MIXERS))}")


def mixer_option_names(to: str) -> dict[str, type]:
    """What `mixer_options` may hold for the mixer `to`, with each option's type; the anatomy gives the rest."""
    names: dict[str, type] = {}
    for cls in reversed(MIXERS[to].__mro__):
        if issubclass(cls, Mixer):
            for name, parameter in inspect.signature(cls.__init__).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY and name not in _OF_THE_ANATOMY:
                    names[name] = type(parameter.default)
    return names


def calibrated_options(to: str, mixer_options: dict[str, Any] | None) -> dict[str, Any]:
    """`mixer_options` of a student that is calibrated: what should start from data alone is on, unless they say no."""
    mixer = MIXERS.get(to)
    weighed = mixer is not None and issubclass(mixer, UnnormalizedMixer)
    return {**({"gains": True} if weighed else {}), **(mixer_options or {})}


def student_config(
    teacher: PreTrainedModel,
    to: str,
    *,
    keep_softmax: str | Sequence[int] | None = None,
    keep_window: int | None = None,
    window: int | None = None,
    sinks: int | None = None,
    mixer_options: dict[str, Any] | None = None,
) -> LinearizeConfig:
    """The config of the converted model; `teacher` may be on the meta device. Arguments as in `convert`.

    Raises:
        UserError, UsageError: the model cannot be converted, or an option is out of range.
    """
    check_mixer(to)
    anatomies = read_anatomy(teacher)
    kept = kept_heads(keep_softmax, anatomies)
    check_keep_window(keep_window, kept, anatomies)
    window = DEFAULT_WINDOW if window is None else window
    kept_sinks = DEFAULT_SINKS if sinks is None else sinks
    sinks = (DEFAULT_SINKS if window else 0) if sinks is None else sinks
    options = {"window": window, "sinks": sinks, **(mixer_options or {})}
    bound = {"softmax_window": keep_window, "softmax_sinks": kept_sinks}
    layers: list[dict[str, Any]] = []
    for index, anatomy in enumerate(anatomies):
        heads = kept.get(index, [])
        if len(heads) == anatomy.num_heads:
            layers.append({"mixer": SOFTMAX})
        else:
            entry = {"mixer": to, "softmax_heads": heads, "anatomy": anatomy.to_dict()}
            layers.append(entry | (bound if keep_window and heads else {}))
    # With every layer left softmax it is the teacher in the converted format: the end of every comparison.
    if any(layer["mixer"] != SOFTMAX for layer in layers):
        _check_options(to, anatomies[0], options)
    parent = copy.deepcopy(teacher.config)
    parent.dtype = teacher.dtype
    here = Path(parent.name_or_path) if parent.name_or_path else None
    if here is not None and here.exists():  # where it lay on this machine is no one else's business
        parent.name_or_path = here.resolve().name
    vars(parent).pop("transformers_weights", None)  # the file of the teacher's weights: the student's lie elsewhere
    return LinearizeConfig(
        parent_config=parent, layers=layers, mixer_options=options, architectures=["LinearizeForCausalLM"]
    )


def _check_options(to: str, anatomy: Any, options: dict[str, Any]) -> None:
    known = mixer_option_names(to)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UsageError(f"the mixer {to} has no option {name!r}{hint} It has: {', '.join(sorted(known))}")
        if type(value) is not known[name]:
            raise UsageError(f"the mixer's option {name} must be {known[name].__name__}, got {value!r}")
    with torch.device("meta"):
        try:
            MIXERS[to](
                num_heads=anatomy.num_heads,
                num_kv_heads=anatomy.num_kv_heads,
                head_dim=anatomy.head_dim,
                hidden_size=anatomy.hidden_size,
                **options,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
