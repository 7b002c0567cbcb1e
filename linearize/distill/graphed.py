"""`--cuda-graph`: a training step is recorded as a CUDA graph, and replayed for every further batch of its kind.

A step of a small model is some thousand launches, each of which takes Python longer than the GPU. What is recorded is a
batch's forward and backward pass, down to the gradients; the optimizer runs as ever. A step stays plain where a value
decides what is launched (documents told apart by their positions, another number of scored tokens than before), where
activations are recomputed, and on what is no single CUDA device.

A recording that breaks off leaves the process damaged: its memory is lost, and random numbers may fail. So a step is
rehearsed first, plainly and with every wait for a value refused.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from ..errors import UserError, causes, one_line
from ..modeling import recording
from ..modeling.layout import whole_rows

Losses = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[dict[str, Tensor]], Losses]
# Of one kind in a row, before that kind is recorded: kernels are loaded, compiled and chosen by then. The last is the
# rehearsal.
PLAIN_STEPS = 3
# Each holds the memory of its activations.
MOST_GRAPHS = 2


class GraphedStep:
    """`step(tensors)`, which adds to the gradients of `parameters`, and its recordings.

    A batch belongs to a recording by its tensors' names, shapes and dtypes and by what `setting` says. All steps are
    plain once something could not be recorded.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.step, self.parameters, self.device = step, parameters, device
        self.graphs: dict[Hashable, StepGraph] = {}
        # setting -> the kind of its last batches, and how many they were
        self.plain: dict[Hashable, tuple[Hashable, int]] = {}
        self.possible = recording.records_on(device)

    def __call__(self, tensors: dict[str, Tensor], setting: Hashable = None) -> Losses:
        if not self.possible:
            return self._plainly(tensors)
        key = (setting, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        if key in self.graphs:
            return self.graphs[key](tensors)
        last, count = self.plain.get(setting, (key, 0))
        count = count + 1 if last == key else 1
        self.plain[setting] = key, count
        if count < PLAIN_STEPS or len(self.graphs) == MOST_GRAPHS:
            return self._plainly(tensors)
        if count == PLAIN_STEPS:
            losses = self._tried(lambda: self._rehearsed(tensors))
        else:
            losses = self._tried(lambda: self._recorded(key, tensors))
        return self._plainly(tensors) if losses is None else losses

    def _plainly(self, tensors: dict[str, Tensor]) -> Losses:
        """On the stream of the recordings: autograd keeps a parameter to the stream on which it first met it."""
        if self.device.type != "cuda":
            return self.step(tensors)
        current, beside = torch.cuda.current_stream(self.device), recording.stream_of(self.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            losses = self.step(tensors)
        current.wait_stream(beside)
        return losses

    def _rehearsed(self, tensors: dict[str, Tensor]) -> Losses:
        with as_recorded(), no_waiting(self.device):
            return self._plainly(tensors)

    def _recorded(self, key: Hashable, tensors: dict[str, Tensor]) -> Losses:
        self.graphs[key] = StepGraph(self.step, self.parameters, tensors, self.device)
        return self.graphs[key](tensors)

    def _tried(self, run: Callable[[], Losses]) -> Losses | None:
        """What `run` gives, or None where it fails: nothing is recorded any more then, and the gradients are as they
        were."""
        before = [(parameter, parameter.grad) for parameter in self.parameters]
        before = [(parameter, None if grad is None else grad.clone()) for parameter, grad in before]
        try:
            return run()
        except UserError:
            raise
        except Exception as error:  # of any model's code
            reason = one_line(causes(error)[-1], 200) or type(error).__name__
        warnings.warn(f"training without CUDA graphs, which is slower: {reason}", stacklevel=3)
        self.possible = False
        self.graphs.clear()
        for parameter, grad in before:
            parameter.grad = grad
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


class StepGraph:
    """One recording of `step`, on tensors like those of `tensors`.

    Raises:
        RuntimeError: the step does something that a CUDA graph cannot hold.
    """

    def __init__(
        self, step: Step, parameters: Sequence[nn.Parameter], tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        self.parameters = parameters
        self.given = {name: tensor.clone() for name, tensor in tensors.items()}
        before = [parameter.grad for parameter in parameters]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a recording's memory is its own, and would be taken beside what lies free
        # without gradients to add to, the step makes them, at addresses that every replay writes anew
        for parameter in parameters:
            parameter.grad = None
        with as_recorded():
            self.replay, self.losses = recording.record(lambda: step(self.given), device)
        self.made = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def __call__(self, tensors: dict[str, Tensor]) -> Losses:
        """Runs the step. The next one overwrites the losses, and the gradients where there were none before."""
        for name, tensor in tensors.items():
            self.given[name].copy_(tensor)
        # What is there is of a batch before, and may be what this recording writes.
        pairs = [(p, p.grad, new) for p, new in zip(self.parameters, self.made, strict=True) if new is not None]
        pairs = [(p, old.clone() if old is new else old, new) for p, old, new in pairs]
        self.replay()
        for parameter, old, new in pairs:
            parameter.grad = new if old is None else old.add_(new)
        return self.losses


@contextmanager
def as_recorded() -> Iterator[None]:
    """Inside, every row is taken for one document without a look at its positions, by the swapped layers and by
    transformers. That takes a recording for tracing, and would make a mask as large as the batch's attention weights
    where a plain step has none: another kernel, and another program of `--compile`."""
    others: dict[str, Any] = {
        "find_packed_sequence_indices": lambda position_ids: None,
        "is_tracing": lambda tensor=None: torch.compiler.is_compiling(),
    }
    with ExitStack() as stack:
        stack.enter_context(whole_rows())
        for name, other in others.items():
            before: Any = getattr(masking_utils, name, None)
            if before is not None:
                setattr(masking_utils, name, other)
                stack.callback(setattr, masking_utils, name, before)
        yield


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside, what makes the host wait for the device is a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds most such operations, not all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
