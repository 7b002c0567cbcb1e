"""What a conversion would give, from a config alone: every tensor and its origin, state, KV bytes, memory and time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import SOFTMAX, LinearizeForCausalLM
from ..source import load_config
from ..surgery.anatomy import meta_model, read_anatomy
from ..surgery.bytes import cache_bytes
from ..surgery.keep import as_many, parse_auto
from ..surgery.student import check_mixer, student_config
from .estimates import convert_estimate, distill_estimate
from .given import source_of


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
    softmax_window: int | None = None


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
    state_bytes_per_sequence_teacher: int  # of layers that have a window of their own
    kv_bytes_per_token: int
    kv_bytes_per_token_teacher: int
    convert: dict[str, Any]
    distill: dict[str, Any]
    placeholder: str | None = None  # an `auto` that nothing has measured yet: `layers` shows as many, evenly spread

    @property
    def swapped(self) -> int:
        """Layers that get a mixer."""
        return sum(layer.index >= 0 and layer.mixer != SOFTMAX for layer in self.layers)

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
    if not isinstance(model, (PreTrainedModel, PreTrainedConfig)):
        model = load_config(source_of(model))
    teacher = model if isinstance(model, PreTrainedModel) else meta_model(model)
    anatomies = read_anatomy(teacher)
    asked = options.get("keep_softmax")
    wanted = parse_auto(asked, anatomies, options.get("keep_window"))
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
    anatomies = read_anatomy(teacher)
    prefix = anatomies[0].stack_path
    layers = [
        LayerPlan(index, layer["mixer"], layer.get("softmax_heads", []), softmax_window=layer.get("softmax_window"))
        for index, layer in enumerate(config.layers)
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
    held = cache_bytes(anatomies, dict(student.mixer_layers()), element)
    modules = [teacher.get_submodule(anatomy.path) for anatomy in anatomies]
    largest = max(sum(tensor.numel() for tensor in module.parameters()) for module in modules)
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
        state_bytes_per_sequence=held.state,
        state_bytes_per_sequence_teacher=held.state_teacher,
        kv_bytes_per_token=held.kv,
        kv_bytes_per_token_teacher=held.kv_teacher,
        convert=convert_estimate(parameters, new_parameters, largest, element),
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
        "log_horizon": "the states' half-lives",
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
