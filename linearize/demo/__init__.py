"""What `linearize demo` runs on without a network: a small teacher, and text it trained on or never saw.

`scripts/train_demo_teacher.py` in the repository made both; teacher/README.md is the teacher's card.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

__all__ = ["teacher_folder", "text_file"]


def teacher_folder() -> Path:
    """The teacher, as `from_pretrained` takes it: 7M parameters, Llama architecture, bf16, tokenizer."""
    return _asset("teacher")


def text_file(name: Literal["train", "heldout"]) -> Path:
    """A .jsonl.gz of `{"text", "source"}` rows, about as much from each of the four sources.

    "train" samples what the teacher was trained on (1.8 MB of text), "heldout" comes from documents that
    it never saw (0.3 MB).
    """
    return _asset(f"text/{name}.jsonl.gz")


def _asset(name: str) -> Path:
    path = Path(str(resources.files(__name__))) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing from this installation of linearize; install it again")
    return path
