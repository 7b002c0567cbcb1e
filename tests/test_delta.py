"""The delta rule against its definition, token by token in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import relative_error, shake

from linearize.modeling.delta_reference import delta_rule
from linearize.modeling.gated_delta import GatedDelta
from linearize.modeling.reference import LinearState

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(tokens=83, batch=2, heads=4, groups=2, k_dim=8, v_dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        draw(batch, tokens, heads, k_dim),
        torch.nn.functional.normalize(draw(batch, tokens, groups, k_dim), dim=-1),
        draw(batch, tokens, groups, v_dim),
    )
    beta, decay = torch.sigmoid(draw(batch, tokens, groups)), -draw(batch, tokens, groups).abs() * 0.3
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(dtype) for x in (q, k, v)), beta.to(gates), decay.to(gates)


def one_by_one(q, k, v, beta, decay=None, state=None):
    """The recurrence as it is written: output and final state."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    repeat = q.shape[2] // k.shape[2]
    eye = torch.eye(k.shape[-1], dtype=torch.float64)
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[1]):
        k_t, b_t = k[:, t], beta[:, t, :, None, None]
        if decay is not None:
            state = decay[:, t].double().exp()[..., None, None] * state
        erase = eye - b_t * k_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        state = erase @ state + b_t * k_t.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(repeat, 1)))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_chunked_equals_one_by_one(decays, dtype):
    q, k, v, beta, decay = inputs(dtype=dtype)
    decay = decay if decays else None
    out, state = delta_rule(q, k, v, beta=beta, log_decay=decay, output_final_state=True)
    expected, expected_state = one_by_one(q, k, v, beta, decay)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(state.kv, expected_state) < TOLERANCE[dtype]
    assert out.dtype == state.kv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert delta_rule(q, k, v, beta=beta, log_decay=decay)[1] is None


def test_pieces_and_steps_equal_the_whole():
    q, k, v, beta, decay = inputs()
    state = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    expected, expected_state = one_by_one(q, k, v, beta, decay, state)
    for cuts in ([83], [40, 43], [1, 65, 16, 1], [1] * 83):
        outs, carried, start = [], LinearState(state), 0
        for length in cuts:
            piece = slice(start, start + length)
            out, carried = delta_rule(
                q[:, piece],
                k[:, piece],
                v[:, piece],
                beta=beta[:, piece],
                log_decay=decay[:, piece],
                initial_state=carried,
                output_final_state=True,
            )
            outs.append(out)
            start += length
        assert relative_error(torch.cat(outs, 1), expected) < 1e-10
        assert relative_error(carried.kv, expected_state) < 1e-10


def test_packed_documents_equal_separate_ones():
    q, k, v, beta, decay = inputs(tokens=150, batch=1)
    bounds = [0, 1, 1, 17, 85, 150]  # one document is empty
    initial = torch.randn(5, 2, 8, 6, dtype=torch.float64)
    out, state = delta_rule(
        q,
        k,
        v,
        beta=beta,
        log_decay=decay,
        initial_state=LinearState(initial),
        output_final_state=True,
        cu_seqlens=torch.tensor(bounds),
    )
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            assert torch.equal(state.kv[n], initial[n])
            continue
        own = [x[:, a:b] for x in (q, k, v, beta, decay)]
        expected, expected_state = one_by_one(*own, initial[n : n + 1])
        assert relative_error(out[:, a:b], expected) < 1e-10
        assert relative_error(state.kv[n : n + 1], expected_state) < 1e-10


def test_a_key_written_whole_gives_its_value_back():
    """With beta 1 and no decay, the last value written at a key is what it holds, whatever was there."""
    k = torch.nn.functional.normalize(torch.randn(1, 5, 1, 8, dtype=torch.float64), dim=-1)
    k = torch.cat([k, k[:, 2:3]], 1)
    v = torch.randn(1, 6, 1, 6, dtype=torch.float64)
    out, _ = delta_rule(k, k, v, beta=torch.ones(1, 6, 1, dtype=torch.float64))
    assert relative_error(out, v) < 1e-10


