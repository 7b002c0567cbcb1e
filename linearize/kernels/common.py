"""What the kernels share: dots, argument checks, registration for `torch.compile`, the device guard."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .assembler import reassembled

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_CAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, accumulated in fp32. The interpreter's bf16 dots are wrong in Triton 3.6, so it multiplies in fp32."""
    if _CAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if _CAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


def precision(dtype: torch.dtype | tl.dtype) -> str:
    """`input_precision` of a dot on operands of `dtype`: Triton's default would round fp32 to tf32."""
    return "tf32x3" if dtype in (torch.float32, tl.float32) else "tf32"


def power_of_2(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`; a dot's sides are at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def opaque(name: str, fake: Callable[..., Any], mutates: Iterable[str] = ()) -> Callable[[Any], Any]:
    """Decorator: a function of tensors and plain numbers that `torch.compile` takes whole, as `linearize::NAME`.

    Eager calls reach the function itself, because a custom operator's dispatch costs more than a short kernel. The
    function returns a tuple of new tensors, never an argument; None where it has nothing, which is an empty tensor
    under the compiler.
    """

    def wrap(function: Any) -> Any:
        def whole(call: Any) -> Any:
            @functools.wraps(call)
            def run(*args: Any) -> Any:
                made = call(*args)
                if not isinstance(made, tuple):
                    return made
                like = next(t for t in made if t is not None)
                return tuple(like.new_empty(0) if t is None else t for t in made)

            return run

        registered = torch.library.custom_op(f"linearize::{name}", whole(function), mutates_args=tuple(mutates))
        registered.register_fake(whole(fake))

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return registered(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return wrap


class Launch:
    """`kernel` with its constants decided, as many launches of one configuration share it.

    Triton looks at every argument anew at each launch, which takes longer than a short kernel runs. Here the numbers
    are declared `do_not_specialize`, so that dtypes, alignment and constants alone choose the compiled kernel.
    """

    __slots__ = ("compiled", "constants", "kernel", "stages", "warps")

    def __init__(self, kernel: Any, constants: tuple[Any, ...], warps: int, stages: int) -> None:
        self.kernel, self.constants, self.warps, self.stages = kernel, constants, warps, stages
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs: int, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> None:
        """Starts `kernel(*tensors, *numbers, *constants)` on the current device."""
        if INTERPRETED:
            self.kernel[(programs,)](*tensors, *numbers, *self.constants)
            return
        device = torch.cuda.current_device()
        # Addresses, because Triton asks the driver about every tensor that it is given; 0 for None, which it ignores.
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        variant = (device, *[None if t is None else t.dtype for t in tensors])
        if functools.reduce(operator.or_, addresses) & 15 or max(numbers) >> 31:
            variant += (*[a & 15 != 0 for a in addresses], *[number >> 31 != 0 for number in numbers])
        found = self.compiled.get(variant)
        if found is None:
            arguments = (*tensors, *numbers, *self.constants)
            found = self.compiled[variant] = _compile(self.kernel, arguments, self.warps, self.stages)
        hooks = triton.knobs.runtime
        # A profiler's hook wants Triton's own launch.
        watched = [getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook)]
        if any(watched):
            keywords = {"num_warps": self.warps, "num_stages": self.stages}
            self.kernel[(programs,)](*tensors, *numbers, *self.constants, **keywords)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        run = found.run  # which loads it the first time
        function, metadata = found.function, found.packed_metadata
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *self.constants)


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}


def prepared(kernel: Any, constants: tuple[Any, ...], warps: int, stages: int) -> Launch:
    """The one `Launch` of these constants."""
    key = (id(kernel), constants, warps, stages)
    found = _LAUNCHES.get(key)
    if found is None:
        found = _LAUNCHES[key] = Launch(kernel, constants, warps, stages)
    return found


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> None:
    """Starts `kernel(*tensors, *numbers, *constants)` on the current device. Where its constants take long to work out
    an operation keeps its `Launch`."""
    prepared(kernel, constants, warps, stages)(programs, tensors, numbers)


def _compile(kernel: Any, arguments: tuple[Any, ...], warps: int, stages: int) -> Any:
    """Triton's compiled kernel, before it is loaded onto the device, with the assembler's fault avoided."""
    compiled = kernel.warmup(*arguments, grid=(1,), num_warps=warps, num_stages=stages)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    code = reassembled(compiled)
    if code is not None:
        compiled.kernel = code
    return compiled


def refuse_second_derivative() -> None:
    """Called first in a backward pass. Its kernels' results have no gradient, and would pass for constants.

    Raises:
        RuntimeError: the backward pass is itself recorded (`create_graph=True`).
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the kernels have no second derivative: set LINEARIZE_KERNELS=reference for create_graph=True"
        )


_HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_heads(q: Tensor, k: Tensor, v: Tensor, same_length: bool = True) -> None:
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], one device, floats that the kernels take.

    Raises:
        ValueError: names the argument.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, channels], got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take bfloat16, float16 and float32")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    check_runs_here(q)
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"k has {k.shape[3]} channels, q {q.shape[3]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v is {tuple(v.shape)}: batch, tokens and heads must be those of k, {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or (same_length and q.shape[1] != k.shape[1]):
        raise ValueError(f"k is {tuple(k.shape)}: batch and tokens must be those of q, {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, which do not divide into the {k.shape[2]} heads of k")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[3] > 256:
            raise ValueError(f"{name} has {tensor.shape[3]} channels a head; the kernels take up to 256")


def check_runs_here(tensor: Tensor) -> None:
    """Raises ValueError for a tensor that no kernel can read."""
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(f"q is on {tensor.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1 before the import")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError that names the argument where `tensor` is there and of another shape or device."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, q on {like.device}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, not floating point")


def check_bounds(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """`cu_seqlens` [N + 1], contiguous, on q's device with a batch of 1; its values are not read, that would stall the
    device.

    Raises:
        ValueError: names the argument.
    """
    if cu_seqlens is None:
        return None
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a flattened batch of 1, got q of batch {q.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be whole numbers [documents + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}")
    return cu_seqlens.contiguous()


def check_bend(cap: float, slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """`slopes` [H] in fp32, contiguous, for q [..., H, K].

    Raises:
        ValueError: names the argument.
    """
    if not 0 <= cap < math.inf:
        raise ValueError(f"cap must be at least 0 and finite, got {cap}")
    check_shape("slopes", slopes, (q.shape[-2],), q)
    return None if slopes is None else slopes.to(torch.float32).contiguous()


def check_scale(scale: float) -> None:
    """Raises ValueError for a scale that is no finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
