"""The model card of a converted folder: what was measured and recorded, and what was not, said so."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .. import public
from ..evaluate.variants import STUDENT, TEACHER
from . import front_matter
from .facts import Facts, data_name, on_hub
from .markdown import duration, number, picture, plain, table
from .pictures import loss_picture
from .results import evaluations, not_measured, speed, without_gain
from .student import student_rows

MARK = "<!-- written by linearize push; without this line the card is yours, and is never replaced -->"
Row = Mapping[str, Any]
_BEFORE_TRAINING = {
    "keep_scores.png": "What each key group was measured to bring back, before any training; framed: what stays "
    "softmax.",
    "calibration.png": "Error and cosine of each layer's attention output at the conversion, on text held out of the "
    "calibration, before any training; below, entropy and half-lives of the teacher's attention, a point a head.",
}


def is_generated(text: str) -> bool:
    """Whether `card` wrote this text."""
    return MARK in text


def card(
    facts: Facts, repo: str, *, inherited: Row, pictures: Collection[str] = (), revision: str | None = None
) -> str:
    """The text of README.md.

    Args:
        repo: where it will stand.
        inherited: licence and language from the teacher's card; what is not known is left out.
        pictures: those that go up beside it, by their path in the repository.
        revision: the branch, where it is not main.
    """
    sections = [
        _opening(facts, repo),
        *evaluations(facts, pictures),
        *speed(facts, pictures),
        _limits(facts),
        _loading(facts, repo, revision),
        _training(facts, pictures),
        _versions(facts),
    ]
    return front_matter.join(_fields(facts, repo, inherited), "\n\n".join([MARK, *sections]) + "\n")


def _fields(facts: Facts, repo: str, inherited: Row) -> ModelCardData:
    """The metadata that the Hub reads: fields that are not known are left out, not filled in."""
    results = _results(facts)
    known = facts.teacher.hub_id is not None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.teacher.hub_id,
        base_model_relation="finetune" if known else None,
        datasets=facts.datasets or None,
        tags=["linearize", "linear-attention", *facts.mixers],
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **inherited,
    )


def _results(facts: Facts) -> list[EvalResult]:
    """Perplexity on each data set, the one figure whose name the Hub knows."""
    found = []
    for judged in facts.measured.evaluations.values():
        for entry in judged.get("datasets") or ():
            name, value = data_name(entry.get("name")), (entry.get("perplexity") or {}).get(STUDENT)
            if name and isinstance(value, int | float):
                metric = f"perplexity, sequences of {judged.get('context', '?')} tokens"
                kind = name.partition(":")[0] if on_hub(name) else "text"
                found.append(EvalResult("text-generation", kind, name, "perplexity", value, metric_name=metric))
    return found


def _opening(facts: Facts, repo: str) -> str:
    mixers = " and ".join(f"`{name}`" for name in facts.mixers) or "no mixer"
    rows = student_rows(facts, _named(facts))
    return (
        f"# {repo.rpartition('/')[2]}\n\n{_named(facts)} with its softmax attention swapped for {mixers} by "
        f"linearize: linear-time mixers that start from the original weights.\n\n{table([('', ''), *rows])}"
    )


def _named(facts: Facts) -> str:
    teacher = facts.teacher
    if teacher.hub_id is not None:
        return f"[{teacher.hub_id}](https://huggingface.co/{teacher.hub_id})"
    return f"`{plain(teacher.name)}`" if teacher.name else "A transformer whose name was not recorded,"


def _limits(facts: Facts) -> str:
    lines = [
        "A mixer's state has a constant size: what lies further back than the window, and is not kept by softmax "
        "heads, is recalled from that state alone, on long contexts less well than by the teacher's attention."
        + _recalled(facts),
        "The teacher's own limits and terms hold here too.",
        "Without linearize installed, and on a CPU, the operations are plain PyTorch: the same numbers, slower. The "
        "Triton kernels come with linearize, and run on a GPU.",
        "A recurrent state cannot go back: no assisted decoding, no cropping of the cache. vLLM, SGLang and llama.cpp "
        "have no such layers.",
    ]
    if not facts.stages:
        lines.append("It was converted and not trained since, so it is a start for distillation, not a finished model.")
    lines += without_gain(facts)
    if missing := not_measured(facts):
        lines.append(f"Not measured: {', '.join(missing)}.")
    if facts.measured.evaluations:
        longest = max((judged.get("context") or 0) for judged in facts.measured.evaluations.values())
        lines.append(f"Nothing is known of its perplexity beyond {longest:,} tokens, the longest that was evaluated.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _recalled(facts: Facts) -> str:
    """The recall that was measured, where it asks for more than the window holds."""
    window = facts.options.get("window")
    for judged in facts.measured.evaluations.values():
        recall, length = judged.get("recall") or {}, judged.get("recall_length")
        if recall.get(STUDENT) is None or recall.get(TEACHER) is None:
            continue
        if isinstance(length, int) and isinstance(window, int) and window >= length:
            continue
        at = f" of {length} tokens" if isinstance(length, int) else ""
        return (
            f" Measured on passages{at}: a loss of {number(recall[STUDENT])} nats a token on the second copy, the "
            f"teacher's {number(recall[TEACHER])}."
        )
    return ""


def _loading(facts: Facts, repo: str, revision: str | None) -> str:
    at = f', revision="{revision}"' if revision else ""
    uses = f"""