def test_strong_decay_stays_finite():
    q, k, v, beta, _ = inputs(dtype=torch.float32)
    decay = torch.full((2, 83, 2), -60.0, requires_grad=True)
    out, state = delta_rule(q, k, v, beta=beta, log_decay=decay, output_final_state=True)
    (out.sum() + state.kv.sum()).backward()
    assert torch.isfinite(out).all() and torch.isfinite(decay.grad).all()
    assert relative_error(out.detach(), one_by_one(q, k, v, beta, decay.detach())[0]) < 1e-5


@pytest.mark.parametrize("tokens", [1, 21])
def test_gradients(tokens):
    leaves = [x.requires_grad_() for x in (*inputs(tokens=tokens), torch.randn(2, 2, 8, 6, dtype=torch.float64))]

    def run(q, k, v, beta, decay, state):
        out, final = delta_rule(
            q,
            k,
            v,
            beta=beta,
            log_decay=decay,
            initial_state=LinearState(state),
            output_final_state=True,
            chunk_size=8,
        )
        return out, final.kv

    seeds = [torch.randn_like(x) for x in run(*leaves)]
    got = torch.autograd.grad([(a * s).sum() for a, s in zip(run(*leaves), seeds, strict=True)], leaves)
    want = torch.autograd.grad([(a * s).sum() for a, s in zip(one_by_one(*leaves), seeds, strict=True)], leaves)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10


@torch.no_grad()
def test_the_mixer_reads_the_state_as_it_was_a_window_ago():
    window, sinks, tokens = 6, 2, 30
    size = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_size": 16}
    mixer = GatedDelta(**size, window=window, sinks=sinks, gains=True).double()
    shake(torch.nn.ModuleDict({"mixer": mixer}))
    q, k, v = (torch.randn(1, tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    x = torch.randn(1, tokens, 16, dtype=torch.float64)
    beta = torch.sigmoid(x @ mixer.beta_weight.T + mixer.beta_bias)
    decay = -mixer.A_log.exp() * torch.nn.functional.softplus(x @ mixer.dt_weight.T + mixer.dt_bias)
    beta[:, :sinks], decay[:, :sinks] = 0, 0
    unit_q, unit_k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    late = slice(0, tokens - window)
    far = torch.zeros_like(q)
    far[:, window:] = one_by_one(unit_q[:, window:], unit_k[:, late], v[:, late], beta[:, late], decay[:, late])[0]
    far = far * torch.rsqrt(far.square().mean(-1, keepdim=True) + mixer.EPS) * mixer.norm_weight
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (distance < 0) | ((distance >= window) & (torch.arange(tokens) >= sinks))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * mixer.scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    near = torch.einsum("bhij,bjhv->bihv", weights, v.repeat_interleave(2, 2))
    lse = scores.masked_fill(hidden, float("-inf")).logsumexp(-1).transpose(1, 2)
    count = (torch.arange(tokens, dtype=torch.float64) - window - sinks + 1).clamp(min=0)[:, None]
    horizon = mixer.log_horizon.exp()
    gain = mixer.gain + torch.einsum("bihd,hd->bih", q, mixer.gain_q) * mixer.scale
    mass = horizon * (1 - (-count / horizon).exp()) * gain.exp()
    share = (mass / (mass + lse.exp()))[..., None]
    expected = (1 - share) * near + share * mixer.linear_scale[:, None] * far
    assert relative_error(mixer(q, k, v, x), expected) < 1e-10


def test_wrong_shapes_are_named():
    q, k, v, beta, decay = inputs()
    with pytest.raises(ValueError, match="do not divide"):
        delta_rule(q[:, :, :3], k, v, beta=beta)
    with pytest.raises(ValueError, match="beta must be"):
        delta_rule(q, k, v, beta=beta[:, :, :1])
    with pytest.raises(ValueError, match="log_decay must be"):
        delta_rule(q, k, v, beta=beta, log_decay=decay[:, 1:])
    with pytest.raises(ValueError, match="cu_seqlens"):
        delta_rule(q, k, v, beta=beta, cu_seqlens=torch.tensor([0, 83]))
