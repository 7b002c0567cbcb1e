"""FSDP 2 for the stages, and checkpoints in shards.

What a stage calls is one `Unit`, whose forward gives its loss: the gradients of all that runs inside come together when
that loss goes backward, whichever modules the stage calls and however often. The decoder layers in it, the student's
and the frozen teacher's alike, are shards of their own, gathered while they run; what is left (embeddings, norms, the
head) is gathered with the unit. The models that were loaded stay whole in host memory: what is sharded are twins of
theirs, and what trained is copied back at the end.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import processes

FOLDER = "shards"
_STATES = ("exp_avg", "exp_avg_sq")


class Unit(nn.Module):
    """A call of `run`, which works with `modules`, as one module."""

    def __init__(self, run: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self._run = run
        self.inner = nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def twins(*modules: nn.Module) -> list[Any]:
    """Copies of the modules, whose parameters are others on the same memory; what they share, the copies share."""
    memo: dict[int, Any] = {}
    for module in modules:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    return [copy.deepcopy(module, memo) for module in modules]


def shard(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Shards each module over all processes, in place, but for what a module before it holds; weights go to `device`.

    Of accelerate's settings, FSDP_RESHARD_AFTER_FORWARD and FSDP_OFFLOAD_PARAMS are followed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true" and device.type != "cpu"
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)


@torch.no_grad()
def gather(trained: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copies sharded parameters to the whole ones of the same names, in every process."""
    for name, parameter in trained.items():
        into[name].copy_(_whole(parameter))


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(parameter: Any, whole: Tensor) -> Tensor:
    """`whole`, the same in every process, as `parameter` is laid out."""
    whole = whole.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


# -- checkpoints: every process writes its shards, and any number of processes reads them


def save_shards(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Parameters and AdamW's state into `folder`; called in every process."""
    import torch.distributed.checkpoint as dcp

    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}/{name}"] = value
    dcp.save(state, checkpoint_id=folder / FOLDER)


def holds_shards(checkpoint: Path) -> bool:
    return (checkpoint / FOLDER).is_dir()


def names_in(checkpoint: Path) -> set[str]:
    """Names of the parameters that a checkpoint in shards holds."""
    return {key.removeprefix("parameter/") for key in _keys(checkpoint) if key.startswith("parameter/")}


def _keys(checkpoint: Path) -> set[str]:
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(checkpoint / FOLDER).read_metadata().state_dict_metadata)


def _read(checkpoint: Path, state: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process may read, too
        dcp.load(state, checkpoint_id=checkpoint / FOLDER, no_dist=not dist.is_initialized())


@torch.no_grad()
def load_shards(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Fills parameters, sharded over any number of processes or whole, from a checkpoint in shards."""
    _read(checkpoint, {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()})


@torch.no_grad()
def load_optimizer_shards(checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """AdamW's state likewise; a parameter that had no gradient yet has none."""
    there = _keys(checkpoint)
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if f"step/{name}" in there:
            state[f"step/{name}"] = torch.zeros(())
            state |= {f"{key}/{name}": torch.zeros_like(parameter) for key in _STATES}
    _read(checkpoint, state)
    for name, parameter in parameters.items():
        if f"step/{name}" in there:
            known = {key: state[f"{key}/{name}"] for key in _STATES}
            optimizer.state[parameter] = {"step": _step_of(optimizer, parameter, state[f"step/{name}"]), **known}


def _step_of(optimizer: Any, parameter: Any, step: Tensor) -> Tensor:
    """A fused AdamW counts its steps where the parameter is."""
    return step.to(parameter.device) if optimizer.param_groups[0].get("fused") else step


@torch.no_grad()
def load_whole(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Fills parameters from whole tensors of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(_like(parameter, saved[name]))


@torch.no_grad()
def load_whole_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """AdamW's state from the `state_dict` of one that had whole tensors."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, known in saved["state"].items():
        parameter = order[index]
        state = {key: _like(parameter, known[key]) for key in _STATES}
        optimizer.state[parameter] = {"step": _step_of(optimizer, parameter, known["step"]), **state}
