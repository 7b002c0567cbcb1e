"""The verbs that time: `bench kernels`, `bench model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bench.options import KernelOptions, ModelOptions
from ..flags import dataclass_options, given, mixer_options, model_options, run_options
from .group import main
from .shared import command_line, print_json, quiet, say, source_of


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


def _show(results: dict[str, Any], table: Callable[..., str], file: Path | None, as_json: bool) -> None:
    """Draws the results beside the `file` that they are in, and prints them."""
    from ..bench import figures

    if file is not None:
        figures.draw(results, file.expanduser().with_suffix(".png"), say)
    if as_json:
        print_json(results)
    else:
        click.echo(table(results))


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
    from ..bench import bench_kernels, kernels, tables
    from ..device import chosen_device

    results = bench_kernels(
        KernelOptions(**given(options)),
        dtype=dtype,
        device=chosen_device(device),
        out=out,
        command=command_line(),
        say=say,
    )
    _show(results, tables.kernels_table, out and out / kernels.FILE, as_json)


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
    from ..bench import bench_model, tables
    from ..bench import model as benchmark
    from ..device import chosen_device

    quiet()
    source = source_of(teacher or options["config"] or "", options)
    results = bench_model(
        student,
        source if teacher else None,
        ModelOptions(**given(options)),
        config_source=None if teacher else source,
        mixer_options=mixer_options(extra),
        dtype=dtype,
        device=chosen_device(device),
        out=out,
        command=command_line(),
        say=say,
    )
    _show(results, tables.model_table, out and out / benchmark.FILE, as_json)
