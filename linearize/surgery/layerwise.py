"""The proof and the starts of the mixers for a teacher that does not fit in memory: one layer's attention has its
weights at a time.

What a module is called with comes from a forward, and depends on the other layers only in its values. Where a norm
comes before the attention, any values show what it computes: there the forward leaves out all that is large, and little
more is read than the attention's own weights. Elsewhere the mixers' starts need the size of the values too: the
forward is whole, and each layer has its weights while it runs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling import AttentionAnatomy, LinearizeAttention
from ..modeling.projections import weight_and_bias
from .anatomy import quiet
from .parts import PROJECTION
from .proof import Call, calls_of, prove, starts_of
from .swap import fill_buffers, start_mixer

Read = Callable[[str], Tensor]
Visit = Callable[[AttentionAnatomy, Call], None]


def without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The teacher's class with its buffers (rotary frequencies) in memory and its parameters on the meta device."""
    with init_empty_weights(include_buffers=False), quiet():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


@torch.no_grad()
def prove_layerwise(
    teacher: PreTrainedModel, anatomies: Sequence[AttentionAnatomy], read: Read, mapped: Read, visit: Visit
) -> None:
    """`proven_calls` for a teacher of `without_weights`, which is without them again afterwards.

    Args:
        read, mapped: give a tensor of the teacher by its name, in memory and as little of it as can be.
        visit: is given each proven layer's call, while its attention and its norms have their weights; one at a time,
            in another thread.

    Raises:
        UserError: as `proven_calls`.
    """
    with _outside(teacher, anatomies[0].stack_path, mapped):
        try:
            texts = _calls_without_layers(teacher, anatomies, read)
        except Exception:  # of any family's code, which does not run without what is left out
            texts = []
        if not texts or any(call.norm is None for call in texts[-1]):
            _prove_on_the_way(teacher, anatomies, read, visit)
            return
    # The next layer is proven while this one is visited: two have weights at a time.
    with ThreadPoolExecutor(max_workers=1) as beside:
        visiting: Future[None] | None = None
        for anatomy, *calls in zip(anatomies, *texts, strict=True):
            layer = teacher.get_submodule(anatomy.layer_path)
            with ExitStack() as stack:
                names = _names(layer, _left_out(layer, anatomy))
                stack.enter_context(_filled(layer, names, read, anatomy.layer_path))
                prove(teacher, [anatomy], *([call] for call in calls))
                if visiting is not None:
                    visiting.result()
                visiting = beside.submit(_visit_and_close, stack.pop_all(), visit, anatomy, calls[-1])
        if visiting is not None:
            visiting.result()


@torch.no_grad()  # a thread has its own mode
def _visit_and_close(stack: ExitStack, visit: Visit, anatomy: AttentionAnatomy, call: Call) -> None:
    with stack:
        visit(anatomy, call)


def _calls_without_layers(
    teacher: PreTrainedModel, anatomies: Sequence[AttentionAnatomy], read: Read
) -> list[list[Call]]:
    """The calls of a forward in which nothing that is large in a layer, the attention included, adds anything."""
    with ExitStack() as stack:
        for anatomy in anatomies:
            layer = teacher.get_submodule(anatomy.layer_path)
            attention = teacher.get_submodule(anatomy.path)
            large = _left_out(layer, anatomy)
            for name in large:
                stack.enter_context(_without(layer.get_submodule(name)))
            stack.enter_context(_without(attention, (None,)))
            names = _names(layer, [*large, anatomy.path.rpartition(".")[2]])
            stack.enter_context(_filled(layer, names, read, anatomy.layer_path))
        return [calls_of(teacher, anatomies, start) for start in starts_of(teacher)]


def _prove_on_the_way(
    teacher: PreTrainedModel, anatomies: Sequence[AttentionAnatomy], read: Read, visit: Visit
) -> None:
    """In a whole forward, a layer at a time."""
    with ExitStack() as stack:
        for anatomy in anatomies:
            stack.enter_context(_on_demand(teacher.get_submodule(anatomy.layer_path), read, anatomy.layer_path))
        for start in starts_of(teacher):

            def check(anatomy: AttentionAnatomy, call: Call, last: bool = not start) -> None:
                prove(teacher, [anatomy], [call])
                if last:
                    visit(anatomy, call)

            calls_of(teacher, anatomies, start, visit=check)


@contextmanager
def _outside(teacher: PreTrainedModel, layers: str, mapped: Read) -> Iterator[None]:
    """The weights outside the layers, for as long as the body takes; the head is not run."""
    base: nn.Module = teacher.base_model
    path = "" if base is teacher else teacher.base_model_prefix
    prefix = f"{path}." if path else ""
    names = [name for name in base.state_dict() if not f"{prefix}{name}".startswith(f"{layers}.")]
    with _filled(base, names, mapped, path):
        yield


@contextmanager
def _on_demand(layer: nn.Module, read: Read, path: str) -> Iterator[None]:
    """For the body, a layer has its weights while it runs."""
    filling = ExitStack()
    handles = [
        layer.register_forward_pre_hook(
            lambda *_: filling.enter_context(_filled(layer, list(layer.state_dict()), read, path))
        ),
        layer.register_forward_hook(lambda *_: filling.close()),
    ]
    try:
        yield
    finally:
        filling.close()
        for handle in handles:
            handle.remove()


def _left_out(layer: nn.Module, anatomy: AttentionAnatomy) -> list[str]:
    """The large children of a layer beside its attention."""
    attention = anatomy.path.rpartition(".")[2]
    large = {name.split(".")[0] for name, parameter in layer.named_parameters() if parameter.dim() > 1}
    return [name for name, _ in layer.named_children() if name in large and name != attention]


def _names(layer: nn.Module, left_out: Sequence[str]) -> list[str]:
    return [name for name in layer.state_dict() if name.split(".")[0] not in left_out]


@contextmanager
def _without(module: nn.Module, more: tuple[Any, ...] | None = None) -> Iterator[None]:
    """For the body, a module gives zeros, or the residual that it is to add to, followed by `more` where it gives
    several things."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]

    def nothing(x: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if x is None else x
        width = weight_and_bias(module)[0].shape[0] if isinstance(module, PROJECTION) else x.shape[-1]
        zeros = x.new_zeros(*x.shape[:-1], width)
        named = {**dict(zip(parameters[1:], args, strict=False)), **kwargs}
        out = named.get("residual", zeros)  # BLOOM's parts add it themselves
        return out if more is None else (out, *more)

    module.forward = nothing
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _filled(module: nn.Module, names: Sequence[str], read: Read, path: str) -> Iterator[None]:
    """For the body, the module at `path` of the teacher has the weights of these names of its own."""
    before = module.state_dict()
    prefix = f"{path}." if path else ""
    module.load_state_dict({name: read(prefix + name) for name in names}, strict=False, assign=True)
    try:
        yield
    finally:
        module.load_state_dict({name: before[name] for name in names}, strict=False, assign=True)


@torch.no_grad()
def started_mixer(attention: LinearizeAttention, teacher: PreTrainedModel, call: Call, seed: int) -> dict[str, Tensor]:
    """The new tensors of a swapped layer that is on the meta device, and stays there; the teacher's has its weights."""
    module = teacher.get_submodule(attention.path)
    own = copy.deepcopy(attention)
    own.load_state_dict(module.state_dict(), strict=False, assign=True)
    fill_buffers(own, module)
    start_mixer(own, teacher, call, seed)
    return {f"{attention.path}.mixer.{name}": tensor for name, tensor in own.mixer.state_dict().items()}
