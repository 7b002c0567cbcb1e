"""One token of decoding: the recurrence with its feature map and join; see `modeling.step_reference` for shapes.

The floor is the state read and written once, 8 K V bytes a head. A program holds the whole key dimension of a value
tile, so that the delta rule's correction and the output need no second pass, and serves all query heads of its key
head. With a normaliser, or a norm over the values, one program has all value tiles: what they share is read by nobody
else while it is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.modeling.join_reference import TINY, join_norm, join_share
from linearize.modeling.step_reference import FEATURES, JOINS, MOST_FEATURES

from .common import FLOATS, check_runs_here, check_scale, check_shape, on_device, opaque, power_of_2

NONE, SOFTMAX, HEDGEHOG, ELU, RELU, TAYLOR, UNIT = (tl.constexpr(i) for i in range(len(FEATURES)))
PLAIN, SHARE, NORM = (tl.constexpr(i) for i in range(len(JOINS)))
_TINY = tl.constexpr(TINY)
# Registers of a multiprocessor hold 65536 numbers: half of them for a state tile is the most.
LARGEST_TILE = 32768


class Tile(NamedTuple):
    """`width` value columns at a time, `split` programs a state, `warps` a program."""

    width: int
    split: int
    warps: int


# By who else needs a state's values (nobody; a normaliser; a norm, which takes all of them): the most numbers of a
# tile, and how many of them a warp holds.
TILES: dict[str, tuple[int, int]] = {"none": (8192, 2048), "share": (8192, 2048), "norm": (LARGEST_TILE, 4096)}


def choose_tile(features: int, values: int, shared: str) -> Tile:
    """The tile of a state [features, values]; `shared` is a key of TILES."""
    block, whole = power_of_2(features), power_of_2(values)
    size, each = TILES[shared]
    width = max(16, min(whole, size // block))
    return Tile(width, whole // width if shared == "none" else 1, max(1, min(16, block * width // each)))


@triton.jit
def _features(x_ptr, start, live_row, f, scale, K: tl.constexpr, C: tl.constexpr, FEATURE: tl.constexpr):
    """Features f [1, BK] of the rows that begin at `start` [RB, 1]: fp32 [RB, BK], 0 beyond K."""
    live = live_row & (f < K)
    if FEATURE == TAYLOR:
        # 1, x_i, x_i^2 / sqrt 2, then x_i x_j for i < j; C stands for the constant.
        pair = f - (2 * C + 1)
        i = tl.zeros_like(f)
        for row in tl.static_range(1, C):
            i += (pair >= row * (2 * C - row - 1) // 2).to(tl.int32)
        j = pair - i * (2 * C - i - 1) // 2 + i + 1
        single = (f >= 1) & (f <= C)
        square = (f > C) & (f <= 2 * C)
        i = tl.where(f == 0, C, tl.where(single, f - 1, tl.where(square, f - C - 1, i)))
        j = tl.where(f <= C, C, tl.where(square, i, j))
        a = tl.load(x_ptr + start + i, mask=live & (i < C), other=0.0).to(tl.float32) * scale
        b = tl.load(x_ptr + start + j, mask=live & (j < C), other=0.0).to(tl.float32) * scale
        y = tl.where(i < C, a, 1.0) * tl.where(j < C, b, 1.0)
        y = tl.where(square, y * 0.7071067811865476, y)
    elif FEATURE == HEDGEHOG:
        first = f < C
        x = tl.load(x_ptr + start + tl.where(first, f, f - C), mask=live, other=0.0).to(tl.float32) * scale
        x = tl.where(first, x, -x)
        x = tl.where(f < K, x, float("-inf"))
        top_first = tl.max(tl.where(first, x, float("-inf")), 1)[:, None]
        top_second = tl.max(tl.where(first, float("-inf"), x), 1)[:, None]
        y = tl.exp(x - tl.where(first, top_first, top_second))
        sum_first = tl.sum(tl.where(first, y, 0.0), 1)[:, None]
        sum_second = tl.sum(tl.where(first, 0.0, y), 1)[:, None]
        y = y / tl.where(first, sum_first, sum_second)
    else:
        y = tl.load(x_ptr + start + f, mask=live, other=0.0).to(tl.float32) * scale
        if FEATURE == SOFTMAX:
            y = tl.where(f < K, y, float("-inf"))
            y = tl.exp(y - tl.max(y, 1)[:, None])
            y = y / tl.sum(y, 1)[:, None]
        elif FEATURE == ELU:
            y = tl.where(y > 0, y + 1, tl.exp(tl.minimum(y, 0.0)))
        elif FEATURE == RELU:
            y = tl.maximum(y, 0.0)
        elif FEATURE == UNIT:
            y = y * tl.rsqrt(tl.sum(y * y, 1)[:, None] + 1e-6)
    return tl.where(live, y, 0.0)


@triton.jit(do_not_specialize=["q_scale", "eps"])
def _linear_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_ptr,
    k_state_ptr,
    log_decay_ptr,
    weight_ptr,
    beta_ptr,
    value_scale_ptr,
    skip_ptr,
    near_ptr,
    lse_ptr,
    norm_weight_ptr,
    linear_scale_ptr,
    window_scale_ptr,
    count_ptr,
    out_ptr,
    z_ptr,
    q_scale,
    eps,
    G,
    R: tl.constexpr,
    RB: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    FEATURE: tl.constexpr,
    JOIN: tl.constexpr,
    DECAY: tl.constexpr,  # 0 none, 1 a scalar, 2 a vector
    NORMALIZER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BETA: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    SKIP: tl.constexpr,
    NEAR: tl.constexpr,
    WINDOW_SCALE: tl.constexpr,
    WEIGHED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """A program: COUNT_TILES value tiles of one state, of which SPLIT programs share the columns."""
    pid = tl.program_id(0)
    split = pid % SPLIT
    head = (pid // SPLIT).to(tl.int64)  # batch * G + group
    group = (head % G).to(tl.int32)
    f = tl.arange(0, BK)
    rows = tl.arange(0, RB)
    live_row = (rows < R)[:, None]

    # The state first: what follows until it is used hides its way from memory.
    corner = kv_ptr + head * K * V + f[:, None] * V
    cols = split * COUNT_TILES * BV + tl.arange(0, BV)
    coming = tl.load(corner + cols[None, :], mask=(f < K)[:, None] & (cols < V)[None, :], other=0.0)

    q = _features(q_ptr, (head * R + rows)[:, None] * C, live_row, f[None, :], q_scale, K, C, FEATURE)
    k_row = _features(
        k_ptr, head * C + tl.zeros([1, 1], tl.int64), tl.full([1, 1], 1, tl.int1), f[None, :], 1.0, K, C, FEATURE
    )
    k = tl.sum(k_row, 0)
    heavy = k
    weight = 1.0
    if WEIGHT:
        weight = tl.load(weight_ptr + head).to(tl.float32)
        heavy = k * weight
    if DECAY == 1:
        decay = tl.exp(tl.load(log_decay_ptr + head).to(tl.float32))
        if WEIGHT:
            decay = tl.where(weight == 0, 1.0, decay)
    elif DECAY == 2:
        decay = tl.exp(tl.load(log_decay_ptr + head * K + f, mask=f < K, other=0.0).to(tl.float32))
        if WEIGHT:
            decay = tl.where(weight == 0, 1.0, decay)
    if VALUE_SCALE:
        value_scale = tl.load(value_scale_ptr + head).to(tl.float32)
    if BETA:
        beta = tl.load(beta_ptr + head).to(tl.float32)
    if NORMALIZER:
        k_state = tl.load(k_state_ptr + head * K + f, mask=f < K, other=0.0)
        if DECAY != 0:
            k_state = k_state * decay
        k_state += heavy
        tl.store(k_state_ptr + head * K + f, k_state, mask=f < K)
        z = tl.sum(q * k_state[None, :], 1)
        if JOIN == PLAIN:
            tl.store(z_ptr + head * R + rows, z, mask=rows < R)
    if COUNT:
        one_program = (group == 0) & (split == 0)
        counted = tl.load(count_ptr + head // G, mask=one_program, other=0)
        tl.store(count_ptr + head // G, counted + 1, mask=one_program)

    for tile in range(COUNT_TILES):
        live = cols < V
        state = coming
        if COUNT_TILES > 1:
            after = cols + BV
            more = (f < K)[:, None] & ((after < V) & (tile + 1 < COUNT_TILES))[None, :]
            coming = tl.load(corner + after[None, :], mask=more, other=0.0)
        v = tl.load(v_ptr + head * V + cols, mask=live, other=0.0).to(tl.float32)
        if VALUE_SCALE:
            v = v * value_scale
        if DECAY == 1:
            state = state * decay
        elif DECAY == 2:
            state = state * decay[:, None]
        new = v
        if BETA:
            new = (v - tl.sum(state * k[:, None], 0)) * beta
        state += heavy[:, None] * new[None, :]
        tl.store(corner + cols[None, :], state, mask=(f < K)[:, None] & live[None, :])

        for r in tl.static_range(R):
            q_r = tl.sum(tl.where(rows[:, None] == r, q, 0.0), 0)
            o = tl.sum(state * q_r[:, None], 0)
            h = group * R + r
            row = (head * R + r) * V + cols
            if SKIP:
                o += tl.load(skip_ptr + h).to(tl.float32) * weight * v
            if JOIN == SHARE:
                z_r = tl.sum(tl.where(rows == r, z, 0.0), 0)
                bounded = tl.maximum(z_r, _TINY)
                o = o / bounded
                if NEAR:
                    near = tl.load(near_ptr + row, mask=live, other=0.0)
                    share = 1 / (1 + tl.exp(tl.load(lse_ptr + head * R + r) - tl.log(bounded)))
                    share = tl.where(z_r > 0, share, 0.0)
                    o = near + share * (o - near)
            elif JOIN == NORM:
                # Columns beyond V are 0 and leave the sum as it is.
                o = o * tl.rsqrt(tl.sum(o * o, 0) / V + eps)
                o = o * tl.load(norm_weight_ptr + h * V + cols, mask=live, other=0.0).to(tl.float32)
                o = o * tl.load(linear_scale_ptr + h).to(tl.float32)
                if NEAR:
                    near = tl.load(near_ptr + row, mask=live, other=0.0)
                    if WEIGHED:
                        odds = tl.minimum(tl.load(lse_ptr + head * R + r), 80.0)  # beyond it a far side weighs nothing
                        o = near + (o - near) / (1 + tl.exp(odds))
                    else:
                        if WINDOW_SCALE:
                            near = near * tl.load(window_scale_ptr + h).to(tl.float32)
                        o += near
            tl.store(out_ptr + row, o.to(out_ptr.dtype.element_ty), mask=live)
        cols += BV


def _linear_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_state: Tensor | None,
    log_decay: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    value_scale: Tensor | None,
    skip: Tensor | None,
    near: Tensor | None,
    lse: Tensor | None,
    norm_weight: Tensor | None,
    linear_scale: Tensor | None,
    window_scale: Tensor | None,
    count: Tensor | None,
    q_scale: float,
    eps: float,
    feature: int,
    join: int,
) -> tuple[Tensor, Tensor]:
    batch, heads = q.shape[:2]
    dtype = torch.float32 if join == 0 else v.dtype
    out = torch.empty(batch, heads, v.shape[2], dtype=dtype, device=q.device)
    has_z = k_state is not None and join == 0
    return out, torch.empty(batch, heads if has_z else 0, dtype=torch.float32, device=q.device)


@opaque("linear_step", _linear_outputs, mutates=("kv", "k_state", "count"))
def _linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_state: Tensor | None,
    log_decay: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    value_scale: Tensor | None,
    skip: Tensor | None,
    near: Tensor | None,
    lse: Tensor | None,
    norm_weight: Tensor | None,
    linear_scale: Tensor | None,
    window_scale: Tensor | None,
    count: Tensor | None,
    q_scale: float,
    eps: float,
    feature: int,
    join: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, channels = q.shape
    groups, features, values = kv.shape[1:]
    out = torch.empty(batch, heads, values, dtype=torch.float32 if join == 0 else v.dtype, device=q.device)
    has_z = k_state is not None and join == 0
    z = torch.empty(batch, heads if has_z else 0, dtype=torch.float32, device=q.device)
    tile = choose_tile(features, values, "norm" if join == 2 else "none" if k_state is None else "share")
    repeat, whole = heads // groups, power_of_2(values)
    with on_device(q):
        _linear_step_kernel[(batch * groups * tile.split,)](
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            kv,
            k_state,
            *(
                None if tensor is None else tensor.contiguous()
                for tensor in (log_decay, weight, beta, value_scale, skip, near, lse)
            ),
            *(None if tensor is None else tensor.contiguous() for tensor in (norm_weight, linear_scale, window_scale)),
            count,
            out,
            z,
            q_scale,
            eps,
            groups,
            R=repeat,
            RB=power_of_2(repeat, 1),
            C=channels,
            K=features,
            V=values,
            BK=power_of_2(features),
            BV=tile.width,
            COUNT_TILES=whole // tile.width // tile.split,
            SPLIT=tile.split,
            FEATURE=feature,
            JOIN=join,
            DECAY=0 if log_decay is None else log_decay.dim() - 1,
            NORMALIZER=k_state is not None,
            WEIGHT=weight is not None,
            BETA=beta is not None,
            VALUE_SCALE=value_scale is not None,
            SKIP=skip is not None,
            NEAR=near is not None,
            WINDOW_SCALE=window_scale is not None,
            WEIGHED=near is not None and lse is not None,
            COUNT=count is not None,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out, z


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_state: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    weight: Tensor | None = None,
    beta: Tensor | None = None,
    value_scale: Tensor | None = None,
    skip: Tensor | None = None,
    feature: str = "none",
    q_scale: float = 1.0,
    join: str = "none",
    near: Tensor | None = None,
    lse: Tensor | None = None,
    norm_weight: Tensor | None = None,
    linear_scale: Tensor | None = None,
    window_scale: Tensor | None = None,
    eps: float = 1e-6,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `modeling.step_reference.linear_step`. Up to 512 features.

    Raises:
        ValueError: names the argument.
    """
    check_token(q, k, v)
    check_scale(q_scale)
    for name, value, known in (("feature", feature, FEATURES), ("join", join, JOINS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it may be {', '.join(known)}")
    batch, heads, channels = q.shape
    groups, values = v.shape[1:]
    features = features_of(feature, channels)
    if features > MOST_FEATURES:
        raise ValueError(f"k has {features} features; the kernel takes up to {MOST_FEATURES}")
    check_state("kv", kv, (batch, groups, features, values), q)
    check_state("k_state", k_state, (batch, groups, features), q)
    if join == "share" and k_state is None:
        raise ValueError("join 'share' divides by a normaliser: pass k_state")
    if join == "norm" and (norm_weight is None or linear_scale is None):
        raise ValueError("join 'norm' needs norm_weight and linear_scale")
    if join == "share" and (near is None) != (lse is None):
        raise ValueError("near and lse come together")
    if log_decay is not None and log_decay.dim() == 3:
        check_shape("log_decay", log_decay, (batch, groups, features), q)
    else:
        check_shape("log_decay", log_decay, (batch, groups), q)
    for name, tensor in (("weight", weight), ("beta", beta), ("value_scale", value_scale)):
        check_shape(name, tensor, (batch, groups), q)
    for name, tensor in (("skip", skip), ("linear_scale", linear_scale), ("window_scale", window_scale)):
        check_shape(name, tensor, (heads,), q)
    check_shape("near", near, (batch, heads, values), q)
    check_shape("lse", lse, (batch, heads), q)
    check_shape("norm_weight", norm_weight, (heads, values), q)
    check_place("count", count, batch, q)
    # A norm over values that do not fit one program is left to torch.
    apart = join == "norm" and power_of_2(features) * power_of_2(values) > LARGEST_TILE
    out, z = _linear_step(
        q,
        k,
        v,
        kv,
        k_state,
        log_decay,
        weight,
        beta,
        value_scale,
        skip,
        None if apart else near,
        lse,
        None if apart else norm_weight,
        None if apart else linear_scale,
        None if apart else window_scale,
        count,
        q_scale,
        eps,
        FEATURES.index(feature),
        0 if apart else JOINS.index(join),
    )
    if apart:
        assert norm_weight is not None and linear_scale is not None
        if near is not None and lse is not None:
            far = join_norm(out, None, norm_weight, linear_scale, None, eps)
            return join_share(far, torch.ones_like(lse), near, lse).to(v.dtype), None
        return join_norm(out, near, norm_weight, linear_scale, window_scale, eps).to(v.dtype), None
    return out, z if join == "none" and k_state is not None else None


def features_of(feature: str, channels: int) -> int:
    """How many features `feature` makes of `channels`."""
    if feature == "taylor":
        return 1 + channels + channels * (channels + 1) // 2
    return 2 * channels if feature == "hedgehog" else channels


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, *, beta: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, None]:
    """See `modeling.step_reference.delta_step`."""
    return linear_step(q, k, v, kv, beta=beta, log_decay=log_decay)[0], None


def check_token(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, H, C], k [B, G, C], v [B, G, V] of floats, on one device that can run kernels."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [batch, heads, channels], got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take bfloat16, float16 and float32")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    check_runs_here(q)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k is {tuple(k.shape)}: batch and channels must be those of q, {tuple(q.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v is {tuple(v.shape)}: batch and heads must be those of k, {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which do not divide into the {k.shape[1]} heads of k")


def check_state(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, wide: bool = True) -> None:
    """What is written in place must lie as the kernel writes it."""
    check_shape(name, tensor, shape, like)
    if tensor is None:
        return
    if wide and tensor.dtype != torch.float32:
        raise ValueError(f"{name} is {tensor.dtype}: states are float32")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is written in place: it must be contiguous")


def check_place(name: str, tensor: Tensor | None, batch: int, like: Tensor) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != (batch,) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be int64 [{batch}], contiguous, got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, q on {like.device}")
