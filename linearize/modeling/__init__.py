"""All that a converted model needs to run; the folder's other files are copied beside the weights as remote code."""

from transformers import AutoConfig, AutoModelForCausalLM

from .attention import LinearizeAttention
from .configuration_linearize import SOFTMAX, AttentionAnatomy, LinearizeConfig
from .mixer import MIXERS, Mixer, branch_off
from .modeling_linearize import LinearizeForCausalLM

AutoConfig.register(LinearizeConfig.model_type, LinearizeConfig, exist_ok=True)
AutoModelForCausalLM.register(LinearizeConfig, LinearizeForCausalLM, exist_ok=True)

__all__ = [
    "MIXERS",
    "SOFTMAX",
    "AttentionAnatomy",
    "LinearizeAttention",
    "LinearizeConfig",
    "LinearizeForCausalLM",
    "Mixer",
    "branch_off",
]
