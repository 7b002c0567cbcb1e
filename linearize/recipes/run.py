"""`linearize run`: a recipe from MODEL to OUT, stage by stage, each in a folder that loads on its own.

`OUT.work/` holds `1-convert`, `2-NAME`, ...; the last stage's folder becomes OUT. What a stage had done when it was
stopped lies beside its folder, in `N-NAME.work`; `recipe.json` has the folders' hashes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import processes, provenance
from ..device import chosen_device
from ..distill import together
from ..distill.options import LogitOptions, with_overrides
from ..distill.work import LOG_FILE, RecipeStage
from ..errors import UsageError, UserError
from ..json_files import read_lines, read_object
from ..output import check_new, settle
from ..paths import expanded
from ..rows import TextSource
from ..source import ModelSource, load_model, load_student, load_tokenizer, parse_device, parse_dtype, read_for
from . import guards
from .recipe import Recipe, Stage, find, load

STATE = "recipe.json"
_STAGE_FOLDER = re.compile(r"\d+-[\w-]+(\.work)?")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """What a stage did; `seconds` is of the process that ended it. None where the stage has not run (a dry run)."""

    name: str
    kind: str
    folder: str
    tokens: int
    steps: int | None = None
    loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """What `run_recipe` did: the settled recipe, and the conversion and the stages in their order."""

    recipe: Recipe
    out: Path
    stages: list[StageRun]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "recipe": self.recipe.to_dict(),
            "tokens": sum(stage.tokens for stage in self.stages),
            "stages": [asdict(stage) for stage in self.stages],
        }


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_recipe(
    recipe: str | Path,
    model: str | Path | ModelSource,
    output: str | Path,
    *,
    settings: Iterable[str] | Mapping[str, Any] = (),
    dataset: str | None = None,
    tokens: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    dtype: Any = "auto",
    device: str | None = None,
    say: Callable[[str], None] = _to_stderr,
    command: list[str] | str = "linearize.run",
) -> RecipeRun:
    """Converts `model` and trains it as a recipe says; `output` is a folder that transformers loads.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file.
        model: the teacher: a Hub id, a folder, a .gguf file or a `ModelSource`.
        settings: keys that differ, "stages.transfer.learning_rate=1e-3" or a mapping of such paths to values.
        dataset, tokens: take the place of the recipe's own.
        resume: go on from the last whole stage, and in a stage from its last checkpoint: the result and the loss trace
            are those of a run that never stopped.
        overwrite: replace `output`, and start anew in its work folder.
        dry_run: check all that can be without weights, and write nothing.
        say: is told the stages as they begin, and warnings; stderr by default.

    Raises:
        UsageError: an unknown recipe or key, a value out of range, an output or a work folder that is there.
        UserError: a stage's folder is missing or not what the stage left, another teacher than before, and what
            `convert_folder` and `distill` raise.
    """
    source = ModelSource.of(model)
    chosen = load(recipe, settings, dataset=dataset, tokens=tokens, device=device)
    texts = [stage.dataset for stage in chosen.stages] + [chosen.convert.get("calibrate_on")]
    files = [file for text in texts if text is not None for file in TextSource.parse(text).files]
    reads = (*read_for(source), *files, find(recipe))
    if resume and not overwrite and "recipe" in (provenance.read(expanded(output)) or {}):
        raise UsageError(f"-o/--out: {output} is whole: its run is complete, and there is nothing to resume")
    out = check_new(output, overwrite=overwrite, reads=reads)
    parse_dtype(dtype)
    for stage in chosen.stages:
        together.check_batch(stage.options)
    processes.start(device)
    run = _Run(chosen, source, out, dtype=dtype, device=chosen_device(device), say=say, command=command)
    run.agree(lambda: run.open(resume=resume, overwrite=overwrite, dry_run=dry_run))
    if dry_run:
        run.convert(dry_run=True)
        return RecipeRun(recipe=chosen, out=out, stages=[run.planned(index) for index in range(len(run.folders))])
    for index in range(run.done, len(run.folders)):
        run.step(index)
    made = run.folders[-1]
    processes.from_main(lambda: settle(made, out, overwrite=overwrite, spare=made, reads=reads))
    stages = [run.result(index) for index in range(len(run.folders))]
    return RecipeRun(recipe=chosen, out=out, stages=[*stages[:-1], replace(stages[-1], folder=str(out))])


class _Run:
    """A recipe on its way: the folders, what is known of those that are done, and the teacher while it is loaded."""

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        out: Path,
        *,
        dtype: Any,
        device: str,
        say: Callable[[str], None],
        command: list[str] | str,
    ) -> None:
        parse_device(device)
        self.recipe, self.source = recipe, source
        self.dtype, self.device, self.say, self.command = dtype, device, say, command
        self.work = out.with_name(f"{out.name}.work")
        names = ["convert", *(stage.name for stage in recipe.stages)]
        self.folders = [self.work / f"{index}-{name}" for index, name in enumerate(names, start=1)]
        conversion = {**recipe.convert, "seed": recipe.seed, "dtype": str(dtype)}
        self.specs: list[dict[str, Any]] = [conversion, *(stage.to_dict() for stage in recipe.stages)]
        self.teacher_identity = processes.from_main(lambda: guards.identity(source))
        self.done = 0
        self.state: dict[str, Any] = {"stages": {}}
        self._teacher: Any = None

    def agree(self, work: Callable[[], None]) -> None:
        """Work of the main process; what is done, and known of it, is then known to all."""

        def did() -> tuple[int, dict[str, Any]]:
            work()
            return self.done, self.state

        self.done, self.state = processes.from_main(did)

    # -- the work folder

    def open(self, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
        """Finds what is done, or makes the work folder ready for a new run."""
        there = [path for path in sorted(self.work.glob("*")) if _STAGE_FOLDER.fullmatch(path.name)]
        if there and not resume:
            if not overwrite:
                raise UsageError(
                    f"{self.work} holds the stages of a run ({', '.join(path.name for path in there)}): pass --resume "
                    "to go on, --overwrite to start anew, or move them away"
                )
            if not dry_run:
                self._clear(there)
            return
        if resume:
            path = self.work / STATE
            if path.is_file():
                self.state = _state(path)
            whole = [index for index, folder in enumerate(self.folders) if folder.is_dir()]
            self.done = whole[-1] + 1 if whole else 0
            strangers = [path.name for path in there if path.name.removesuffix(".work") not in self._names()]
            if strangers:
                raise UserError(
                    f"{self.work} holds the stages of another recipe ({', '.join(strangers)}), this one has "
                    f"{', '.join(self._names())}: resume with the same recipe, or pass --overwrite to start anew"
                )
            guards.check_there(self.folders, self.state["stages"], self.done)
            guards.check_handover(self.folders, self.specs, self.teacher_identity, self.hashes(), self.done)

    def _names(self) -> list[str]:
        return [folder.name for folder in self.folders]

    def _clear(self, stages: list[Path]) -> None:
        """Removes what runs of recipes left, and nothing else that may lie there."""
        for path in stages:
            ours = path.suffix == ".work" or "recipe" in (provenance.read(path) or {})
            if not ours:
                raise UserError(f"{path} was not left by a recipe, and --overwrite leaves it alone: move it away")
        for path in stages:
            shutil.rmtree(path)
        (self.work / STATE).unlink(missing_ok=True)

    def hashes(self) -> dict[str, str]:
        return {name: facts["hash"] for name, facts in self.state["stages"].items()}

    def _save_state(self) -> None:
        partial = self.work / f".{STATE}"
        partial.write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.work / STATE)

    # -- the steps

    def step(self, index: int) -> None:
        """Makes folder `index` whole."""
        self.agree(lambda: guards.check_handover(self.folders, self.specs, self.teacher_identity, self.hashes(), index))
        began = time.monotonic()
        if index == 0:
            self.tell(f"{self.folders[0].name}: {self.recipe.convert['to']}")
            processes.from_main(self.convert)
        else:
            stage = self.recipe.stages[index - 1]
            self.tell(f"{self.folders[index].name}: {stage.kind}, {stage.options.tokens:,} tokens")
            self.train(index, stage)
        self.agree(lambda: self._note(index, began))

    def tell(self, text: str) -> None:
        if processes.is_main():
            self.say(text)

    def _note(self, index: int, began: float) -> None:
        folder = self.folders[index]
        record = provenance.read(folder) or {}
        self.state["stages"][folder.name] = {
            "hash": provenance.parent_hash(folder),
            "steps": next(iter(record.get("steps", {}).values()), None),
            "tokens": record.get("tokens", 0),
            "loss": next(iter(record.get("loss", {}).values()), None),
            "seconds": round(time.monotonic() - began, 1),
        }
        self._save_state()

    def _facts(self, index: int, like: Path) -> dict[str, Any]:
        """What linearize.json says of a stage; `like` is a folder of the student's architecture."""
        told = {
            "name": self.recipe.name,
            "source": self.recipe.source,
            "stage": self.folders[index].name,
            "spec": self.specs[index],
            "teacher": self.teacher_identity,
        }
        return {"recipe": told, "architecture": guards.architecture(like)}

    def convert(self, dry_run: bool = False) -> None:
        from ..convert import convert_folder

        folder = self.folders[0]
        # Made under another name: it is whole when linearize.json tells of the recipe.
        partial = folder.with_name(f".{folder.name}")
        if not dry_run:
            shutil.rmtree(partial, ignore_errors=True)
        options = self.recipe.conversion() | {"dtype": self.dtype, "device": self.device, "command": self.command}
        planned = convert_folder(self.source, options.pop("to"), partial, dry_run=True, **options)
        if self.recipe.stages and not planned.swapped:
            raise UsageError(
                f"the recipe {self.recipe.name} trains mixers, and convert.keep_softmax "
                f"{self.recipe.convert.get('keep_softmax')} leaves no layer one: keep fewer"
            )
        if dry_run:
            return
        convert_folder(self.source, self.recipe.convert["to"], partial, **options)
        record = provenance.read(partial) or {}
        provenance.write(partial, {**record, **self._facts(0, partial)})
        partial.rename(folder)

    def teacher(self) -> Any:
        if self._teacher is None:
            # what is sharded comes from host memory
            device = "cpu" if processes.sharded() else self.device
            self._teacher = load_model(self.source, dtype=self.dtype, device=device)
        return self._teacher

    def train(self, index: int, stage: Stage) -> None:
        from ..distill import distill, finetune

        parent, folder = self.folders[index - 1], self.folders[index]
        log = _log_of(parent)
        watch = self._watch(index, stage, log)
        common: dict[str, Any] = {
            "output": folder,
            "resume": True,
            "text_field": stage.text_field,
            "isolate": stage.isolate,
            "dtype": self.dtype,
            "command": self.command,
            "recipe": RecipeStage(name=stage.name, watch=watch, facts=self._facts(index, parent), earlier=tuple(log)),
        }
        common[stage.kind] = stage.options
        if stage.kind == "finetune":
            self._teacher = None  # nothing asks for it, and it takes memory
            finetune(str(parent), stage.dataset, **common)
        else:
            distill(str(parent), self.teacher(), stage.dataset, stage=stage.kind, **common)

    def _watch(self, index: int, stage: Stage, log: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None] | None:
        """Who reads the first KL of a logits stage; what the student had at the start is measured when first needed."""
        if index == 1 and not _has_kl(stage) and any(_has_kl(later) for later in self.recipe.stages):
            self.agree(lambda: self._measure_start(stage))
        if not _has_kl(stage):
            return None
        earlier = [before for before in self.recipe.stages[: index - 1] if _has_kl(before)]
        last = None
        # Where more layers run their mixer than before, the KL rises by itself.
        if earlier and _active(earlier[-1]) == _active(stage) and _temperature(earlier[-1]) == _temperature(stage):
            last = guards.last_kl(log, earlier[-1].name)
        return guards.first_kl_watch(stage.name, last=last, start=self.state.get("start_kl"), warn=self.say)

    def _measure_start(self, stage: Stage) -> None:
        if "start_kl" in self.state:
            return
        from ..distill.feed import packed

        options = stage.options
        few = with_overrides(options, {"tokens": options.batch_size * options.max_length})
        tokenizer = load_tokenizer(str(self.folders[0]))
        rows = packed(stage.dataset, tokenizer, few, isolate=stage.isolate, text_field=stage.text_field)
        student = load_student(str(self.folders[0]), dtype=self.dtype, device=self.teacher().device)
        self.state["start_kl"] = guards.kl_of(student, self.teacher(), rows)
        self._save_state()

    # -- what is told

    def planned(self, index: int) -> StageRun:
        stage = self.recipe.stages[index - 1] if index else None
        return StageRun(
            name=stage.name if stage else "convert",
            kind=stage.kind if stage else "convert",
            folder=str(self.folders[index]),
            tokens=(stage.options.tokens or 0) if stage else 0,
        )

    def result(self, index: int) -> StageRun:
        facts = self.state["stages"].get(self.folders[index].name, {})
        known = {key: facts[key] for key in ("steps", "tokens", "loss", "seconds") if key in facts}
        return StageRun(**{**asdict(self.planned(index)), **known})


def _state(path: Path) -> dict[str, Any]:
    """What a run wrote of itself. Raises UserError where it is damaged."""
    advice = "remove it: the folders' own records remain"
    state = read_object(path, advice)
    stages = state.get("stages")
    figures = [state.get("start_kl")]
    for facts in stages.values() if isinstance(stages, dict) else [None]:
        if not isinstance(facts, dict) or not isinstance(facts.get("hash"), str):
            raise UserError(f"{path} is damaged; {advice}")
        figures += [facts.get(name) for name in ("steps", "tokens", "loss", "seconds")]
    if not all(figure is None or type(figure) in (int, float) for figure in figures):
        raise UserError(f"{path} is damaged; {advice}")
    return state


def _has_kl(stage: Stage) -> bool:
    return isinstance(stage.options, LogitOptions) and stage.options.ce_weight < 1


def _active(stage: Stage) -> str | None:
    return getattr(stage.options, "active", None)


def _temperature(stage: Stage) -> float:
    return getattr(stage.options, "temperature", 1.0)


def _log_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG_FILE
    return read_lines(path) if path.is_file() else []
