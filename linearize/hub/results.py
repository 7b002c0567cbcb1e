"""The card's sections of what was measured: evaluations, speed, and their pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..convert.show import size
from ..evaluate.variants import LINEAR_OFF, STUDENT, TEACHER, WINDOW_ALONE, WINDOW_OFF
from .facts import Facts, data_name
from .markdown import number, picture, plain, table
from .pictures import evaluation_pictures

Row = Mapping[str, Any]
VARIANTS = {
    LINEAR_OFF: "linear branch off",
    WINDOW_OFF: "window off",
    WINDOW_ALONE: "the teacher under the student's window alone, untrained",
}
_WITHOUT_GAIN = {
    LINEAR_OFF: "the linear branch brings nothing, the model with it off is as near to its teacher",
    WINDOW_ALONE: "training brought nothing over the teacher's own weights under a window, untrained",
}
_SPEEDS = ("prefill_tokens_per_second", "decode_ms", "decode_tokens_per_second", "decode_peak_gib")
_KERNELS = ("forward_ms", "forward_backward_ms", "forward_peak_gib", "forward_backward_peak_gib")
_AHEAD = {"decode": "decoding", "prefill": "prefill", "cache": "cache size"}


def evaluations(facts: Facts, pictures: Collection[str]) -> list[str]:
    """A section an evaluation, or one that says that there is none; `pictures` are those that the repository has."""
    if not facts.measured.evaluations:
        return [
            "## What it cost\n\nNot measured: this folder has no evaluation. `linearize eval` measures perplexity, KL "
            "from the teacher, recall, retrieval and tasks, each with the linear branch off."
        ]
    many = len(facts.measured.evaluations) > 1
    found = []
    for path, judged in facts.measured.evaluations.items():
        drawn = [picture(name, text) for name, text in evaluation_pictures(path).items() if name in pictures]
        title = f"## What it cost{f' ({path})' if many else ''}"
        found.append("\n\n".join([title, *_evaluation(judged, facts.options.get("window")), *drawn]))
    return found


def _evaluation(judged: Row, window: Any) -> list[str]:
    rows: list[Sequence[Any]] = [
        ("", "perplexity", "of the teacher's", "KL, nats a token", "recall loss, 1st copy", "2nd copy")
    ]
    if judged["perplexity"].get(TEACHER) is not None:
        rows.append(("teacher", *_figures(judged, TEACHER)))
    rows.append(("**this model**", *_figures(judged, STUDENT)))
    rows += [(label, *_figures(judged[name], STUDENT)) for name, label in VARIANTS.items() if judged.get(name)]
    names = [data_name(entry.get("name")) for entry in judged.get("datasets") or ()]
    on = ", ".join(name for name in names if name)
    tokens = judged.get("tokens")
    measured = f"On {tokens:,} tokens" if isinstance(tokens, int) else "On a number of tokens that is not recorded"
    text = [table(rows), f"{measured}{f' of {plain(on)}' if on else ''} in sequences of {judged.get('context', '?')}."]
    if (judged.get("recall") or {}).get(STUDENT) is not None:
        text[-1] += f" {_recall(judged, window)}"
    asked: list[Sequence[Any]] = []
    for entry in judged.get("retrieval") or ():
        if entry.get("items"):
            asked.append((f"facts found in {entry['context']} tokens", entry["items"], *_pair(entry)))
    agreement = judged.get("agreement")
    if agreement is not None:
        same, prompts = agreement.get("same_prefix"), agreement.get("prompts")
        asked.append(("greedy text like the teacher's, share before the first difference", prompts, "1", number(same)))
    for name, task in (judged.get("tasks") or {}).items():
        metric = f", {task['metric']}" if task.get("metric") else ""
        asked.append((f"{PurePath(name).name}{metric}", task.get("items"), *_pair(task)))
    if asked:
        text.append(table([("", "items", "teacher", "this model"), *asked]))
    return text


def _recall(judged: Row, window: Any) -> str:
    """How recall was measured, and whether it asked anything of what lies beyond the window."""
    length, passages = judged.get("recall_length"), judged.get("recall_passages")
    if not isinstance(length, int):
        return "Recall is the loss on passages that are shown twice."
    told = f"Recall is the loss on {passages} passages of {length} tokens, each shown twice."
    if isinstance(window, int) and window >= length:
        told += f" The window of {window} tokens reaches the first copy, so this says nothing of the linear branch."
    return told


def _figures(judged: Row, role: str) -> tuple[str, ...]:
    own, recall = role == STUDENT, judged.get("recall") or {}
    first = recall.get("first_copy") or {}
    values = (
        judged["perplexity"].get(role),
        judged["perplexity"].get("ratio") if own else 1.0,
        judged.get("kl") if own else 0.0,
        first.get(role),
        recall.get(role),
    )
    return tuple(number(value) for value in values)


def _pair(entry: Row) -> tuple[str, str]:
    return number(entry.get(TEACHER)), number(entry.get(STUDENT))


def speed(facts: Facts, pictures: Collection[str]) -> list[str]:
    """A section a benchmark, each with its picture where the repository has it."""
    found = []
    for path, results in facts.measured.model_benches.items():
        found.append(_of_model(results) + _drawn(path, pictures, "Time and memory over the context's length."))
    for path, results in facts.measured.kernel_benches.items():
        found.append(_of_kernels(results) + _drawn(path, pictures, "Time and memory of the operations over length."))
    return found


def _drawn(path: str, pictures: Collection[str], caption: str) -> str:
    name = f"{path.removesuffix('.json')}.png"
    return f"\n\n{picture(name, caption)}" if name in pictures else ""


def _of_model(results: Row) -> str:
    from ..bench.tables import number as short  # `import linearize` does without the benchmarks

    rows: list[Sequence[Any]] = [
        ("", "batch", "context", "prefill tok/s", "ms a token", "tok/s", "peak GiB", "state", "KV")
    ]
    for row in results["rows"]:
        rows.append(
            (
                "this model" if row.get("model") == STUDENT else row.get("model"),
                row.get("batch"),
                row.get("context"),
                *(short(row.get(name)) for name in _SPEEDS),
                *(None if row.get(name) is None else size(row[name]) for name in ("state_bytes", "kv_bytes")),
            )
        )
    ahead = []
    for row in results["overtakes"]:
        if places := [f"{what} {_ahead(row[key])}" for key, what in _AHEAD.items() if key in row]:
            ahead.append(f"batch {row['batch']}: {', '.join(places)}")
    text = f"## Speed beside its teacher\n\n{table(rows)}\n\nMeasured on {_where(results)}."
    if any("noise" in str(row.get("error")) for row in results["rows"]):
        text += " A dash: not measured, or lost in the timer's noise."
    return text + (f" Where this model is ahead: {'; '.join(ahead)}." if ahead else "")


def _of_kernels(results: Row) -> str:
    from ..bench.tables import number as short

    rows: list[Sequence[Any]] = [
        ("operation", "tokens", "forward ms", "forward and backward ms", "GiB", "GiB with backward")
    ]
    for row in results["rows"]:
        label = f"{row.get('op')}, {row.get('provider')}"
        rows.append((label, row.get("tokens"), *(short(row.get(name)) for name in _KERNELS)))
    return f"## Speed of the operations\n\n{table(rows)}\n\nMeasured on {_where(results)}."


def _ahead(tokens: float | None) -> str:
    return "never" if tokens is None else f"from {tokens:,.0f} tokens on"


def _where(results: Row) -> str:
    packages = ("torch", "triton", "transformers", "linearize")
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in packages if name in results["versions"])
    return f"{plain(str(results['hardware']))}, {results['dtype']}, {versions}"


def without_gain(facts: Facts) -> list[str]:
    """A sentence for each simpler thing that an evaluation found as near to the teacher as this model."""
    told = []
    for judged in facts.measured.evaluations.values():
        for name in (LINEAR_OFF, WINDOW_ALONE):
            other, own = (judged.get(name) or {}).get("kl"), judged.get("kl")
            if other is not None and own is not None and other <= own:
                told.append(
                    f"On what was evaluated, {_WITHOUT_GAIN[name]}: a KL of {number(other)} nats a token from the "
                    f"teacher, this model's is {number(own)}."
                )
    return told


def not_measured(facts: Facts) -> list[str]:
    """What a reader may look for and no file has."""
    judged = list(facts.measured.evaluations.values())
    held = {
        "perplexity": bool(judged),
        "KL from the teacher": any(entry.get("kl") is not None for entry in judged),
        "recall": any((entry.get("recall") or {}).get(STUDENT) is not None for entry in judged),
        "retrieval": any(found.get("items") for entry in judged for found in entry.get("retrieval") or ()),
        "agreement of greedy text": any(entry.get("agreement") for entry in judged),
        "tasks": any(entry.get("tasks") for entry in judged),
        "the model with a branch off": any(entry.get(name) for entry in judged for name in VARIANTS),
        "speed": bool(facts.measured.model_benches),
    }
    return [name for name, there in held.items() if not there]
