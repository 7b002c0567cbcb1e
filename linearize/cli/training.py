"""The verbs that train: `distill`, `finetune`, `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import processes
from ..distill.options import BlockOptions, FinetuneOptions, LogitOptions, MixingOptions, TransferOptions
from ..flags import dataclass_options, given, model_options, run_options
from .group import main
from .shared import command_line, flags_of, print_json, quiet, say, source_of


def _data_options(command: Any) -> Any:
    for option in (
        click.option("--isolate", is_flag=True, help="Packed documents do not see each other."),
        click.option("--text-field", default="text", show_default=True, help="The data set's field with the text."),
        click.option("--dataset", required=True, help="Hub name[@revision][:config[:split]] or files, with commas."),
    ):
        command = option(command)
    return command


def _stage_options(command: Any) -> Any:
    """Where a training verb keeps its checkpoints and what it does with an OUT that is there."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is whole."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the work folder."),
        click.option("--work-dir", type=click.Path(path_type=Path), help="Checkpoints' folder.  [default: OUT.work]"),
    ):
        command = option(command)
    return command


def _report_training(model: Any, out: Path, as_json: bool, following: str) -> None:
    if not processes.is_main():
        return
    results = model.distillation if hasattr(model, "distillation") else model.get_base_model().distillation
    if as_json:
        print_json(
            {
                "out": str(out),
                "stages": [
                    {
                        "stage": result.stage,
                        "steps": result.steps,
                        "tokens": result.tokens,
                        "loss": result.loss,
                    }
                    for result in results
                ],
            }
        )
        return
    for result in results:
        loss = "no steps" if result.loss is None else f"loss {result.loss:.4g}"
        click.echo(f"{result.stage}: {result.steps} steps, {result.tokens:,} tokens, {loss}")
    click.echo(f"next: {following}")


@main.command("distill")
@click.argument("student")
@click.option("--teacher", required=True, metavar="MODEL", help="The model that STUDENT was converted from.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--stage",
    default="all",
    show_default=True,
    help="transfer, logits, or all: one after the other; mixing or blocks: attention weights, layers' outputs.",
)
@_data_options
@model_options("the teacher")
@run_options()
@dataclass_options(MixingOptions, BlockOptions, TransferOptions, LogitOptions, skip=("device",))
@_stage_options
def distill_verb(
    student: str,
    teacher: str,
    dataset: str,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Bring STUDENT near its teacher: attention transfer, then logit distillation.

    \b
    linearize distill student --teacher MODEL --dataset corpus.jsonl.gz --tokens 10000000 -o distilled
    linearize distill student --teacher MODEL --dataset corpus.txt --stage transfer --max-length 2048 -o aligned
    """
    from ..distill import distill

    quiet()
    source = source_of(teacher, options)
    with processes.together(options["device"]):
        result = distill(student, source, dataset, output=out, command=command_line(), **given(options))
    _report_training(result, out, as_json, f"linearize eval {out} --teacher {flags_of(source)} --dataset DATASET")


@main.command("finetune")
@click.argument("student")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_data_options
@run_options()
@dataclass_options(FinetuneOptions, skip=("device",))
@_stage_options
def finetune_verb(
    student: str,
    dataset: str,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Adapt STUDENT to a data set with LoRA; --merge writes a plain model.

    \b
    linearize finetune distilled --dataset chats.jsonl --lora-rank 8 --merge -o tuned
    """
    from ..distill import finetune

    quiet()
    with processes.together(options["device"]):
        result = finetune(student, dataset, output=out, command=command_line(), **given(options))
    _report_training(result, out, as_json, f"linearize generate {out} 'a prompt'")


@main.command("run")
@click.argument("recipe")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As stages.logits.learning_rate=1e-4.")
@click.option("--dataset", help="Hub name[@revision][:config[:split]] or local files, in place of the recipe's.")
@click.option("--tokens", type=int, help="Tokens of all stages together, in place of the recipe's.")
@model_options()
@run_options()
@click.option("--resume", is_flag=True, help="Go on from the last whole stage in OUT.work, and its last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is whole, and start anew in OUT.work.")
@click.option("--dry-run", is_flag=True, help="Print the settled recipe and its stages, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run_verb(recipe: str, model: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Convert MODEL and train it as RECIPE says: a name from `linearize ls recipes`, or a YAML file.

    \b
    linearize run default MODEL --dataset corpus.jsonl.gz --set convert.to=gla -o student
    linearize run radlads MODEL --dataset corpus.txt --tokens 20000000 --dry-run -o student
    """
    from ..recipes.run import run_recipe

    quiet()
    source = source_of(model, options)
    with processes.together(options["device"]):
        result = run_recipe(recipe, source, out, dry_run=dry_run, say=say, command=command_line(), **options)
    if not processes.is_main():
        return
    if as_json:
        print_json(result.to_dict() | {"out": None if dry_run else str(out)})
        return
    if dry_run:
        click.echo(result.recipe.to_yaml())
    for stage in result.stages:
        did = "" if stage.steps is None else f", {stage.steps} steps"
        loss = "" if stage.loss is None else f", loss {stage.loss:.4g}"
        time = "" if stage.seconds is None else f", {stage.seconds:.0f} s"
        click.echo(f"{stage.name}: {stage.kind}, {stage.tokens:,} tokens{did}{loss}{time}; {stage.folder}")
    if not dry_run:
        click.echo(f"next: linearize eval {out} --teacher {flags_of(source)} --dataset DATASET")
