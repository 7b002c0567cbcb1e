"""Turn a pretrained softmax-attention transformer into a linear-time one, and measure what it cost.

The verbs of the command line, as functions: `convert`, `plan`, `distill`, `finetune`, `run`, `evaluate`, `report`,
`push`.
Importing this package lets `transformers.AutoModelForCausalLM.from_pretrained` load converted models.
"""

# Some verbs share their sub-package's name. Importing them here, once, settles that `linearize.convert` is the verb;
# `from linearize.convert import ...` still finds the sub-package.
from . import modeling
from .convert import convert, plan
from .distill import distill, finetune
from .evaluate import evaluate
from .hub import push
from .recipes.run import run_recipe as run
from .report import report
from .version import __version__


def mixers() -> dict[str, str]:
    """Names of the mixers, each with a line about it."""
    return {name: mixer.summary for name, mixer in sorted(modeling.MIXERS.items())}


__all__ = [
    "__version__",
    "convert",
    "distill",
    "evaluate",
    "finetune",
    "mixers",
    "modeling",
    "plan",
    "push",
    "report",
    "run",
]
