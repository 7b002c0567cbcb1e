"""How fast and how large: the operations against softmax and their peers, a student against its teacher."""

from __future__ import annotations

from .kernels import bench_kernels
from .model import bench_model

__all__ = ["bench_kernels", "bench_model"]
