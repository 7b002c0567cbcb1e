"""A stand-in for CUDA graphs, so that what is recorded and replayed is tested without a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: what ran is run again on the same tensors, and Python is not asked."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was looked at")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and id(value) not in self.made:
                self.before.setdefault(id(value), (value, value.clone()))
        out = function(*args, **(kwargs or {}))
        outputs = [value for value in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(value)]
        inputs = {value.untyped_storage().data_ptr() for value in args if torch.is_tensor(value)}
        fresh = [value for value in outputs if value.untyped_storage().data_ptr() not in inputs]
        self.made.update(map(id, fresh))
        self.calls.append((function, args, kwargs or {}, outputs, fresh))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outputs, fresh in self.calls:
            out = function(*args, **kwargs)
            again = [value for value in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(value)]
            for old, new in zip(outputs, again, strict=True):
                if any(old is value for value in fresh):
                    old.copy_(new)


def recorder_into(made):
    """`recording.record` on the CPU; each `Recorder` goes into the list `made`."""

    def record(function, device):
        recorder = Recorder()
        made.append(recorder)
        try:
            with recorder:
                out = function()
        finally:
            for value, before in recorder.before.values():  # recording runs nothing
                value.copy_(before)
        return recorder.replay, out

    return record
