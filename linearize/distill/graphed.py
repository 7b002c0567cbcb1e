"""`--cuda-graph`: a training step is recorded as a CUDA graph, and replayed for every further batch of its kind.

A step of a small model is some thousand launches, each of which takes Python longer than the GPU. What is recorded is a
batch's forward and backward pass, down to the gradients; the optimizer runs as ever. A step stays plain where a value
decides what is launched (documents told apart by their positions, another number of scored tokens than before), where
activations are recomputed, and on what is no single CUDA device.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from ..modeling import recording

Losses = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[dict[str, Tensor]], Losses]
# Before a step is recorded: kernels are loaded, compiled and chosen by then.
PLAIN_STEPS = 3
# Each holds the memory of its activations.
MOST_GRAPHS = 2


class GraphedStep:
    """`step(tensors)`, which adds to the gradients of `parameters`, and its recordings.

    A batch belongs to a recording by its tensors' names, shapes and dtypes and by what `setting` says; the first
    batches of each kind run plainly, and all of them once something could not be recorded.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.step, self.parameters, self.device = step, parameters, device
        self.plain: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, StepGraph] = {}
        self.possible = recording.records_on(device)

    def __call__(self, tensors: dict[str, Tensor], setting: Hashable = None) -> Losses:
        if not self.possible:
            return self.step(tensors)
        key = (setting, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        if key in self.graphs:
            return self.graphs[key](tensors)
        if self.plain[key] < PLAIN_STEPS or len(self.graphs) == MOST_GRAPHS:
            self.plain[key] += 1
            return self._beside(tensors)
        try:
            self.graphs[key] = StepGraph(self.step, self.parameters, tensors, self.device)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"training without CUDA graphs, which is slower: {reason}", stacklevel=2)
            self.possible = False
            return self.step(tensors)
        return self.graphs[key](tensors)

    def _beside(self, tensors: dict[str, Tensor]) -> Losses:
        """A plain step on a stream of its own, as a recording's is: autograd keeps a parameter to the stream on which
        it first met it."""
        if self.device.type != "cuda":
            return self.step(tensors)
        current, beside = torch.cuda.current_stream(self.device), recording.stream_of(self.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            losses = self.step(tensors)
        current.wait_stream(beside)
        return losses


class StepGraph:
    """One recording of `step`, on tensors like those of `tensors`.

    Raises:
        RuntimeError: the step does something that a CUDA graph cannot hold. The gradients are as they were.
    """

    def __init__(
        self, step: Step, parameters: Sequence[nn.Parameter], tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        self.parameters = parameters
        self.given = {name: tensor.clone() for name, tensor in tensors.items()}
        before = [parameter.grad for parameter in parameters]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a recording's memory is its own, and would be taken beside what lies free
        try:
            # without gradients to add to, the step makes them, at addresses that every replay writes anew
            for parameter in parameters:
                parameter.grad = None
            with _rising_positions():
                self.replay, self.losses = recording.record(lambda: step(self.given), device)
            self.made = [parameter.grad for parameter in parameters]
        finally:
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
def _rising_positions() -> Iterator[None]:
    """Inside, transformers takes every row for one document: it cannot look at the positions of a step that is
    recorded, and would make a mask as large as the batch's attention weights."""
    name = "find_packed_sequence_indices"
    before: Any = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
