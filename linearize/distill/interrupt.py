"""SIGTERM while a stage trains: the step ends, a checkpoint is written, and the process leaves with 143.

Several processes do so for Ctrl-C too, and after the same step: which of them a signal reaches, and when, is the
launcher's affair.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import processes


class Interrupt:
    """`asked` is whether a signal came while `listening`; a second one does not wait for the step's end."""

    def __init__(self) -> None:
        self.asked = False
        self.others = False  # whether any process was asked, when they last met
        self.number: int = signal.SIGTERM

    @property
    def agreed(self) -> bool:
        """Whether to stop after this step."""
        return self.others if processes.several() else self.asked

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _note(self, number: int, frame: Any) -> None:
        # a launcher that is stopped itself may pass the signal on more than once
        if processes.peer_failed() or (self.asked and not processes.several()):
            raise SystemExit(128 + number)
        self.asked, self.number = True, number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over; in a thread, which Python sends none, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM, signal.SIGINT] if processes.several() else [signal.SIGTERM]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
