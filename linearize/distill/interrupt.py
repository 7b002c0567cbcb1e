"""SIGTERM while a stage trains: the step ends, a checkpoint is written, and the process leaves with 143."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


class Interrupt:
    """`asked` is whether a SIGTERM came while `listening`; a second one does not wait for the step's end."""

    def __init__(self) -> None:
        self.asked = False

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise SystemExit(EXIT_CODE)
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signal over; in a thread, which Python sends no signals, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
