"""Starts from the weights: the moments they assume, and that they beat a start that knows nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_teacher

from linearize.convert import convert
from linearize.modeling.attention import rotate
from linearize.modeling.decay import default_half_lives
from linearize.surgery.starts import POSITIONS, _second_moment


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_second_moments_match_samples(family):
    teacher = tiny_teacher(family, torch.float64)
    student = convert(teacher, "based")
    attention = student.mixer_layers()[0][1]
    gain = torch.rand(64, dtype=torch.float64) + 0.5
    inv_freq = teacher.model.rotary_emb.inv_freq
    x = torch.randn(400, len(POSITIONS), 64, dtype=torch.float64)
    q = attention.q_proj(x * gain).unflatten(-1, (4, 16))
    if attention.q_norm is not None:
        q = attention.q_norm(q)
    angle = (POSITIONS[:, None] * inv_freq).double()
    cos, sin = torch.cat([angle.cos()] * 2, -1)[None], torch.cat([angle.sin()] * 2, -1)[None]
    q = rotate(q, cos, sin, 16)
    sampled = torch.einsum("bphi,bphj->hij", q, q) / (400 * len(POSITIONS))
    moment = _second_moment(attention.q_proj, attention.q_norm, 4, gain, inv_freq)
    # Norms make the sample's moment only approximately the linear one.
    tolerance = 0.25 if family == "qwen3" else 0.03
    assert float((moment - sampled).norm() / sampled.norm()) < tolerance


@torch.no_grad()
def test_based_projections_keep_more_of_the_logits_than_leading_channels():
    teacher = tiny_teacher("llama", torch.float64)
    loud = torch.tensor([0.1] * 4 + [1.0] * 4).repeat(2).double()  # rotary pairs are (i, i + 8)
    for projection in (teacher.model.layers[0].self_attn.q_proj, teacher.model.layers[0].self_attn.k_proj):
        projection.weight.copy_(projection.weight.unflatten(0, (-1, 16)).mul(loud[:, None]).flatten(0, 1))
    student = convert(teacher, "based", mixer_options={"feature_dim": 8})
    attention = student.mixer_layers()[0][1]
    x = torch.randn(1, 300, 64, dtype=torch.float64) * teacher.model.layers[0].input_layernorm.weight
    angle = torch.randint(0, 2048, (300, 1)) * teacher.model.rotary_emb.inv_freq
    cos, sin = torch.cat([angle.cos()] * 2, -1)[None], torch.cat([angle.sin()] * 2, -1)[None]
    q = rotate(attention.q_proj(x).unflatten(-1, (4, 16)), cos, sin, 16)[0]
    k = rotate(attention.k_proj(x).unflatten(-1, (2, 16)), cos, sin, 16)[0].repeat_interleave(2, 1)
    exact = torch.einsum("ihd,jhd->hij", q, k)

    def unexplained(proj_q: torch.Tensor, proj_k: torch.Tensor) -> float:
        mapped = torch.einsum("ihd,hdr,jhe,her->hij", q, proj_q, k, proj_k.repeat_interleave(2, 0))
        scale = (mapped * exact).sum((1, 2), keepdim=True) / mapped.square().sum((1, 2), keepdim=True)
        return float(((exact - scale * mapped).square().sum() / exact.square().sum()).sqrt())

    mixer = attention.mixer
    chosen = unexplained(mixer.proj_q.double(), mixer.proj_k.double())
    leading = torch.eye(16, 8, dtype=torch.float64)
    other = unexplained(leading.expand(4, -1, -1), leading.expand(2, -1, -1))
    assert chosen < 0.3 * other, (chosen, other)


def test_half_lives():
    lives = default_half_lives(5)
    torch.testing.assert_close(lives[[0, -1]], torch.tensor([16.0, 4096.0]))
    ratios = lives[1:] / lives[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize("mixer", ["retention", "gla", "mamba2", "gated_delta"])
@torch.no_grad()
def test_decays_start_at_the_half_lives(mixer):
    student = convert(tiny_teacher(num_key_value_heads=4), mixer)
    k, x = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 64)
    log_decay = student.mixer_layers()[0][1].mixer.gates(k, x).log_decay
    if log_decay.dim() == 4:
        log_decay = log_decay[..., 0]
    torch.testing.assert_close(-math.log(2) / log_decay[0, 1], default_half_lives(4), rtol=1e-3, atol=0)


@torch.no_grad()
def test_mamba2_starts_with_unit_steps():
    student = convert(tiny_teacher(), "mamba2")
    gates = student.mixer_layers()[0][1].mixer.gates(torch.randn(1, 3, 2, 16), torch.randn(1, 3, 64))
    torch.testing.assert_close(gates.value_scale, torch.ones(1, 3, 2))


@torch.no_grad()
def test_gated_delta_starts_by_replacing_half():
    student = convert(tiny_teacher(), "gated_delta")
    gates = student.mixer_layers()[0][1].mixer.gates(torch.randn(1, 3, 2, 16), torch.randn(1, 3, 64))
    torch.testing.assert_close(gates.beta, torch.full((1, 3, 2), 0.5))


def test_convert_leaves_its_argument_alone():
    teacher = tiny_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = convert(teacher, "linear")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert type(teacher.model.layers[0].self_attn).__name__ == "LlamaAttention"
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
