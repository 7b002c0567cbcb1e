"""The operations against what they mean: sums over all pairs of tokens, in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import relative_error

from linearize.modeling.reference import (
    LinearState,
    linear_attention,
    taylor_attention,
    taylor_features,
    window_attention,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(tokens=83, batch=2, heads=4, groups=2, k_dim=8, v_dim=6, kind="none", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (
        draw(batch, tokens, heads, k_dim),
        draw(batch, tokens, groups, k_dim),
        draw(batch, tokens, groups, v_dim),
    )
    decay = None
    if kind == "scalar":
        decay = -draw(batch, tokens, groups).abs() * 0.3
    elif kind == "vector":
        decay = -draw(batch, tokens, groups, k_dim).abs() * 0.3
    return q, k, v, decay


def pairs(q, k, v, decay, state=None):
    """Token by token over all earlier ones: output, normaliser, final state."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[2] // k.shape[2]
    if decay is None:
        decay = torch.zeros_like(k)
    elif decay.dim() == 3:
        decay = decay.unsqueeze(-1).expand_as(k)
    total = decay.double().cumsum(1)
    out, z = [], []
    for t in range(q.shape[1]):
        keys = k[:, : t + 1] * (total[:, t : t + 1] - total[:, : t + 1]).exp()
        weights = torch.einsum("bhk,bjhk->bjh", q[:, t], keys.repeat_interleave(repeat, 2))
        values = v[:, : t + 1].repeat_interleave(repeat, 2)
        o, n = torch.einsum("bjh,bjhv->bhv", weights, values), weights.sum(1)
        if state is not None:
            faded = total[:, t].exp().unsqueeze(-1) * state.kv
            o = o + torch.einsum("bhk,bhkv->bhv", q[:, t], faded.repeat_interleave(repeat, 1))
            n = n + torch.einsum("bhk,bhk->bh", q[:, t], (total[:, t].exp() * state.k).repeat_interleave(repeat, 1))
        out.append(o)
        z.append(n)
    left = (total[:, -1:] - total).exp() * k
    kv, sum_k = torch.einsum("bjgk,bjgv->bgkv", left, v), left.sum(1)
    if state is not None:
        kv, sum_k = kv + total[:, -1].exp().unsqueeze(-1) * state.kv, sum_k + total[:, -1].exp() * state.k
    return torch.stack(out, 1), torch.stack(z, 1), LinearState(kv, sum_k)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_equals_pairs(kind, dtype):
    q, k, v, decay = inputs(kind=kind, dtype=dtype)
    decay = None if decay is None else decay.float() if dtype != torch.float64 else decay
    out, z, state = linear_attention(q, k, v, log_decay=decay, normalizer=True, output_final_state=True)
    expected, expected_z, expected_state = pairs(q, k, v, decay)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(z, expected_z) < TOLERANCE[dtype] * 10  # a sum of signed terms: it cancels
    assert relative_error(state.kv, expected_state.kv) < TOLERANCE[dtype]
    assert relative_error(state.k, expected_state.k) < TOLERANCE[dtype]
    assert out.dtype == state.kv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_pieces_and_steps_equal_the_whole(kind):
    q, k, v, decay = inputs(kind=kind)
    state = LinearState(torch.randn(2, 2, 8, 6, dtype=torch.float64), torch.randn(2, 2, 8, dtype=torch.float64))
    expected, expected_z, expected_state = pairs(q, k, v, decay, state)
    for cuts in ([83], [40, 43], [1, 65, 16, 1], [1] * 83):
        outs, zs, carried, start = [], [], state, 0
        for length in cuts:
            piece = slice(start, start + length)
            out, z, carried = linear_attention(
                q[:, piece],
                k[:, piece],
                v[:, piece],
                log_decay=None if decay is None else decay[:, piece],
                normalizer=True,
                initial_state=carried,
                output_final_state=True,
            )
            outs.append(out)
            zs.append(z)
            start += length
        assert relative_error(torch.cat(outs, 1), expected) < 1e-10
        assert relative_error(torch.cat(zs, 1), expected_z) < 1e-9
        assert relative_error(carried.kv, expected_state.kv) < 1e-10
        assert relative_error(carried.k, expected_state.k) < 1e-10


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_packed_documents_equal_separate_ones(kind):
    q, k, v, decay = inputs(batch=1, kind=kind)
    bounds = [0, 1, 1, 17, 64, 83]  # one document is empty
    initial = LinearState(torch.randn(5, 2, 8, 6, dtype=torch.float64), torch.randn(5, 2, 8, dtype=torch.float64))
    out, z, state = linear_attention(
        q,
        k,
        v,
        log_decay=decay,
        normalizer=True,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=torch.tensor(bounds),
    )
    for n, (a, b) in enumerate(pairwise(bounds)):
        own = LinearState(initial.kv[n : n + 1], initial.k[n : n + 1])
        if a == b:
            assert torch.equal(state.kv[n : n + 1], own.kv)
            continue
        cut = None if decay is None else decay[:, a:b]
        expected, expected_z, expected_state = pairs(q[:, a:b], k[:, a:b], v[:, a:b], cut, own)
        assert relative_error(out[:, a:b], expected) < 1e-10
        assert relative_error(z[:, a:b], expected_z) < 1e-9
        assert relative_error(state.kv[n : n + 1], expected_state.kv) < 1e-10


