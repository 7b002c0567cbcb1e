"""The model card of a converted folder: what was measured and recorded, and what was not, said so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert.show import ranges, size
from ..evaluate.variants import LINEAR_OFF, STUDENT, TEACHER, WINDOW_ALONE, WINDOW_OFF
from . import front_matter
from .facts import Facts, data_name

MARK = "<!-- written by linearize push; without this line the card is yours, and is never replaced -->"
Row = Mapping[str, Any]
_VARIANTS = {
    LINEAR_OFF: "linear branch off",
    WINDOW_OFF: "window off",
    WINDOW_ALONE: "the teacher under the student's window alone, untrained",
}


def is_generated(text: str) -> bool:
    """Whether `card` wrote this text."""
    return MARK in text


def card(facts: Facts, repo: str, *, inherited: Row, revision: str | None = None) -> str:
    """The text of README.md.

    Args:
        repo: where it will stand.
        inherited: licence and language from the teacher's card; what is not known is left out.
        revision: the branch, where it is not main.
    """
    sections = [
        _opening(facts, repo),
        *_evaluations(facts),
        *_speed(facts),
        _training(facts),
        *_pictures(facts),
        _limits(facts),
        _loading(repo, revision),
        _versions(facts),
    ]
    return front_matter.join(_fields(facts, inherited), "\n\n".join([MARK, *sections]) + "\n")


def _fields(facts: Facts, inherited: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.teacher.hub_id is not None:
        fields |= {"base_model": facts.teacher.hub_id, "base_model_relation": "finetune"}
    return {**fields, **inherited, "tags": ["linearize", "linear-attention", *facts.mixers]}


def _opening(facts: Facts, repo: str) -> str:
    mixers = " and ".join(f"`{name}`" for name in facts.mixers) or "no mixer"
    rows: list[Sequence[Any]] = [("", ""), ("teacher", _teacher(facts))]
    rows += [(f"mixer `{name}`", f"layers {', '.join(ranges(layers))}") for name, layers in facts.mixers.items()]
    options = {name: value for name, value in facts.options.items() if name not in ("window", "sinks")}
    if facts.mixers:
        rows.append(("window, keys of exact softmax", facts.options.get("window", "not recorded")))
        rows.append(("sinks, first tokens always visible", facts.options.get("sinks", "not recorded")))
    if options:
        rows.append(("other options of the mixer", ", ".join(f"{name} {value}" for name, value in options.items())))
    rows.append(("stays softmax", _kept(facts)))
    rows.append(("parameters", f"{facts.parameters:,}, of them new {facts.new_parameters:,}; {facts.dtype}"))
    for judged in facts.measured.evaluations.values():
        if judged.get("state_bytes") is not None and judged.get("kv_bytes_per_token") is not None:
            theirs = judged.get("kv_bytes_per_token_teacher")
            told = f"a state of {size(judged['state_bytes'])}, and {size(judged['kv_bytes_per_token'])} of KV a token"
            rows.append(
                ("a sequence holds", told + (f" (the teacher's: {size(theirs)})" if theirs is not None else ""))
            )
            break
    name = _named(facts)
    return (
        f"# {repo.rpartition('/')[2]}\n\n{name} with its softmax attention swapped for {mixers} by "
        f"linearize: linear-time mixers that start from the original weights.\n\n{_table(rows)}"
    )


def _named(facts: Facts) -> str:
    teacher = facts.teacher
    if teacher.hub_id is not None:
        return f"[{teacher.hub_id}](https://huggingface.co/{teacher.hub_id})"
    return f"`{_plain(teacher.name)}`" if teacher.name else "A transformer whose name was not recorded,"


def _teacher(facts: Facts) -> str:
    teacher = facts.teacher
    if teacher.name is None:
        return "not recorded"
    parts = [_named(facts)]
    if teacher.gguf_file:
        parts.append(f"its {teacher.gguf_file}")
    if teacher.hub_id is not None:
        parts.append(f"revision {teacher.revision}" if teacher.revision else "revision not recorded")
    else:
        parts.append("a local folder" + (f", sample hash {teacher.hash[:16]}" if teacher.hash else ""))
    return ", ".join(parts)


def _kept(facts: Facts) -> str:
    kept = facts.kept
    parts = []
    if kept.layers:
        parts.append(f"layers {', '.join(ranges(kept.layers))}")
    if kept.heads:
        names = ", ".join(f"{layer}.{head}" for layer, heads in kept.heads.items() for head in heads)
        seen = "" if kept.window is None else f", which see the last {kept.window:,} keys"
        parts.append(f"query heads {names} (layer.head){seen}")
    if not parts:
        return "nothing beside the window"
    return f"{'; '.join(parts)}: {kept.groups} of {kept.groups_in_all} key groups have a KV cache"


# -- what was measured


def _evaluations(facts: Facts) -> list[str]:
    if not facts.measured.evaluations:
        return [
            "## What it cost\n\nNot measured: this folder has no evaluation. `linearize eval` measures perplexity, KL "
            "from the teacher, recall, retrieval and tasks, each with the linear branch off."
        ]
    many = len(facts.measured.evaluations) > 1
    return [
        f"## What it cost{f' ({path})' if many else ''}\n\n{_evaluation(judged)}"
        for path, judged in facts.measured.evaluations.items()
    ]


def _evaluation(judged: Row) -> str:
    rows: list[Sequence[Any]] = [
        ("", "perplexity", "of the teacher's", "KL, nats a token", "recall loss, 1st copy", "2nd copy")
    ]
    if judged["perplexity"].get("teacher") is not None:
        rows.append(("teacher", *_figures(judged, TEACHER)))
    rows.append(("**this model**", *_figures(judged, STUDENT)))
    rows += [(label, *_figures(judged[name], STUDENT)) for name, label in _VARIANTS.items() if judged.get(name)]
    names = [data_name(entry.get("name")) for entry in judged.get("datasets") or ()]
    on = ", ".join(name for name in names if name)
    tokens = judged.get("tokens")
    measured = f"On {tokens:,} tokens" if isinstance(tokens, int) else "On a number of tokens that is not recorded"
    text = [
        _table(rows),
        f"{measured}{f' of {_plain(on)}' if on else ''} in sequences of {judged.get('context', '?')}. Recall is the "
        "loss on passages that are shown twice.",
    ]
    asked: list[Sequence[Any]] = []
    for entry in judged.get("retrieval") or ():
        if entry.get("items"):
            asked.append((f"facts found in {entry['context']} tokens", entry["items"], *_pair(entry)))
    agreement = judged.get("agreement")
    if agreement is not None:
        same, prompts = agreement.get("same_prefix"), agreement.get("prompts")
        asked.append(("greedy text like the teacher's, share before the first difference", prompts, "1", _number(same)))
    for name, task in (judged.get("tasks") or {}).items():
        asked.append((Path(name).name, task.get("items"), *_pair(task)))
    if asked:
        text.append(_table([("", "items", "teacher", "this model"), *asked]))
    return "\n\n".join(text)


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
    return tuple(_number(value) for value in values)


def _pair(entry: Row) -> tuple[str, str]:
    return _number(entry.get(TEACHER)), _number(entry.get(STUDENT))


def _speed(facts: Facts) -> list[str]:
    from ..bench.tables import number  # `import linearize` does without the benchmarks

    found = []
    for results in facts.measured.model_benches.values():
        rows: list[Sequence[Any]] = [
            ("", "batch", "context", "prefill tok/s", "ms a token", "tok/s", "peak GiB", "state", "KV")
        ]
        for row in results["rows"]:
            figures = [None if _lost(row) and name in _DECODING else row.get(name) for name in _SPEEDS]
            held = [row.get("state_bytes"), row.get("kv_bytes")]
            rows.append(
                (
                    row.get("model"),
                    row.get("batch"),
                    row.get("context"),
                    *(number(value) for value in figures),
                    *("-" if value is None else size(value) for value in held),
                )
            )
        said = []
        for row in () if any(_lost(row) for row in results["rows"]) else results["overtakes"]:
            places = ", ".join(f"{what} {_ahead(row[key])}" for key, what in _AHEAD.items() if key in row)
            said.append(f"batch {row['batch']}: {places}")
        ahead = f" Where this model is ahead: {'; '.join(said)}." if said else ""
        found.append(f"## Speed beside its teacher\n\n{_table(rows)}\n\nMeasured on {_where(results)}.{ahead}")
    for results in facts.measured.kernel_benches.values():
        rows = [("operation", "tokens", "forward ms", "forward and backward ms", "GiB", "GiB with backward")]
        for row in results["rows"]:
            figures = [row.get(name) for name in _KERNELS]
            label = f"{row.get('op')}, {row.get('provider')}"
            rows.append((label, row.get("tokens"), *(number(value) for value in figures)))
        found.append(f"## Speed of the operations\n\n{_table(rows)}\n\nMeasured on {_where(results)}.")
    return found


_DECODING = ("decode_ms", "decode_tokens_per_second")
_SPEEDS = ("prefill_tokens_per_second", "decode_ms", "decode_tokens_per_second", "decode_peak_gib")
_KERNELS = ("forward_ms", "forward_backward_ms", "forward_peak_gib", "forward_backward_peak_gib")
_AHEAD = {"decode": "decoding", "prefill": "prefill", "cache": "cache size"}


def _lost(row: Row) -> bool:
    """Whether a token's time was lost in the noise: the benchmark subtracts a short run from a long one, and bounds the
    difference from below."""
    return row.get("decode_ms") is not None and row["decode_ms"] <= 1e-6


def _ahead(tokens: float | None) -> str:
    return "never" if tokens is None else f"from {tokens:,.0f} tokens on"


def _where(results: Row) -> str:
    packages = ("torch", "triton", "transformers", "linearize")
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in packages if name in results["versions"])
    return f"{_plain(str(results['hardware']))}, {results['dtype']}, {versions}"


# -- how it was made


def _training(facts: Facts) -> str:
    text = ["## How it was made"]
    if not facts.chain:
        return "\n\n".join([*text, "Not recorded: the folder has no `linearize.json`."])
    if facts.recipe is not None:
        recipe = facts.recipe
        text.append(f"Recipe `{_plain(str(recipe.get('name')))}` (source: {_plain(str(recipe.get('source')))}).")
    if facts.calibrated_on:
        text.append(f"The mixers start from the teacher's attention on {_plain(facts.calibrated_on)}.")
    if facts.stages:
        rows: list[Sequence[Any]] = [
            ("stage", "data", "tokens", "steps", "learning rate", "last loss", "ended (UTC)"),
            *(
                (
                    stage.name,
                    stage.data or "not recorded",
                    "not recorded" if stage.tokens is None else f"{stage.tokens:,}",
                    "-" if stage.steps is None else f"{stage.steps:,}",
                    "-" if stage.learning_rate is None else f"{stage.learning_rate:g}",
                    _number(stage.loss),
                    stage.time or "-",
                )
                for stage in facts.stages
            ),
        ]
        text.append(_table(rows))
    else:
        text.append("Converted, and not trained since: no stage of distillation or fine-tuning is recorded.")
    text.append("`linearize.json` has every option of every stage, and the commands.")
    return "\n\n".join(text)


def _pictures(facts: Facts) -> list[str]:
    found = []
    captions = {
        "keep_scores.png": "What each key group was measured to bring back, before any training; framed: what stays "
        "softmax.",
        "calibration.png": "Error of each layer's attention output at the conversion, on text held out of the "
        "calibration, before any training.",
    }
    for name in facts.measured.pictures:
        caption = captions.get(name, "Time and memory over length.")
        found.append(f"![{caption}]({name})\n\n{caption}")
    return ["## Pictures\n\n" + "\n\n".join(found)] if found else []


def _limits(facts: Facts) -> str:
    lines = [
        "A mixer's state has a constant size. What lies further back than the window and is not kept by softmax heads "
        "is recalled less well than by the teacher's attention." + _recalled(facts.measured.evaluations.values()),
        "The teacher's own limits and terms hold here too.",
        "Without linearize installed, and on a CPU, the operations are plain PyTorch: the same numbers, slower. The "
        "Triton kernels come with linearize, and run on a GPU.",
        "A recurrent state cannot go back: no assisted decoding, no cropping of the cache. vLLM, SGLang and llama.cpp "
        "have no such layers.",
    ]
    if missing := list(_not_measured(facts)):
        lines.append(f"Not measured: {', '.join(missing)}.")
    if facts.measured.evaluations:
        longest = max((judged.get("context") or 0) for judged in facts.measured.evaluations.values())
        lines.append(f"Nothing is known of its perplexity beyond {longest:,} tokens, the longest that was evaluated.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _recalled(evaluations: Iterable[Row]) -> str:
    for judged in evaluations:
        recall = judged.get("recall") or {}
        if recall.get(STUDENT) is not None and recall.get(TEACHER) is not None:
            return (
                f" Measured: {_number(recall[STUDENT])} nats a token on the second copy of a passage, the teacher's "
                f"{_number(recall[TEACHER])}."
            )
    return ""


def _not_measured(facts: Facts) -> Iterable[str]:
    judged = facts.measured.evaluations.values()
    if not judged:
        yield "perplexity"
    if not any(entry.get("kl") is not None for entry in judged):
        yield "KL from the teacher"
    if not any((entry.get("recall") or {}).get(STUDENT) is not None for entry in judged):
        yield "recall"
    if not any(found.get("items") for entry in judged for found in entry.get("retrieval") or ()):
        yield "retrieval"
    if not any(entry.get("agreement") for entry in judged):
        yield "agreement of greedy text"
    if not any(entry.get("tasks") for entry in judged):
        yield "tasks"
    if not any(entry.get(name) for entry in judged for name in _VARIANTS):
        yield "the model with a branch off"
    if not facts.measured.model_benches:
        yield "speed"


def _loading(repo: str, revision: str | None) -> str:
    at = f', revision="{revision}"' if revision else ""
    return f"""## How to load it

Anywhere, with the code that lies beside the weights:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{repo}"
model = AutoModelForCausalLM.from_pretrained(name{at}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name{at})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

With linearize installed (`pip install linearize`), with its kernels and no remote code:

```python
import linearize
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}"{at})
```"""


def _versions(facts: Facts) -> str:
    if not facts.versions:
        return "## Versions\n\nNot recorded."
    return "## Versions\n\nWritten with " + ", ".join(f"{name} {value}" for name, value in facts.versions.items()) + "."


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return "-" if value is None else _plain(str(value)).replace("|", "\\|")


def _plain(text: str | None) -> str:
    """Of a name that someone else chose: one line, and no HTML."""
    return " ".join((text or "").split()).replace("<", "&lt;")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
