"""The command line: one Click command a verb, which parses, calls and prints.

Results go to stdout, progress and logs to stderr. Exit code 0: done; 1: failed; 2: wrong usage.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

# A verb is there once its file is imported.
from . import benchmarks, conversion, evaluation, results, training  # noqa: F401
from .group import main


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


__all__ = ["main", "run"]