tokenizer = AutoTokenizer.from_pretrained(name{at})
{_prompt(facts)}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
    return f"""## How to load it

Anywhere, with the code that lies beside the weights, one flat folder of PyTorch to be read before it is trusted:

```python
from transformers import AutoModelForCausalLM{", AutoTokenizer" if facts.tokenizer else ""}

name = "{repo}"
model = AutoModelForCausalLM.from_pretrained(name{at}, trust_remote_code=True){uses if facts.tokenizer else ""}
```

With linearize installed, with its kernels and no remote code:

```python
import linearize
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}"{at})
```"""


def _prompt(facts: Facts) -> str:
    if not facts.chat:
        return 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    return """messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""


def _training(facts: Facts, pictures: Collection[str]) -> str:
    text = ["## How it was made"]
    if not facts.chain:
        return "\n\n".join([*text, "Not recorded: the folder has no `linearize.json`."])
    if facts.recipe is not None:
        source = public.text(str(facts.recipe.get("source")))
        text.append(f"Recipe `{plain(str(facts.recipe.get('name')))}` (source: {plain(source)}).")
    start = facts.conversion
    if calibrated := data_name(start.get("calibrated_on")):
        tokens = start.get("tokens")
        amount = f", {tokens:,} tokens" if isinstance(tokens, int) and tokens else ""
        took = f" The conversion took {duration(start['seconds'])}." if start.get("seconds") is not None else ""
        text.append(f"The mixers start from the teacher's attention on {plain(calibrated)}{amount}.{took}")
    text += [picture(name, caption) for name, caption in _BEFORE_TRAINING.items() if name in pictures]
    if facts.stages:
        head = ("stage", "data", "tokens", "steps", "learning rate", "last loss", "time", "on", "ended (UTC)")
        rows: list[Sequence[Any]] = [head]
        for stage in facts.stages:
            rows.append(
                (
                    stage.name,
                    stage.data or "not recorded",
                    "not recorded" if stage.tokens is None else f"{stage.tokens:,}",
                    number(stage.steps),
                    None if stage.learning_rate is None else f"{stage.learning_rate:g}",
                    number(stage.loss),
                    duration(stage.seconds),
                    stage.hardware or "not recorded",
                    stage.time,
                )
            )
        text.append(table(rows))
        for stage in facts.stages:
            if (name := loss_picture(stage.name)) in pictures:
                text.append(picture(name, f"Loss of stage {plain(stage.name)} over its tokens."))
    else:
        text.append("Converted, and not trained since: no stage of distillation or fine-tuning is recorded.")
    text.append(
        "`linearize.json` has every option of every stage and the commands; paths of the machine that ran them are cut "
        "to their last part."
    )
    return "\n\n".join(text)


def _versions(facts: Facts) -> str:
    if not facts.versions:
        return "## Versions\n\nNot recorded."
    return "## Versions\n\nWritten with " + ", ".join(f"{name} {value}" for name, value in facts.versions.items()) + "."
