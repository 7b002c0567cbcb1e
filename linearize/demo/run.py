"""The whole way on the embedded teacher: convert, distil, evaluate side by side, generate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import teacher_folder, text_file

PROMPT = "The Lord is my"
WINDOW, SINKS = 32, 1
TOKENS = 98_304  # a third for attention transfer, the rest for logits
LENGTH, BATCH = 512, 4
EVALUATION: dict[str, Any] = {
    "context": 512,
    "sequences": 16,
    "batch_size": 4,
    "recall_passages": 16,
    "recall_length": 128,
}


def run_demo(
    to: str = "based",
    *,
    out: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    command: list[str] | str = "linearize.demo",
) -> dict[str, Any]:
    """Converts the embedded teacher to `to`, distils it, and measures teacher, swapped and distilled student on text
    that the teacher was not trained on.

    Args:
        to: the mixer.
        out: where the distilled student goes; nowhere by default.
        progress: told what happens.

    Returns:
        `models`: what `evaluate` gives for "swapped" and "distilled", each beside the teacher; `texts`: a continuation
        of all three; `seconds`, `tokens`, and the settings.

    Raises:
        UsageError: there is no such mixer, or `out` exists.
    """
    from ..convert import convert_folder
    from ..distill import distill
    from ..evaluate import evaluate
    from ..evaluate.generation import generate_text
    from ..output import check_new
    from ..source import ModelSource, load_model, load_student, load_tokenizer

    started = time.monotonic()
    if out is not None:
        check_new(out)
    source = ModelSource(str(teacher_folder()))
    heldout, training = str(text_file("heldout")), str(text_file("train"))
    tokenizer = load_tokenizer(source)
    with TemporaryDirectory(prefix="linearize-demo-") as scratch:
        folder = Path(scratch) / "student"
        progress(f"converting the embedded teacher to {to}, window {WINDOW}, sinks {SINKS}")
        convert_folder(source, to, folder, dtype=torch.float32, window=WINDOW, sinks=SINKS, command=command)
        teacher = load_model(source, dtype=torch.float32)
        student = load_student(str(folder), dtype=torch.float32)
        texts = {
            name: generate_text(model, tokenizer, PROMPT, max_new_tokens=32)
            for name, model in (("teacher", teacher), ("swapped", student))
        }

        def measure(model: Any) -> dict[str, Any]:
            return evaluate(model, teacher, tokenizer=tokenizer, dataset=heldout, device="cpu", **EVALUATION)

        progress("evaluating teacher and swapped student")
        swapped = measure(student)
        progress(f"distilling: {TOKENS:,} tokens of attention transfer and logits")
        before = time.monotonic()
        student = distill(
            student,
            teacher,
            training,
            tokenizer=tokenizer,
            stage="all",
            output=out,
            tokens=TOKENS,
            max_length=LENGTH,
            batch_size=BATCH,
            gradient_checkpointing=False,
            device="cpu",
            command=command,
        )
        trained = time.monotonic() - before
        progress("evaluating the distilled student")
        distilled = measure(student)
        texts["distilled"] = generate_text(student, tokenizer, PROMPT, max_new_tokens=32)
    return json.loads(
        json.dumps(
            {
                "mixer": to,
                "window": WINDOW,
                "sinks": SINKS,
                "tokens": sum(result.tokens for result in student.distillation),
                "seconds": round(time.monotonic() - started, 1),
                "seconds_distilling": round(trained, 1),
                "threads": torch.get_num_threads(),
                "evaluation": EVALUATION,
                "models": {"swapped": swapped, "distilled": distilled},
                "prompt": PROMPT,
                "texts": texts,
            }
        )
    )


def format_demo(result: dict[str, Any]) -> str:
    """The demo's table and its three continuations, as text."""
    from ..evaluate.table import format_results

    lines = [
        f"{result['mixer']}, window {result['window']}, {result['sinks']} sink, {result['tokens']:,} training tokens, "
        f"{result['seconds']:.0f} s in all; measured on text that the teacher was not trained on",
        "",
        format_results(result["models"]),
        "",
    ]
    for name, text in result["texts"].items():
        continued = " ".join(text.split())
        lines.append(f"{name:>10}: {result['prompt']} ... {continued}")
    return "\n".join(lines)
