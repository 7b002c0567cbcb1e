"""The base of every mixer: a linear branch and an optional softmax window with sinks; joins.py says how the two join.

A mixer takes heads that are already projected and rotated, so it is an ordinary module for a model of one's own:

    mixer = Based(num_heads=9, num_kv_heads=3, head_dim=64, window=64, sinks=1)
    o = mixer(q, k, v)          # q [B, T, 9, 64], k and v [B, T, 3, 64], o like q

With a window W the linear branch sees the keys at distance W or more, sinks left out: they are exact already.
Shapes as in reference.py; all parameters are new ones, nothing of the teacher's lives here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bend import STRAIGHT, Bend
from .cache import MixerCacheLayer
from .dispatch import linear_attention, window_step
from .layout import Layout
from .reference import LinearState, widen
from .step_reference import MOST_FEATURES
from .window import attend, carry_sinks, carry_window, locate

MIXERS: dict[str, type[Mixer]] = {}


def register(name: str):
    """Class decorator: makes a mixer known as `--to NAME`.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: type[Mixer]) -> type[Mixer]:
        if name in MIXERS and MIXERS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"two mixers are named {name!r}: {MIXERS[name].__qualname__} and {cls.__qualname__}")
        cls.name = name
        MIXERS[name] = cls
        return cls

    return add


class Gates(NamedTuple):
    """What a mixer computes from a token alone, before the window delays it: `log_decay` [B, T, G] or [B, T, G, K] at
    most 0, `value_scale` [B, T, G], and the delta rule's `beta` [B, T, G]. None where it has none."""

    log_decay: Tensor | None = None
    value_scale: Tensor | None = None
    beta: Tensor | None = None


