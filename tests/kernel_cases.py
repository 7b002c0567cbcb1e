"""What the tests of the kernels share: where they run, fresh inputs, the comparison with the fp64 reference.

On a machine without a GPU the kernels run in Triton's interpreter; `conftest.py` switches it on before any import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DECAY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}


class Draw:
    """Random inputs on the test's device, rounded to `dtype`; the same seed gives the same numbers anywhere."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(DEVICE, dtype or self.dtype)

    def log_decay(self, *shape: int, strength: float = 1.0) -> Tensor:
        """fp32, at most 0, mostly mild."""
        values = torch.nn.functional.logsigmoid(torch.randn(shape, generator=self.generator) + 1.5) * strength
        return values.to(DEVICE)


def worst_chunk(ours: Tensor, exact: Tensor, chunk: int = 64, dim: int = 1) -> float:
    """Largest relative L2 error of a chunk along `dim`, against the larger of the chunk's and the mean chunk's norm."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    assert torch.isfinite(ours).all(), "not finite"
    if exact.dim() <= dim:
        return float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
    typical = exact.norm() / max(1, -(-exact.shape[dim] // chunk)) ** 0.5
    worst = 0.0
    for a, b in zip(ours.split(chunk, dim), exact.split(chunk, dim), strict=True):
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=0.1 * float(typical) + 1e-4)))
    return worst


def gradients(function: Callable[..., list[Tensor]], leaves: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    """Outputs of `function(*leaves)`, then the gradients of sum(output * seed) in the leaves, 0 where there is none."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*copies)
    total = sum((out.double() * seed.to(out.device).double()).sum() for out, seed in zip(outputs, seeds, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    return [out.detach() for out in outputs] + [torch.zeros_like(x) if x.grad is None else x.grad for x in copies]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills what `torch.empty` gives with NaN, so that an element that no program writes shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with torch.device("meta"):  # torch remembers its constructors at the first use, and must not remember ours
        torch.empty(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield
