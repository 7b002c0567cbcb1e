"""Starts from the weights: the moments they assume, and that they beat a start that knows nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_teacher
from families import teacher_of

from linearize.convert import convert
from linearize.modeling.decay import default_half_lives
from linearize.modeling.projections import rotate
from linearize.surgery.anatomy import read_anatomy
from linearize.surgery.proof import calls_of
from linearize.surgery.rotation import frequencies
from linearize.surgery.starts import POSITIONS, second_moment


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "cohere+norms", "gpt2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_second_moments_match_samples(family, which):
    """Of inputs as the teacher's own norm makes them, projected as the student projects them."""
    teacher = teacher_of(family)
    anatomy = read_anatomy(teacher)[0]
    norm = calls_of(teacher, [anatomy])[0].norm
    size = 3.0
    assert (norm is None) == (family == "olmo2")
    attention = convert(teacher, "based").mixer_layers()[0][1]
    inv_freq = frequencies(teacher, 0) if anatomy.rotary_dim else None
    x = torch.randn(400, len(POSITIONS), 64)
    x = size * x if norm is None else norm(size * x)
    cos, sin = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    if inv_freq is not None:
        angle = POSITIONS[:, None] * inv_freq
        angle = angle.repeat_interleave(2, -1) if anatomy.rotary == "pairs" else torch.cat([angle] * 2, -1)
        cos, sin = angle.cos()[None], angle.sin()[None]
    y = attention.project(x, (cos, sin))[which].double()
    sampled = torch.einsum("bphi,bphj->hij", y, y) / (400 * len(POSITIONS))
    moment = second_moment(attention, which, norm, inv_freq, size)
    # Norms of queries and keys make the sample's moment only approximately the linear one.
    tolerance = 0.25 if anatomy.norms and which < 2 else 0.08
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


@torch.no_grad()
def test_linear_branches_start_in_proportion_to_inputs_that_nothing_normalises():
    """OLMo 2 has no norm before its attention."""
    scales = []
    for size in (1.0, 10.0):
        teacher = teacher_of("olmo2")
        teacher.model.embed_tokens.weight.mul_(size)
        scales.append(convert(teacher, "gla").mixer_layers()[0][1].mixer.linear_scale)
    torch.testing.assert_close(scales[1], 10 * scales[0])


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
