"""Teachers whose weights are quantised (bitsandbytes' 4 and 8 bits, ...): they teach as they are, and are converted as
the plain weights that they stand for."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from .errors import UserError, one_line


def dense(model: PreTrainedModel, *, own: bool = False) -> PreTrainedModel:
    """The model with plain weights of its dtype: itself, or where it is quantised what transformers makes of it.

    Args:
        own: it may be changed; else a copy of it is.

    Raises:
        UserError: transformers cannot dequantise weights of this kind.
    """
    method: Any = getattr(model, "quantization_method", None)
    if method is None:
        return model
    kind = str(getattr(method, "value", method))
    dtype = model.dtype
    try:
        plain: Any = model if own else copy.deepcopy(model)
        plain = plain.dequantize()
    except Exception as error:  # each method of quantising raises its own
        raise UserError(
            f"{type(model).__name__}: its weights are quantised ({kind}) and cannot be made plain again "
            f"({type(error).__name__}: {one_line(error, 300)}); give the model that it was made of"
        ) from error
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain.to(dtype)
