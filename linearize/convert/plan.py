"""What a conversion would give, from a config alone: every tensor and its origin, state, KV bytes, memory and time."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UsageError
from ..modeling import MIXERS, SOFTMAX, LinearizeConfig, LinearizeForCausalLM, Mixer
from .anatomy import family_of, meta_model, read_anatomy
from .estimates import convert_estimate, distill_estimate
from .keep import as_many, kept_heads, parse_auto

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


def student_config(
    teacher: PreTrainedModel,
    to: str,
    *,
    keep_softmax: str | Sequence[int] | None = None,
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
    window = DEFAULT_WINDOW if window is None else window
    sinks = (DEFAULT_SINKS if window else 0) if sinks is None else sinks
    options = {"window": window, "sinks": sinks, **(mixer_options or {})}
    layers: list[dict[str, Any]] = []
    for index, anatomy in enumerate(anatomies):
        heads = kept.get(index, [])
        if len(heads) == anatomy.num_heads:
            layers.append({"mixer": SOFTMAX})
        else:
            layers.append({"mixer": to, "softmax_heads": heads, "anatomy": anatomy.to_dict()})
    # With every layer left softmax it is the teacher in the converted format: the end of every comparison.
    if any(layer["mixer"] != SOFTMAX for layer in layers):
        _check_options(to, anatomies[0], options)
    parent = copy.deepcopy(teacher.config)
    parent.dtype = teacher.dtype
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


@dataclass
class TensorPlan:
    """One tensor of the result: `origin` is "teacher: NAME" or "new: how it starts"."""

    name: str
    shape: list[int]
    origin: str


@dataclass
class LayerPlan:
    """One decoder layer; `index` is -1 for what lies outside the layers."""

    index: int
    mixer: str
    softmax_heads: list[int] = field(default_factory=list)
    tensors: list[TensorPlan] = field(default_factory=list)


@dataclass
class Plan:
    """What `plan` reports; bytes are for the model in `dtype`, states in fp32."""

    mixer: str
    mixer_options: dict[str, Any]
    dtype: str
    layers: list[LayerPlan]
    parameters: int
    new_parameters: int
    state_bytes_per_sequence: int
    kv_bytes_per_token: int
    kv_bytes_per_token_teacher: int
    convert: dict[str, Any]
    distill: dict[str, Any]
    placeholder: str | None = None  # an `auto` that nothing has measured yet: `layers` shows as many, evenly spread

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(model: PreTrainedConfig | PreTrainedModel | str | Path, to: str = "based", **options: Any) -> Plan:
    """The plan of a conversion, without weights.

    Args:
        model: a config, a loaded model, a Hub id, a folder or a config.json; only the config is read.
        to, options: as in `convert`.

    Raises:
        UserError, UsageError: as in `convert`.
    """
    check_mixer(to)
    if isinstance(model, (str, Path)):
        from ..source import ModelSource, load_config

        model = load_config(ModelSource(model=str(model)))
    teacher = model if isinstance(model, PreTrainedModel) else meta_model(model)
    anatomies = read_anatomy(teacher)
    asked = options.get("keep_softmax")
    wanted = parse_auto(asked, anatomies)
    if wanted is not None:  # which ones is measured at the conversion; how many is known
        options["keep_softmax"] = as_many(wanted, anatomies)
    config = student_config(teacher, to, **options)
    with torch.device("meta"):
        student = LinearizeForCausalLM(config)
    found = describe(student, teacher, to)
    found.placeholder = asked if wanted is not None else None
    return found


def describe(student: LinearizeForCausalLM, teacher: PreTrainedModel, to: str) -> Plan:
    """The plan of a student, on the meta device or with weights."""
    config: Any = student.config
    element = torch.finfo(teacher.dtype).bits // 8
    prefix = family_of(teacher.config).layers
    layers = [
        LayerPlan(index, layer["mixer"], layer.get("softmax_heads", [])) for index, layer in enumerate(config.layers)
    ]
    outside = LayerPlan(-1, "outside the layers")
    teacher_names = set(teacher.state_dict())
    parameters = new_parameters = 0
    tied = set(getattr(student, "all_tied_weights_keys", {}) or {})
    for name, tensor in student.state_dict().items():
        origin = f"teacher: {name}" if name in teacher_names else f"new: {_start_of(name, to)}"
        if name in tied:
            origin += " (tied)"
        else:
            parameters += tensor.numel()
        if ".mixer." in name:
            new_parameters += tensor.numel()
        owner = outside
        if name.startswith(prefix + "."):
            owner = layers[int(name[len(prefix) + 1 :].split(".")[0])]
        owner.tensors.append(TensorPlan(name, list(tensor.shape), origin))
    state = kv = kv_teacher = 0
    swapped = dict(student.mixer_layers())
    for index, anatomy in enumerate(read_anatomy(teacher)):
        attention = swapped.get(index)
        heads = anatomy.num_kv_heads * anatomy.head_dim * 2 * element
        kv_teacher += heads
        kv += heads if attention is None else attention.kv_bytes_per_token(element)
        state += 0 if attention is None else attention.mixer.state_bytes(element)
    facts = {
        "parameters": parameters,
        "new_parameters": new_parameters,
        "hidden": config.hidden_size,
        "layers": len(layers),
        "vocab": config.vocab_size,
    }
    return Plan(
        mixer=to,
        mixer_options=dict(config.mixer_options),
        dtype=str(teacher.dtype).removeprefix("torch."),
        layers=[outside, *layers],
        parameters=parameters,
        new_parameters=new_parameters,
        state_bytes_per_sequence=state,
        kv_bytes_per_token=kv,
        kv_bytes_per_token_teacher=kv_teacher,
        convert=convert_estimate(parameters, new_parameters, element),
        distill=distill_estimate(facts, getattr(config, "intermediate_size", None)),
    )


def _start_of(name: str, to: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    starts = {
        "proj_q": "singular vectors of the teacher's query and key moments",
        "proj_k": "singular vectors of the teacher's query and key moments",
        "weight": "identity",
        "bias": "zero",
        "gain": "constant",
        "gain_q": "zero",
        "gain_k": "zero",
        "norm_weight": "one",
        "linear_scale": "share of the teacher's value size",
        "window_scale": "one",
        "log_half_life": "half-lives log-spaced from 16 to 4096 tokens",
        "gate_down": "random",
        "gate_up": "zero",
        "gate_bias": "half-lives log-spaced from 16 to 4096 tokens",
        "dt_weight": "zero",
        "dt_bias": "dt = 1",
        "A_log": "half-lives log-spaced from 16 to 4096 tokens",
        "D": "zero",
    }
    return starts.get(leaf, f"default of {to}")
