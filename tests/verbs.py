"""The command line in tests: a verb's result, the stdout of one that succeeds, the one message of one that fails."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner

from linearize.cli import main


def run(*args: object) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def done(*args: object) -> str:
    """Stdout of a verb that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def error_of(result: Any) -> str:
    """The one message of a verb that failed, stdout being empty."""
    assert result.stdout == "" and "Traceback" not in result.stderr
    *before, last = result.stderr.replace("\r", "\n").rstrip("\n").split("\n")
    assert last.startswith("Error: ") and not any(line.startswith("Error") for line in before), result.stderr
    return str(last)


def said(*args: object, code: int = 1) -> str:
    """The one message of a verb that must fail with `code`."""
    result = run(*args)
    assert result.exit_code == code, (result.exit_code, result.stderr)
    return error_of(result)
