"""Tiny random teachers of every family, and what the tests compare with."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch

# Processes beside each other, and what they start, would each take all cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Before anything imports transformers, which reads it once: remote code is a package of one place for a whole process,
# and that is none of a person's own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

# Before anything imports Triton: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import peft
from kernel_cases import poisoned  # noqa: F401
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

MIXER_NAMES = ["linear", "retention", "gla", "mamba2", "gated_delta", "based"]
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def any_peft(monkeypatch) -> None:
    """transformers' own adapters, where its newest release asks for a peft that is newer than the newest there is."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)


def tiny_config(family: str = "llama", **overrides):
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    if family == "mistral":
        fields["sliding_window"] = 24
    return CONFIGS[family](**{**fields, **overrides})


def tiny_teacher(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def exact_norms(model: torch.nn.Module) -> torch.nn.Module:
    """An fp64 model whose norms do not round to fp32 on the way, as transformers' own do."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norm = torch.nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon).double()
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def shake(student: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves the new parameters off their starts, so that zeros and identities hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mixer." in name or name.startswith("mixer."):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter))
    return student


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest relative L2 error over chunks of 16 tokens of [B, T, ...]; NaN counts as infinite."""
    value, reference = value.double(), reference.double()
    assert value.shape == reference.shape, (value.shape, reference.shape)
    if not torch.isfinite(value).all():
        return float("inf")
    worst = 0.0
    for a, b in zip(value.split(16, dim=1), reference.split(16, dim=1), strict=True):
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return worst


@pytest.fixture(params=MIXER_NAMES)
def mixer_name(request) -> str:
    return request.param
