"""The verbs on what was made: `report`, `push`; and `demo`, which does all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .group import main
from .shared import command_line, print_json, quiet, say


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
    from ..report import report

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
    from ..convert.show import size
    from ..hub import push

    quiet()
    pushed = push(folder, repo, say=lambda text: say(f"note: {text}"), **options)
    if as_json:
        print_json(pushed.to_dict())
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
    from ..demo.run import format_demo, run_demo

    quiet()
    result = run_demo(to, out=out, progress=lambda text: click.echo(text, err=True), command=command_line())
    if as_json:
        print_json(result)
    else:
        click.echo(format_demo(result))
