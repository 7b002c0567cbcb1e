"""The verbs before any training: `ls`, `plan`, `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..flags import calibrate_options, given, model_options, run_options, swap_options
from .group import main
from .shared import command_line, flags_of, print_json, quiet, source_of, swap_of


@main.command("ls")
@click.argument("what", type=click.Choice(["mixers", "families", "recipes"]), default=None, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(what: str | None, as_json: bool) -> None:
    """List the mixers, the model families and the recipes there are.

    \b
    linearize ls
    linearize ls mixers --json
    """
    from .. import mixers
    from ..recipes import shipped
    from ..surgery.families import FAMILIES

    lists = {
        "mixers": mixers(),
        "families": {key: family.summary for key, family in sorted(FAMILIES.items())},
        "recipes": shipped(),
    }
    chosen = {what: lists[what]} if what else lists
    if as_json:
        print_json(chosen)
        return
    for title, entries in chosen.items():
        click.echo(f"{title}:")
        for name, line in entries.items():
            click.echo(f"  {name:<16}{line}")
    if "families" in chosen:
        click.echo("Other families convert too, if their attention is made of the same parts: plan tells.")
    if what is None:
        click.echo("next: linearize plan MODEL --to MIXER, or linearize demo")


@main.command("plan")
@click.argument("model")
@swap_options
@model_options()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_verb(model: str, to: str, as_json: bool, **options: Any) -> None:
    """Say what a conversion would give, from MODEL's config alone: tensors, state, memory, time.

    \b
    linearize plan meta-llama/Llama-3.1-8B --to gla --keep-softmax every:8
    """
    from ..convert import plan
    from ..convert.show import format_plan
    from ..source import load_config
    from ..surgery.student import check_mixer

    quiet()
    check_mixer(to)
    result = plan(load_config(source_of(model, options)), to, **swap_of(options))
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(format_plan(result))


@main.command("convert")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@swap_options
@calibrate_options
@model_options()
@run_options("cpu; the accelerator for --calibrate and auto")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--seed", type=int, default=0, show_default=True, help="For the few starts that are random.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert_verb(
    model: str, to: str, out: Path, dry_run: bool, as_json: bool, device: str | None, **options: Any
) -> None:
    """Swap MODEL's softmax attention for MIXER and write a folder that transformers loads.

    Safetensors are converted from file to file, a layer in memory at a time; stopped half way, the same command goes
    on. --calibrate, auto, --device and GGUF files load the model.

    \b
    linearize convert HuggingFaceTB/SmolLM2-135M-Instruct --to based -o smol-based
    linearize convert ./models --gguf-file model.Q4_1.gguf --to gla --window 128 -o smol-gla
    linearize convert MODEL --to linear --keep-softmax heads:auto:10% --calibrate text.jsonl -o hybrid
    """
    from ..calibrate import CalibrateOptions
    from ..convert import convert_folder
    from ..convert.show import format_plan, size

    quiet()
    source = source_of(model, options)
    swap = swap_of(options)
    named = {name: options.pop(f"calibrate_{name}") for name in ("sequences", "length", "passes")}
    if options["calibrate_on"] is None and given(named):
        raise UsageError(f"--calibrate-{next(iter(given(named)))} is for --calibrate DATASET, which is not given")
    if options["keep_score"] is not None and "auto" not in (swap["keep_softmax"] or ""):
        raise UsageError("--keep-score is for --keep-softmax auto:... or heads:auto:..., which is not given")
    options["keep_score"] = options["keep_score"] or "gradient"
    options["calibrate_options"] = CalibrateOptions(seed=options["seed"], **given(named))
    made = convert_folder(source, to, out, device=device, dry_run=dry_run, command=command_line(), **options, **swap)
    if as_json:
        print_json(made.to_dict() | {"out": None if dry_run else str(out)})
    elif dry_run:
        click.echo(format_plan(made))
    else:
        click.echo(
            f"{out}: {made.parameters:,} parameters, {made.new_parameters:,} of them new; "
            f"state {size(made.state_bytes_per_sequence)} a sequence, KV cache {size(made.kv_bytes_per_token)} a token "
            f"(the teacher's {size(made.kv_bytes_per_token_teacher)})"
        )
        click.echo(f"next: linearize distill {out} --teacher {flags_of(source)} --dataset DATASET -o {out}-distilled")
