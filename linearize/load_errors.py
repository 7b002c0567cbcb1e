"""One clear message from whatever transformers, safetensors, gguf and the Hub's client raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

from .errors import UserError, causes
from .output import is_disk_full


@contextmanager
def said_clearly(doing: str, model: str, revision: str | None = None) -> Iterator[None]:
    """Turns any error of the body into one UserError that says what of `model` was being done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_message(doing, model, revision, error)) from error


def _message(doing: str, model: str, revision: str | None, error: Exception) -> str:
    chain = causes(error)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    said = str(error)
    if is_disk_full(error):
        return f"{model}: the disk is full; free some space, or put the cache elsewhere with HF_HOME"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{model} does not fit in the device's memory; try --dtype bfloat16, or --device cpu"
    if "GatedRepoError" in kinds:
        return f"{model} is gated: accept its terms at https://huggingface.co/{model}, then run: hf auth login"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{model}: there is no folder of this name here and no model of this name on the Hub; "
            "check the spelling (if it is private, run: hf auth login)"
        )
    if "RevisionNotFoundError" in kinds:
        return f"--revision: {model} on the Hub has no revision {revision}; see https://huggingface.co/{model}/tree"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        return (
            f"{model}: there is no folder of this name here, it is not in the cache, and the Hub cannot be "
            "reached; check the path or the connection"
        )
    if "contains custom code" in said or "requires you to execute" in said:
        return (
            f"{model} brings its own code; read it, and if you trust it pass --trust-remote-code (which does not reach "
            "the base model of an adapter: merge such an adapter first)"
        )
    if "does not recognize this architecture" in said:
        return (
            f"{model}: transformers {transformers.__version__} does not know its model type; "
            "try: pip install -U transformers"
        )
    if "Unrecognized model" in said:
        return f"{model}: its config.json has no model_type, so it is no transformers model"
    if "Unrecognized configuration class" in said:
        return (
            f"{model} is no causal language model that transformers can load (an encoder or an "
            "encoder-decoder?); choose a decoder-only model"
        )
    if "safetensors" in said and ("no file named" in said or "does not appear to have" in said):
        return f"{model} has no safetensors weights, and pickles are not loaded; choose a model that has them"
    if "EntryNotFoundError" in kinds:
        return f"{model} on the Hub lacks a file that is needed: {_first_line(chain[-1])}"
    return f"{doing} {model} failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").split("\n")[0]
