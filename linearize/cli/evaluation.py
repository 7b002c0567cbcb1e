"""The verbs that ask a model: `eval`, `generate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..flags import model_options, run_options
from .group import main
from .shared import print_json, quiet, source_of


@main.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--teacher", metavar="MODEL", help="Compare with this model: ratio, KL, recall.")
@click.option("--dataset", multiple=True, help="Data sets to measure on; by default the embedded held-out text.")
@click.option("--text-field", default="text", show_default=True, help="The data set's field with the text.")
@model_options("the teacher (without one: MODEL)")
@run_options()
@click.option("--context", type=int, default=1024, show_default=True, help="Tokens in a sequence.")
@click.option("--sequences", type=int, default=32, show_default=True, help="Sequences of each data set.")
@click.option("--batch-size", type=int, default=4, show_default=True, help="Sequences in one forward pass.")
@click.option("--recall-passages", type=int, default=64, show_default=True, help="Passages shown twice; 0 for none.")
@click.option("--recall-length", type=int, default=256, show_default=True, help="Tokens of such a passage.")
@click.option("--branches/--no-branches", default=True, help="Also with either branch off, and the window alone.")
@click.option("--retrieval-contexts", default="512", show_default=True, help="Lengths to find facts in; 0 for none.")
@click.option("--retrieval-items", type=int, default=32, show_default=True, help="Questions at each length.")
@click.option("--agreement-prompts", type=int, default=16, show_default=True, help="Greedy texts to compare; 0: none.")
@click.option(
    "--tasks",
    default="",
    metavar="TASK,...",
    help="Local .jsonl files, names of lm-eval's tasks, or .yaml files of its kind.",
)
@click.option("--task-items", type=int, default=300, show_default=True, help="Items of each task.")
@click.option("--equal-bytes", is_flag=True, help="Order by bytes held; star the best at equal bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval_verb(
    models: tuple[str, ...],
    teacher: str | None,
    dataset: tuple[str, ...],
    device: str | None,
    equal_bytes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure each MODEL: perplexity, KL from its teacher, recall of repeated passages, retrieval, agreement with its
    teacher, tasks; and what its branches do alone. Several MODELs stand side by side.

    \b
    linearize eval distilled --teacher MODEL --dataset heldout.jsonl --json
    linearize eval A B C --teacher MODEL --dataset heldout.jsonl --equal-bytes
    linearize eval distilled --teacher MODEL --retrieval-contexts 512,1024,2048 --tasks squad.jsonl
    """
    from ..device import chosen_device
    from ..evaluate import evaluate_each, side_by_side, table
    from ..source import ModelSource

    quiet()
    loading = {name: options.pop(name) for name in ("revision", "gguf_file", "trust_remote_code")}
    students = [ModelSource(model) if teacher else source_of(model, dict(loading)) for model in models]
    source = source_of(teacher, loading) if teacher else None
    results = evaluate_each(
        students,
        source,
        dataset=dataset,
        device=chosen_device(device),
        progress=True,
        **options,
    )
    if not as_json:
        click.echo(table.format_results(results, equal_bytes=equal_bytes))
    elif len(results) == 1:
        print_json(next(iter(results.values())))
    else:
        print_json(side_by_side(results, teacher))


@main.command("generate")
@click.argument("model")
@click.argument("prompt")
@model_options()
@run_options()
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Tokens to add.")
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message.")
@click.option("--temperature", type=float, default=None, help="Sample at this temperature; greedy without it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def generate_verb(model: str, prompt: str, dtype: str, device: str | None, as_json: bool, **options: Any) -> None:
    """Let MODEL go on from PROMPT.

    \b
    linearize generate distilled "The committee shall" --max-new-tokens 40
    """
    from ..device import chosen_device
    from ..evaluate.generation import generate_text
    from ..source import load_model, load_tokenizer

    quiet()
    source = source_of(model, options)
    text = generate_text(
        load_model(source, dtype=dtype, device=chosen_device(device)),
        load_tokenizer(source),
        prompt,
        stream=None if as_json else sys.stdout,
        **options,
    )
    if as_json:
        print_json({"prompt": prompt, "text": text})
