"""Whether a model keeps packed documents apart where positions restart. Some families' masks know nothing of it; some
hand no positions to their attention modules, and swapped layers then mix what the teacher keeps apart. Either way a
student would learn from a teacher that sees other text than it does itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

LENGTH = 12
# Of what a change in the first document does to the second where they are one; rounding does less.
LEAST = 0.1


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether what the first of two packed documents says is lost on the second; found by trying."""
    vocabulary = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary.shape[0], (2, LENGTH), generator=generator).to(vocabulary.device)
    rest = torch.randint(vocabulary.shape[0], (1, LENGTH), generator=generator).to(vocabulary.device)
    place = torch.arange(2 * LENGTH, device=vocabulary.device)

    def change(positions: Tensor) -> float:
        first, other = (
            model(torch.cat([row[None], rest], 1), position_ids=positions[None], use_cache=False).logits for row in ids
        )
        return float((first[:, LENGTH:].float() - other[:, LENGTH:].float()).norm())

    was_training = model.training
    model.eval()
    try:
        return change(place % LENGTH) <= LEAST * change(place)
    finally:
        model.train(was_training)


def refuse_shared(model: Any) -> None:
    """Raises UserError where packed documents see each other in spite of positions that restart."""
    if not keeps_apart(model):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"{type(model).__name__} cannot keep packed documents apart (a {kind} model's attention does not follow "
            "position_ids), so what it says of one depends on those before it: leave out --isolate, and train on text "
            "rather than conversations"
        )
