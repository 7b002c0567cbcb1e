"""Hidden-state alignment: each decoder layer learns its teacher's output (MOHAWK's second stage, 2408.10189)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import together
from .layer_pass import Pair, attention_pairs
from .losses import relative_loss
from .transfer import LayerTrainer


class BlockTrainer(LayerTrainer):
    """Each decoder layer with swapped attention is given its teacher's input; logs `layers`, the error of its output.

    The unit is the energy of what the teacher's layer adds to its input: the residual stream, which both share, would
    make every error look small.
    """

    title = "blocks"

    def pairs_of(self, student: Any, teacher: Any) -> dict[int, Pair]:
        attention_pairs(student, teacher)  # refuses what does not fit
        paths = {layer: attention.anatomy.layer_path for layer, attention in student.mixer_layers()}
        return {layer: (student.get_submodule(path), teacher.get_submodule(path)) for layer, path in paths.items()}

    def layer_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, valid: Tensor | None
    ) -> Tensor:
        entered = args[0] if args else kwargs["hidden_states"]
        target = output[0] if isinstance(output, tuple) else output
        found = module(*args, **kwargs)
        with self.autocast(False):
            found = found[0] if isinstance(found, tuple) else found
            return relative_loss(found, target, target - entered, valid, together.total)
