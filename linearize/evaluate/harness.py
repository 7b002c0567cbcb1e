"""Tasks of EleutherAI's lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import UserError

# The figure that is given where a task has several.
_METRICS = ("acc", "exact_match", "em", "contains", "f1", "mc2", "bleu", "word_perplexity")


def run_harness(
    model: Any, tokenizer: Any, name: str, items: int, batch_size: int, file: Path | None = None
) -> dict[str, Any]:
    """One task, of lm-eval's or in a `file` of its kind, on the first `items` of its documents: `score`, the `metric`
    that it is, `items`, and `normalised` where lm-eval gives an accuracy by length too.

    Raises:
        UserError: lm-eval does not know the task, cannot have its data, or gives no figure.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[name if file is None else str(file)],  # a name of lm-eval's own is no file's
            limit=items,
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:  # lm-eval's own are of every kind
        line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"--tasks: lm-eval cannot run {name}: {line}") from error
    found = found or {}
    told = found.get("results", {}).get(name) or found.get("groups", {}).get(name) or {}
    figures = {
        key.split(",")[0]: float(value)
        for key, value in told.items()
        if isinstance(value, (int, float)) and "stderr" not in key and math.isfinite(value)
    }
    metric = next((metric for metric in (*_METRICS, *figures) if metric in figures), None)
    if metric is None:
        raise UserError(f"--tasks: lm-eval gives no figure for {name}")
    counted = (found.get("n-samples") or {}).get(name) or {}
    result = {"score": figures[metric], "metric": metric, "items": int(counted.get("effective", items))}
    return result | ({"normalised": figures["acc_norm"]} if "acc_norm" in figures else {})
