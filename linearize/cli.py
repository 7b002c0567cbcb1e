"""The command line: one Click command a verb, which parses, calls and prints.

Results go to stdout, progress and logs to stderr. Exit code 0: done; 1: failed; 2: wrong usage.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from . import processes
from .bench.options import KernelOptions, ModelOptions
from .distill.options import BlockOptions, FinetuneOptions, LogitOptions, MixingOptions, TransferOptions
from .errors import UserError
from .flags import calibrate_options, dataclass_options, given, mixer_options, model_options, run_options, swap_options
from .version import __version__

_TRAINING = ("distill", "finetune", "run")


class _Verbs(click.Group):
    """Turns what a person caused into one message and an exit code; LINEARIZE_DEBUG=1 shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, BrokenPipeError):
            raise
        except (click.ClickException, click.Abort) as error:
            if not processes.speaks_of_failure():
                ctx.exit(getattr(error, "exit_code", 1))
            raise
        except Exception as error:
            if not processes.speaks_of_failure():
                ctx.exit(getattr(error, "exit_code", 1))
            if os.environ.get("LINEARIZE_DEBUG"):
                traceback.print_exc()
            click.echo(f"Error: {_message(error)}", err=True)
            ctx.exit(getattr(error, "exit_code", 1))


def _message(error: Exception) -> str:
    """One line on what went wrong and what to do."""
    text = " ".join(str(error).split("\n")).strip() or "no message"
    text = text.encode(errors="backslashreplace").decode()  # what a damaged file holds may not be printable
    text = text if len(text) < 2000 else f"{text[:2000]} ..."
    if isinstance(error, UserError):
        return text
    from .output import is_disk_full

    if is_disk_full(error):
        return "the disk is full; nothing half-written was left behind"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "allocate memory" in text:
        return "out of memory: lower --batch-size or --max-length (--context for eval), or pass --dtype bfloat16"
    return f"{type(error).__name__}: {text[:600]} (not foreseen: LINEARIZE_DEBUG=1 shows where it happened)"