class Mixer(nn.Module):
    """Base of the mixers.

    Args:
        num_heads, num_kv_heads, head_dim: H, G and D; query head h reads key head h // (H / G).
        hidden_size: width of the layer's input, for gates computed from it; None where there are none.
        scale: multiplies q . k, as in the teacher; D^-1/2 by default.
        window: keys of exact softmax, the token's own among them; 0 for none.
        sinks: first tokens of a document that stay visible to the softmax.
        state_heads: "key" keeps a state a key head, "query" one a query head (R times the state, for quality).

    Raises:
        ValueError: an option is out of range; names its flag.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_hidden: ClassVar[bool] = False
    has_step: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A class that says anew what its branch is takes the general way for one token too, unless it says that anew.
        if "step" in cls.__dict__:
            cls.has_step = True
        elif "linear" in cls.__dict__ or "join" in cls.__dict__:
            cls.has_step = False

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int | None = None,
        scale: float | None = None,
        window: int = 0,
        sinks: int = 0,
        state_heads: str = "key",
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}")
        if window < 0:
            raise ValueError(f"--window must be at least 0, got {window}")
        if sinks < 0 or (sinks and not window):
            raise ValueError(f"--sinks must be at least 0, and 0 without a --window, got {sinks}")
        if state_heads not in ("key", "query"):
            raise ValueError(f"--state-heads is 'key' or 'query', got {state_heads!r}")
        if self.needs_hidden and hidden_size is None:
            raise ValueError(f"{type(self).__name__} computes gates from the layer's input: pass hidden_size")
        self.num_heads, self.head_dim, self.hidden_size = num_heads, head_dim, hidden_size
        self.num_kv_heads = num_kv_heads
        self.state_heads = state_heads
        self.num_states = num_heads if state_heads == "query" else num_kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window, self.sinks = window, sinks
        self.linear_branch = self.window_branch = True

    # What a mixer is made of ------------------------------------------------------------------------------------

    def state_shape(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fp32 state of one sequence."""
        raise NotImplementedError

    def gate_size(self) -> int:
        """How many numbers `gates` makes of one token."""
        return 0

    def gates(self, k: Tensor, x: Tensor | None) -> Gates:
        """Gates of the new tokens from their keys [B, T, G, D] and the layer's input x [B, T, hidden]."""
        return Gates()

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        key_weight: Tensor | None,
        **state: Any,
    ) -> tuple[Tensor, Tensor | None, LinearState | None]:
        """The linear branch on keys that are its own to see; `key_weight` [B, T, G] is 0 at those that are not, and so
        are the gates. `state` has the operation's keywords, and `beta` where `gates` gives one."""
        raise NotImplementedError

    def join(
        self,
        q: Tensor,
        out: Tensor | None,
        z: Tensor | None,
        near: Tensor | None,
        lse: Tensor | None,
        far: Tensor | None,
    ) -> Tensor:
        """One output from the linear branch (`out`, normaliser `z`) and the window's (`near`, `lse`); either may be
        None. With a window `far` [1 or B, T] counts the keys that the linear branch has."""
        raise NotImplementedError

    def step(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, k_state: Tensor | None, **token: Any) -> Tensor:
        """`linear` and `join` of one token, the state written in place: `linear_step` with what this mixer adds to its
        other arguments, `token`. q [B, H, D], k and v [B, G, D], delayed by the window; returns [B, H, D]."""
        raise NotImplementedError

    def window_gains(self) -> dict[str, Tensor | None]:
        """Arguments of `window_step` that weigh near and far keys."""
        return {}

    def reset_parameters(self) -> None:
        """Starts that need neither data nor the teacher's weights."""

    # How it runs ------------------------------------------------------------------------------------------------

    def state_bytes(self, element_size: int = 2) -> int:
        """Bytes of one sequence's constant state: in fp32 the states and the gates of the window's tokens, in the
        model's dtype the keys and values of the window and the sinks; and with a window the count of tokens."""
        size = sum(4 * torch.Size(shape).numel() for shape in self.state_shape().values())
        if self.window:
            size += 8 + self.window * self.gate_size() * 4
        return size + (self.window + self.sinks) * self.num_states * 2 * self.head_dim * element_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None = None,
        *,
        layout: Layout | None = None,
        cache: MixerCacheLayer | None = None,
        bend: Bend = STRAIGHT,
    ) -> Tensor:
        """Mixes the tokens.

        Args:
            q, k, v: [B, T, H, D], [B, T, G, D], [B, T, G, D], rotated.
            x: [B, T, hidden], the layer's input, where `needs_hidden`.
            layout: pads and documents; None means one document a row without pads.
            cache: the layer's carried state, read and written.
            bend: what the window's logits are besides scale q.k; the linear branch knows none of it.

        Returns:
            [B, T, H, D] in q's dtype.

        Raises:
            ValueError: packed documents together with a cache.
        """
        layout = layout or Layout()
        # Gains, decays and normalisers stay wide; what came in bf16 is multiplied in bf16 all the same.
        with torch.autocast(q.device.type, enabled=False):
            return self._mix(q, k, v, x, layout, cache, bend)

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None,
        layout: Layout,
        cache: MixerCacheLayer | None,
        bend: Bend,
    ) -> Tensor:
        if self.state_heads == "query" and self.num_states != k.shape[2]:
            repeat = self.num_states // k.shape[2]
            k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        packed = layout.cu_seqlens is not None
        shape = q.shape
        if packed:
            if cache is not None:
                raise ValueError(
                    "packed documents (restarting position_ids) cannot be carried in a cache: pass use_cache=False"
                )
            q, k, v = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (q, k, v))
            x = None if x is None else x.flatten(0, 1).unsqueeze(0)
        gates = self.gates(k, x)
        both = self.linear_branch and self.window_branch
        one = q.shape[1] == 1 and self.has_step and both and layout.real is None
        if one and cache is not None and cache.can_step(q.device) and cache.tensors["kv"].shape[2] <= MOST_FEATURES:
            out = self._step(q, k, v, gates, cache, bend)
        elif self.window:
            out = self._windowed(q, k, v, gates, layout, cache, bend)
        else:
            weight = None if layout.real is None else layout.real.unsqueeze(-1).to(torch.float32)
            out = self.join(q, *self._linear(q, k, v, gates, weight, layout, cache), None, None, None)
        return out.reshape(shape).to(v.dtype)

    def _linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        weight: Tensor | None,
        layout: Layout,
        cache: MixerCacheLayer | None,
    ) -> tuple[Tensor, Tensor | None]:
        log_decay = gates.log_decay
        if gates.value_scale is not None:
            v = v * gates.value_scale.to(v.dtype).unsqueeze(-1)
        if weight is not None:
            weight = weight.expand(-1, -1, k.shape[2])
            if log_decay is not None:
                log_decay = log_decay * (weight if log_decay.dim() == 3 else weight.unsqueeze(-1))
        beta: dict[str, Tensor] = {}
        if gates.beta is not None:
            beta["beta"] = gates.beta if weight is None else gates.beta * weight
        state: LinearState | None = None
        if cache is not None and cache.get("kv") is not None:
            kv, z_k = cache.tensors["kv"].to(q.device), cache.get("k")
            state = LinearState(kv, None if z_k is None else z_k.to(q.device))
        out, z, final = self.linear(
            q,
            k,
            v,
            log_decay,
            weight,
            initial_state=state,
            output_final_state=cache is not None,
            cu_seqlens=layout.cu_seqlens,
            **beta,
        )
        if cache is not None and final is not None:
            cache.put("kv", final.kv)
            if final.k is not None:
                cache.put("k", final.k)
        return out, z

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, cache: MixerCacheLayer, bend: Bend) -> Tensor:
        """One real token a row, on states that are there: two launches, and what the gates and maps need."""
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        log_decay, value_scale, beta = (None if gate is None else gate[:, 0] for gate in gates)
        token: dict[str, Any] = {}
        if self.window:
            seen = window_step(
                q,
                k,
                v,
                cache.tensors["window_k"],
                cache.tensors["window_v"],
                cache.tensors["length"],
                scale=self.scale,
                sink_k=cache.get("sink_k"),
                sink_v=cache.get("sink_v"),
                log_decay=log_decay,
                window_decay=cache.get("window_decay"),
                value_scale=value_scale,
                window_scale=cache.get("window_scale"),
                beta=beta,
                window_beta=cache.get("window_beta"),
                **self.window_gains(),
                cap=bend.cap,
                slopes=bend.slopes,
                null=bend.null,
            )
            k, v, log_decay, value_scale, beta = seen.k, seen.v, seen.log_decay, seen.value_scale, seen.beta
            token = {"near": seen.near, "lse": seen.lse, "weight": seen.weight, "count": cache.tensors["length"]}
        token |= {"log_decay": log_decay, "value_scale": value_scale, "beta": beta}
        return self.step(q, k, v, cache.tensors["kv"], cache.get("k"), **token)

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        layout: Layout,
        cache: MixerCacheLayer | None,
        bend: Bend,
    ) -> Tensor:
        tokens, window = q.shape[1], self.window
        piece = locate(layout, cache, "length", q)
        keys = carry_window(cache, "window_k", k, piece, window)
        values = carry_window(cache, "window_v", v, piece, window)
        before = Gates(
            *(
                None if gate is None else carry_window(cache, name, gate, piece, window)
                for name, gate in zip(("window_decay", "window_scale", "window_beta"), gates, strict=True)
            )
        )
        sink_k = carry_sinks(cache, "sink_k", k, piece, self.sinks)
        sink_v = carry_sinks(cache, "sink_v", v, piece, self.sinks)
        near = lse = None
        if self.window_branch:
            near, lse = attend(
                q,
                keys,
                values,
                bend,
                window=window,
                sinks=self.sinks,
                scale=self.scale,
                position=piece.start,
                sink_k=sink_k,
                sink_v=sink_v,
                cu_seqlens=layout.cu_seqlens,
            )

        # Keys reach the linear branch when they leave the window: everything is delayed by W tokens.
        def delayed(whole: Tensor | None) -> Tensor | None:
            if whole is None:
                return None
            if whole.shape[1] == tokens:
                whole = F.pad(whole, (0, 0) * (whole.dim() - 2) + (window, 0))
            return whole[:, :tokens]

        late_k, late_v = delayed(keys), delayed(values)
        assert late_k is not None and late_v is not None
        if not self.linear_branch:
            return self.join(q, None, None, near, lse, None)
        far = (piece.place - (window + self.sinks - 1)).clamp(min=0)
        weight = (far > 0).unsqueeze(-1).to(torch.float32)
        late_gates = Gates(*(delayed(gate) for gate in before))
        out, z = self._linear(q, late_k, late_v, late_gates, weight, layout, cache)
        return self.join(q, out, z, near, lse, far)


