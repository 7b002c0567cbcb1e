"""The command line's group: what a person caused is one message and an exit code."""

from __future__ import annotations

import os
import traceback
from typing import Any

import click

from .. import processes
from ..errors import UserError
from ..version import __version__

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
    from ..output import is_disk_full

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
