"""The models of one evaluation: student, teacher, and what is left of a student with a branch off.

A window beside a linear branch can carry a student alone, so that a low loss says nothing about the branch. Hence three
siblings of the whole student:

    linear_off     its window and sinks, with the weights as trained
    window_off     its linear branch; near keys are then seen by nothing
    window_alone   the teacher's weights, untrained, under the same window, sinks and kept softmax heads
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..modeling import SOFTMAX, LinearizeConfig
from ..modeling.mixer import branch_off
from .scoring import Scorer

STUDENT, TEACHER = "student", "teacher"
LINEAR_OFF, WINDOW_OFF, WINDOW_ALONE = "linear_off", "window_off", "window_alone"
VARIANTS = (LINEAR_OFF, WINDOW_OFF, WINDOW_ALONE)
_OFF = {LINEAR_OFF: "linear", WINDOW_OFF: "window", WINDOW_ALONE: "linear"}


@dataclass(frozen=True)
class Models:
    """Scorers by name. `off` has those variants that are a model with a branch off: the model and the branch."""

    scorers: dict[str, Scorer]
    off: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, student: Any, teacher: Any = None, *, branches: bool | Sequence[str] = True) -> Models:
        """Student, teacher, and those of the variants `branches` (True: all) that there are: none for a student without
        a window.

        Raises:
            ValueError: `branches` names no variant.
        """
        asked = (VARIANTS if branches else ()) if isinstance(branches, bool) else tuple(branches)
        if strangers := set(asked) - set(VARIANTS):
            raise ValueError(f"branches are {', '.join(VARIANTS)}, not {', '.join(sorted(strangers))}")
        scorers = {STUDENT: Scorer.of(student)}
        if teacher is not None:
            scorers[TEACHER] = Scorer.of(teacher)
        off: dict[str, tuple[Any, str]] = {}
        for name in asked if asked and has_window(student) else ():
            if name != WINDOW_ALONE:
                off[name], scorers[name] = (student, _OFF[name]), scorers[STUDENT]
            elif teacher is not None and (alone := window_alone(student, teacher)) is not None:
                off[name], scorers[name] = (alone, _OFF[name]), Scorer.of(alone)
        return cls(scorers, off)

    @property
    def teacher(self) -> str | None:
        return TEACHER if TEACHER in self.scorers else None

    @property
    def variants(self) -> list[str]:
        return list(self.off)

    @property
    def whole_logits(self) -> bool:
        return any(scorer.whole_logits for scorer in self.scorers.values())

    def states(self, ids: Tensor) -> dict[str, tuple[Scorer, Tensor]]:
        """Each model and variant run once on ids [B, T]: hidden states [B, T, X]."""
        found = {}
        for name, scorer in self.scorers.items():
            with self._as(name):
                found[name] = (scorer, scorer.run(ids))
        return found

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        if name not in self.off:
            yield
            return
        with branch_off(*self.off[name]):
            yield


def has_window(model: Any) -> bool:
    """Whether a model has mixers, each with a window, so that either branch can be off."""
    if not getattr(model, "mixer_layers", list)():
        return False
    try:
        with branch_off(model, "linear"):
            return True
    except ValueError:
        return False


def window_alone(student: Any, teacher: Any) -> Any:
    """The teacher converted with the student's window, sinks and kept softmax heads, holding the teacher's own tensors;
    None where the teacher cannot be converted so. With its linear branch off any mixer is the same: the plainest is
    taken, which has nothing to start."""
    from ..convert import convert

    config: Any = getattr(student, "config", None)
    if not hasattr(student, "mixer_layers"):  # of remote code it is no class of ours
        return None
    options = config.mixer_options
    try:
        return convert(
            teacher,
            "linear",
            keep_softmax=kept_softmax(config),
            keep_window=next((layer["softmax_window"] for layer in config.layers if "softmax_window" in layer), None),
            window=options.get("window", 0),
            sinks=options.get("sinks", 0),
            share_memory=True,
        )
    except UserError:  # a family that is not converted, a student of another, or one as the teacher
        return None


def kept_softmax(config: LinearizeConfig) -> str | None:
    """What a student kept, as `--keep-softmax` takes it: every head by layer and number, those of whole layers too."""
    kept = [
        f"{index}.{head}"
        for index, layer in enumerate(config.layers)
        for head in (
            range(config.num_attention_heads) if layer["mixer"] == SOFTMAX else layer.get("softmax_heads") or ()
        )
    ]
    return f"heads:{','.join(kept)}" if kept else None