@click.group(
    "linearize", cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Turn a pretrained softmax-attention transformer into a linear-time one, and measure what it cost.

    MODEL is a Hub id (owner/name, or owner/name@REVISION), a folder, or a GGUF file.

    \b
    linearize demo                                        all of it on a small model, no network
    linearize plan meta-llama/Llama-3.1-8B --to based     what would happen
    linearize convert MODEL --to based -o student         swap the attention
    linearize distill student --teacher MODEL --dataset text.jsonl -o distilled
    linearize eval distilled --teacher MODEL --dataset text.jsonl
    """
    if processes.several() and ctx.invoked_subcommand not in _TRAINING:
        raise UserError(
            f"linearize {ctx.invoked_subcommand} runs in one process: start it without accelerate launch or torchrun "
            f"(several processes train: {', '.join(_TRAINING)})"
        )


def _command_line() -> list[str]:
    return ["linearize", *sys.argv[1:]]


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _quiet() -> None:
    """transformers' progress and advice stay on stderr; its loading reports say nothing that a verb does not."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()


def _source(model: str, options: dict[str, Any]) -> Any:
    from .source import ModelSource

    return ModelSource(
        model=model,
        revision=options.pop("revision", None),
        gguf_file=options.pop("gguf_file", None),
        trust_remote_code=options.pop("trust_remote_code", False),
    )


def _flags(source: Any) -> str:
    """How the model is named in the next command."""
    named = {"--revision": source.revision, "--gguf-file": source.gguf_file}
    return " ".join([source.model, *(f"{flag} {value}" for flag, value in named.items() if value)])


def _swap(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `convert` from the flags of `swap_options`."""
    names = ("feature_map", "feature_dim", "state_heads")
    extra = mixer_options(options.pop("extra"), **{name: options.pop(name) for name in names})
    swap = {name: options.pop(name) for name in ("keep_softmax", "keep_window", "window", "sinks")}
    return swap | {"mixer_options": extra}


@main.command("ls")
@click.argument("what", type=click.Choice(["mixers", "families", "recipes"]), default=None, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(what: str | None, as_json: bool) -> None:
    """List the mixers, the model families and the recipes there are.

    \b
    linearize ls
    linearize ls mixers --json
    """
    from . import mixers
    from .recipes import shipped
    from .surgery.families import FAMILIES

    lists = {
        "mixers": mixers(),
        "families": {key: family.summary for key, family in sorted(FAMILIES.items())},
        "recipes": shipped(),
    }
    chosen = {what: lists[what]} if what else lists
    if as_json:
        _print_json(chosen)
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
    from .convert import plan
    from .convert.show import format_plan
    from .source import load_config
    from .surgery.student import check_mixer

    _quiet()
    check_mixer(to)
    result = plan(load_config(_source(model, options)), to, **_swap(options))
    if as_json:
        _print_json(result.to_dict())
    else:
        click.echo(format_plan(result))


@main.command("convert")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@swap_options
@calibrate_options
@model_options()
@run_options("cpu")
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
    from .calibrate import CalibrateOptions
    from .convert import convert_folder
    from .convert.show import format_plan, size

    _quiet()
    source = _source(model, options)
    swap = _swap(options)
    named = {name: options.pop(f"calibrate_{name}") for name in ("sequences", "length", "passes")}
    options["calibrate_options"] = CalibrateOptions(seed=options["seed"], **given(named))
    made = convert_folder(
        source, to, out, device=device or "cpu", dry_run=dry_run, command=_command_line(), **options, **swap
    )
    if as_json:
        _print_json(made.to_dict() | {"out": None if dry_run else str(out)})
    elif dry_run:
        click.echo(format_plan(made))
    else:
        click.echo(
            f"{out}: {made.parameters:,} parameters, {made.new_parameters:,} of them new; "
            f"state {size(made.state_bytes_per_sequence)} a sequence, KV cache {size(made.kv_bytes_per_token)} a token "
            f"(the teacher's {size(made.kv_bytes_per_token_teacher)})"
        )
        click.echo(f"next: linearize distill {out} --teacher {_flags(source)} --dataset DATASET -o {out}-distilled")


def _data_options(command: Any) -> Any:
    for option in (
        click.option("--isolate", is_flag=True, help="Packed documents do not see each other."),
        click.option("--text-field", default="text", show_default=True, help="The data set's field with the text."),
        click.option("--dataset", required=True, help="Hub name[:config[:split]] or local files, comma-separated."),
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
        _print_json(
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
    from .distill import distill

    _quiet()
    source = _source(teacher, options)
    with processes.together(options["device"]):
        result = distill(student, source, dataset, output=out, command=_command_line(), **given(options))
    _report_training(result, out, as_json, f"linearize eval {out} --teacher {_flags(source)} --dataset DATASET")


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
    from .distill import finetune

    _quiet()
    with processes.together(options["device"]):
        result = finetune(student, dataset, output=out, command=_command_line(), **given(options))
    _report_training(result, out, as_json, f"linearize generate {out} 'a prompt'")


@main.command("run")
@click.argument("recipe")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As stages.logits.learning_rate=1e-4.")
@click.option("--dataset", help="Hub name[:config[:split]] or local files, in place of the recipe's.")
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
    from .recipes.run import run_recipe

    _quiet()
    source = _source(model, options)
    with processes.together(options["device"]):
        result = run_recipe(recipe, source, out, dry_run=dry_run, say=_say, command=_command_line(), **options)
    if not processes.is_main():
        return
    if as_json:
        _print_json(result.to_dict() | {"out": None if dry_run else str(out)})
        return
    if dry_run:
        click.echo(result.recipe.to_yaml())
    for stage in result.stages:
        did = "" if stage.steps is None else f", {stage.steps} steps"
        loss = "" if stage.loss is None else f", loss {stage.loss:.4g}"
        time = "" if stage.seconds is None else f", {stage.seconds:.0f} s"
        click.echo(f"{stage.name}: {stage.kind}, {stage.tokens:,} tokens{did}{loss}{time}; {stage.folder}")
    if not dry_run:
        click.echo(f"next: linearize eval {out} --teacher {_flags(source)} --dataset DATASET")


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
@click.option("--tasks", default="", metavar="TASK,...", help="Local .jsonl files, or names of lm-eval's tasks.")
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
    from .device import chosen_device
    from .evaluate import evaluate_each, side_by_side, table
    from .source import ModelSource

    _quiet()
    loading = {name: options.pop(name) for name in ("revision", "gguf_file", "trust_remote_code")}
    students = [ModelSource(model) if teacher else _source(model, dict(loading)) for model in models]
    source = _source(teacher, loading) if teacher else None
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
        _print_json(next(iter(results.values())))
    else:
        _print_json(side_by_side(results, teacher))


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
    from .device import chosen_device
    from .evaluate.generation import generate_text
    from .source import load_model, load_tokenizer

    _quiet()
    source = _source(model, options)
    text = generate_text(
        load_model(source, dtype=dtype, device=chosen_device(device)),
        load_tokenizer(source),
        prompt,
        stream=None if as_json else sys.stdout,
        **options,
    )
    if as_json:
        _print_json({"prompt": prompt, "text": text})


@main.group("bench")
def bench_verb() -> None:
    """Measure speed and memory: the operations, or a student against its teacher.

    \b
    linearize bench kernels --tokens 2048,8192,32768 -o speed
    linearize bench model student --teacher MODEL -o speed
    """


def _bench_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the JSON and the picture."),
    ):
        command = option(command)
    return command


def _say(text: str) -> None:
    click.echo(text, err=True)


@bench_verb.command("kernels")
@dataclass_options(KernelOptions)
@run_options()
@_bench_options
def bench_kernels_verb(dtype: str, device: str | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Time every operation against softmax and, where they are installed, the peers.

    \b
    linearize bench kernels --tokens 2048,8192,32768,131072 -o speed
    linearize bench kernels --ops gla --providers linearize,fla --cold-start -o speed --merge
    linearize bench kernels --device cpu --tokens 128,256 --heads 2 --head-dim 16 --ops linear,window
    """
    from .bench import bench_kernels, figures, kernels, tables
    from .device import chosen_device

    results = bench_kernels(
        KernelOptions(**given(options)),
        dtype=dtype,
        device=chosen_device(device),
        out=out,
        command=_command_line(),
        say=_say,
    )
    if out is not None:
        figures.draw(results, (out.expanduser() / kernels.FILE).with_suffix(".png"), _say)
    if as_json:
        _print_json(results)
    else:
        click.echo(tables.kernels_table(results))


@bench_verb.command("model")
@click.argument("student", required=False)
@click.option("--teacher", metavar="MODEL", help="The model that STUDENT was converted from.")
@dataclass_options(ModelOptions)
@click.option("--mixer-option", "extra", multiple=True, metavar="KEY=VALUE", help="With --config: of the mixer.")
@model_options("the teacher or of --config")
@run_options()
@_bench_options
def bench_model_verb(
    student: str | None,
    teacher: str | None,
    extra: tuple[str, ...],
    dtype: str,
    device: str | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time STUDENT and its teacher over length, prefill and decoding, and say where the student overtakes.

    \b
    linearize bench model distilled --teacher MODEL --contexts 1,4096,32768 -o speed
    linearize bench model --config llama-8b.json --to gla --dtype bfloat16 --compile -o speed
    """
    from .bench import bench_model, figures, tables
    from .bench import model as benchmark
    from .device import chosen_device

    _quiet()
    source = _source(teacher or options["config"] or "", options)
    results = bench_model(
        student,
        source if teacher else None,
        ModelOptions(**given(options)),
        config_source=None if teacher else source,
        mixer_options=mixer_options(extra),
        dtype=dtype,
        device=chosen_device(device),
        out=out,
        command=_command_line(),
        say=_say,
    )
    if out is not None:
        figures.draw(results, (out.expanduser() / benchmark.FILE).with_suffix(".png"), _say)
    if as_json:
        _print_json(results)
    else:
        click.echo(tables.model_table(results))


@main.command("report")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--evaluation", type=click.Path(path_type=Path), help="What `linearize eval OUT --json` printed.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write.  [default: OUT/report.html]")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
def report_verb(folder: Path, evaluation: Path | None, out: Path | None, overwrite: bool) -> None:
    """Write one self-contained HTML page about the converted model in OUT: stages, losses, scores, what it cost.

    \b
    linearize eval distilled --teacher MODEL --json > distilled/evaluation.json
    linearize report distilled
    """
    from .report import report

    click.echo(report(folder, evaluation=evaluation, out=out, overwrite=overwrite))


@main.command("push")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make REPO private; one that is there and public is refused.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, made if need be.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--overwrite", is_flag=True, help="Replace a model in REPO that linearize did not make.")
@click.option("--dry-run", is_flag=True, help="Print the card and the files; no network, no token, nothing written.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push_verb(folder: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Upload the converted model in OUT to REPO (owner/name) on the Hub, with a model card of what was measured.

    The token is HF_TOKEN's or that of `hf auth login`; the Hub is HF_ENDPOINT's. A README.md that you wrote is kept.

    \b
    linearize push distilled me/SmolLM2-135M-gla --dry-run
    linearize push distilled me/SmolLM2-135M-gla --private --message "10M tokens"
    linearize eval distilled --teacher MODEL --json > distilled/evaluation.json    # first: the card has its figures
    """
    from .convert.show import size
    from .hub import push

    _quiet()
    pushed = push(folder, repo, say=lambda text: _say(f"note: {text}"), **options)
    if as_json:
        _print_json(pushed.to_dict())
        return
    if pushed.dry_run:
        click.echo(f"{pushed.card}\n{'-' * 40}")
    for path, count in pushed.files.items():
        click.echo(f"{size(count):>12}  {path}")
    for path, why in pushed.left_out.items():
        click.echo(f"{'left out':>12}  {path}: {why}")
    whose = {"generated": "written from what was measured", "OUT": f"your own, {folder / 'README.md'}"}
    click.echo(f"card: {whose.get(pushed.card_from, f'the one in {repo}, which someone wrote, is kept')}")
    total = f"{len(pushed.files)} files, {size(sum(pushed.files.values()))}"
    click.echo(
        f"{total}: nothing pushed (--dry-run)" if pushed.dry_run else f"{total}: {pushed.url} at {pushed.commit}"
    )


@main.command("demo")
@click.option("--to", default="based", show_default=True, metavar="MIXER", help="The mixer to convert to.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=None, help="Keep the distilled student here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def demo_verb(to: str, out: Path | None, as_json: bool) -> None:
    """Convert, distil, evaluate and generate with the embedded teacher: no network, at most 3 minutes on 2 cores.

    \b
    linearize demo
    linearize demo --to gla -o student
    """
    from .demo.run import format_demo, run_demo

    _quiet()
    result = run_demo(to, out=out, progress=lambda text: click.echo(text, err=True), command=_command_line())
    if as_json:
        _print_json(result)
    else:
        click.echo(format_demo(result))


def run() -> None:
    """`main`, and then out at once: to take torch apart lasts a second, and nothing here waits to be closed.

    A SIGTERM ends it as an exception would, so that a folder half written is removed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        code: int | str | None = 0
    except SystemExit as end:
        code = end.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has gone, or the disk under a redirection is full
        code = code or 1
    atexit._run_exitfuncs()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    run()