@contextmanager
def branch_off(model: nn.Module, branch: str) -> Iterator[None]:
    """Inside, the mixers of `model` run without their `branch`: "linear" leaves the window and the sinks, "window"
    leaves the linear branch, which then sees no key nearer than the window was long.

    Raises:
        ValueError: a mixer has no window, so nothing would be left of it, or nothing taken; there is no mixer.
    """
    if branch not in ("linear", "window"):
        raise ValueError(f"a mixer's branches are 'linear' and 'window', not {branch!r}")
    mixers = [module for module in model.modules() if hasattr(module, "linear_branch")]  # those of remote code, too
    if not mixers:
        raise ValueError("the model has no mixers: no branch can be off")
    if any(not mixer.window for mixer in mixers):
        raise ValueError("a mixer without a window has its linear branch alone: there is none to switch off")
    for mixer in mixers:
        setattr(mixer, f"{branch}_branch", False)
    try:
        yield
    finally:
        for mixer in mixers:
            setattr(mixer, f"{branch}_branch", True)


def project_gate(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, T, C] times a small `weight` [n, C], plus `bias` [n]: [B, T, n] in the accumulation dtype."""
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        # One token: a launch costs more than the product, and a cast of the weight would be paid for each.
        x = widen(x)
        if torch.compiler.is_compiling():  # fuses with what stands around it
            product = (x.unsqueeze(-2) * weight.to(x.dtype)).sum(-1)
            return product if bias is None else product + bias.to(x.dtype)
    return widen(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)))


def simple_linear(
    q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None, LinearState | None]:
    """`linear_attention` on features, with keys that may not be seen zeroed."""
    if key_weight is not None:
        k = k * key_weight.to(k.dtype).unsqueeze(-1)
    return linear_attention(q, k, v, **kwargs)
