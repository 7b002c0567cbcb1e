"""What each operation is given: the same random inputs for every provider, and the least bytes that it must move.

Shapes as in modeling/reference.py, softmax's inputs laid out [B, heads, T, D] as PyTorch's own attention wants them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SINKS = 64, 1
TAYLOR_DIM = 16  # query and key channels of based
GATE_TEMPERATURE = 16.0  # as gated linear attention's: decays near 1

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B, T, H, G and D of one measurement; `dtype` is a torch dtype's name."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "device"}


def make_inputs(op: str, shape: Shape) -> Inputs:
    """Inputs of `op` by name, leaves that want a gradient where training wants one; the same numbers each time."""
    dtype, device = getattr(torch, shape.dtype), torch.device(shape.device)
    batch, tokens, heads, groups, dim = shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.head_dim
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=of)

    def decay(*size: int, of: torch.dtype) -> Tensor:
        return (F.logsigmoid(normal(*size, of=of)) / GATE_TEMPERATURE).to(of)

    if op == "softmax":
        found = {
            "q": normal(batch, heads, tokens, dim),
            "k": normal(batch, groups, tokens, dim),
            "v": normal(batch, groups, tokens, dim),
        }
        return _leaves(found)
    keys = min(TAYLOR_DIM, dim) if op == "based" else dim
    found = {
        "q": normal(batch, tokens, heads, keys),
        "k": normal(batch, tokens, groups, keys),
        "v": normal(batch, tokens, groups, dim),
    }
    if op == "based":
        found["q"] *= keys**-0.5
    elif op == "mamba2":
        found["log_decay"] = decay(batch, tokens, groups, of=torch.float32)
    elif op == "gla":
        found["log_decay"] = decay(batch, tokens, groups, dim, of=dtype)
    elif op == "gated_delta":
        found["q"], found["k"] = F.normalize(found["q"], dim=-1), F.normalize(found["k"], dim=-1)
        found["log_decay"] = decay(batch, tokens, groups, of=torch.float32)
        found["beta"] = torch.sigmoid(normal(batch, tokens, groups))
    found = _leaves(found)
    if op == "retention":
        # RetNet's decays, one a head: constants, which take no gradient and no memory.
        head = torch.arange(groups, dtype=torch.float64)
        constant = torch.log1p(-(2.0 ** (-5.0 - head))).to(device=device, dtype=torch.float32)
        found["log_decay"] = constant.expand(batch, tokens, groups)
    return found


def _leaves(tensors: Inputs) -> Inputs:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def trained(inputs: Inputs) -> list[Tensor]:
    """The inputs that get a gradient."""
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def forget_gradients(inputs: Inputs) -> None:
    for tensor in trained(inputs):
        tensor.grad = None


def forward_bytes(inputs: Inputs, output: Tensor) -> int:
    """Every input read once and the output written once."""
    return sum(map(_bytes, inputs.values())) + _bytes(output)


def backward_bytes(inputs: Inputs, output: Tensor) -> int:
    """Inputs and the output's gradient read once, the inputs' gradients written once."""
    return forward_bytes(inputs, output) + sum(map(_bytes, trained(inputs)))


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor counts for what it stores."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