def test_strong_decay_stays_finite():
    q, k, v, _ = inputs(kind="none", dtype=torch.float32)
    for decay in (torch.full((2, 83, 2), -60.0), torch.full((2, 83, 2, 8), -60.0)):
        decay.requires_grad_()
        out, _, state = linear_attention(q, k, v, log_decay=decay, output_final_state=True)
        (out.sum() + state.kv.sum()).backward()
        assert torch.isfinite(out).all() and torch.isfinite(decay.grad).all()
        expected, _, _ = pairs(q, k, v, decay.detach())
        assert relative_error(out.detach(), expected) < 1e-5


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_gradients(kind):
    q, k, v, decay = inputs(tokens=21, kind=kind)
    leaves = [x.requires_grad_() for x in (q, k, v) + (() if decay is None else (decay,))]

    def run(*args):
        out, z, state = linear_attention(
            *args[:3],
            log_decay=args[3] if len(args) > 3 else None,
            normalizer=True,
            output_final_state=True,
            chunk_size=8,
        )
        return out, z, state.kv

    def naive(*args):
        out, z, state = pairs(*args[:3], args[3] if len(args) > 3 else None)
        return out, z, state.kv

    weights = [torch.randn_like(x) for x in run(*leaves)]
    got = torch.autograd.grad([(a * w).sum() for a, w in zip(run(*leaves), weights, strict=True)], leaves)
    want = torch.autograd.grad([(a * w).sum() for a, w in zip(naive(*leaves), weights, strict=True)], leaves)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10


def test_taylor_features_give_the_expansion():
    x, y = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    s = (x * y).sum(-1)
    assert taylor_features(x).shape[-1] == 153
    torch.testing.assert_close((taylor_features(x) * taylor_features(y)).sum(-1), 1 + s + s**2 / 2)


def test_taylor_attention_is_weighted_expansion():
    q, k, v, _ = inputs(k_dim=4)
    weight = torch.rand(2, 83, 2, dtype=torch.float64)
    out, z, _ = taylor_attention(q, k, v, key_weight=weight)
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    w = (1 + s + s**2 / 2).tril() * weight.repeat_interleave(2, 2).permute(0, 2, 1).unsqueeze(2)
    assert relative_error(out, torch.einsum("bhij,bjhv->bihv", w, v.repeat_interleave(2, 2))) < 1e-10
    assert relative_error(z, w.sum(-1).transpose(1, 2)) < 1e-10


def naive_window(q, k, v, window, sinks, scale, place_q, place_k, same):
    """Masked softmax over all pairs; `place_*` are places in the document, `same` whether two tokens share one."""
    repeat = q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(repeat, 2)) * scale
    distance = place_q.unsqueeze(-1) - place_k.unsqueeze(-2)
    near = (distance < window) | (place_k < sinks).unsqueeze(-2)
    visible = near & (distance >= 0) & (place_k >= 0).unsqueeze(-2) & same
    s = s.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = s.logsumexp(-1)
    weights = (s - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
    return torch.einsum("bhij,bjhv->bihv", weights, v.double().repeat_interleave(repeat, 2)), lse.transpose(1, 2)


@pytest.mark.parametrize("window", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("sinks", [0, 3])
def test_window_equals_masked_softmax(window, sinks):
    q, k, v, _ = inputs(v_dim=8)
    pads = torch.tensor([0, 19])
    place = torch.arange(83) - pads.unsqueeze(1)
    out, lse = window_attention(q, k, v, window=window, sinks=sinks, scale=0.4, position=-pads)
    want, want_lse = naive_window(q, k, v, window, sinks, 0.4, place, place, torch.ones(1, 83, 83, dtype=torch.bool))
    assert relative_error(out, want) < 1e-10
    real = place >= 0
    torch.testing.assert_close(lse[real], want_lse[real])
    assert (lse[~real] == float("-inf")).all() and (out[~real] == 0).all()


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_window_continues_a_document(queries):
    q, k, v, _ = inputs(v_dim=8)
    place = torch.arange(83).expand(2, -1)
    want, want_lse = naive_window(q, k, v, 16, 2, 1.0, place, place, torch.ones(1, 83, 83, dtype=torch.bool))
    first = 83 - queries
    out, lse = window_attention(
        q[:, first:],
        k[:, first - 16 :],
        v[:, first - 16 :],
        window=16,
        sinks=2,
        position=torch.full((2,), first),
        sink_k=k[:, :2],
        sink_v=v[:, :2],
    )
    assert relative_error(out, want[:, first:]) < 1e-10
    torch.testing.assert_close(lse, want_lse[:, first:])


def test_window_in_packed_documents():
    q, k, v, _ = inputs(batch=1, v_dim=8)
    bounds = torch.tensor([0, 3, 40, 83])
    document = torch.bucketize(torch.arange(83), bounds[1:], right=True)
    place = (torch.arange(83) - bounds[document]).unsqueeze(0)
    same = (document.unsqueeze(-1) == document).unsqueeze(0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = window_attention(*leaves, window=16, sinks=2, cu_seqlens=bounds)
    want, want_lse = naive_window(q, k, v, 16, 2, 1.0, place, place, same)
    assert relative_error(out.detach(), want) < 1e-10
    torch.testing.assert_close(lse.detach(), want_lse)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_gradient_of_a_padded_window_is_finite():
    q, k, v, _ = inputs(v_dim=8, dtype=torch.float32)
    q.requires_grad_()
    out, _ = window_attention(q, k, v, window=8, sinks=1, position=torch.tensor([-19, -83]))
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_wrong_shapes_are_named():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="do not divide"):
        linear_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 83]))
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        linear_attention(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 50]))
