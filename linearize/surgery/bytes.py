"""What a model and its teacher hold while they generate: bytes that grow with the text, and bytes that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..modeling import AttentionAnatomy, LinearizeAttention


@dataclass(frozen=True)
class CacheBytes:
    """Of one sequence: `kv` bytes a token of unbounded softmax, and the constant `state` of mixers, windows, sinks and
    bounded kept heads, layers with a window of the teacher's own among them; and the teacher's of both."""

    kv: int = 0
    state: int = 0
    kv_teacher: int = 0
    state_teacher: int = 0

    @property
    def kv_share(self) -> float:
        """0 where nothing grows in the teacher either."""
        return self.kv / self.kv_teacher if self.kv_teacher else 0.0


def cache_bytes(
    anatomies: Sequence[AttentionAnatomy], swapped: Mapping[int, LinearizeAttention], element_size: int
) -> CacheBytes:
    """Of the model whose layers are those of `anatomies`, but for the `swapped` ones."""
    kv = state = kv_teacher = state_teacher = 0
    for index, anatomy in enumerate(anatomies):
        heads = 2 * anatomy.num_kv_heads * anatomy.head_dim * element_size
        grows, stays = (heads, 0) if anatomy.window is None else (0, anatomy.window * heads)
        kv_teacher, state_teacher = kv_teacher + grows, state_teacher + stays
        attention = swapped.get(index)
        kv += grows if attention is None else attention.kv_bytes_per_token(element_size)
        state += stays if attention is None else attention.state_bytes(element_size)
    return CacheBytes(kv, state, kv_teacher, state_teacher)
