"""The figures of a stage's steps since the last line of its log, as part of every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Figure = float | list[float]
FILE = "tally.json"


class Tally:
    """Sums a step's figures (numbers, or one a layer) under their names and gives means over the steps that had them.

    A checkpoint that lies between two lines of the log carries the sums, so that a resumed log is the same log.
    `seconds` is the training time up to the checkpoint that was loaded.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sums: dict[str, Figure] = {}
        self._steps: dict[str, list[int]] = {}

    def add(self, step: int, figures: dict[str, Figure]) -> None:
        """The shares of `step`'s figures that one of its batches has."""
        for name, value in figures.items():
            old = self._sums.get(name)
            if old is None:
                self._sums[name] = value
            elif isinstance(value, list):
                assert isinstance(old, list)
                self._sums[name] = [a + b for a, b in zip(old, value, strict=True)]
            else:
                assert not isinstance(old, list)
                self._sums[name] = old + value
            steps = self._steps.setdefault(name, [])
            if not steps or steps[-1] != step:
                steps.append(step)

    def take(self) -> dict[str, Figure]:
        """The means so far; begins anew."""
        means: dict[str, Figure] = {}
        for name, total in self._sums.items():
            count = len(self._steps[name])
            means[name] = [part / count for part in total] if isinstance(total, list) else total / count
        self._sums, self._steps = {}, {}
        return means

    def save(self, checkpoint: Path, *, seconds: float = 0.0) -> None:
        """Writes the sums, and the `seconds` of training until now."""
        told = {"sums": self._sums, "steps": self._steps, "seconds": seconds}
        (checkpoint / FILE).write_text(json.dumps(told))

    def load(self, checkpoint: Path) -> None:
        """What `save` wrote there; nothing for a checkpoint without it."""
        path = checkpoint / FILE
        saved: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self._sums, self._steps = saved.get("sums", {}), saved.get("steps", {})
        self.seconds = saved.get("seconds", 0.0)
