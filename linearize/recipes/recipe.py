"""A recipe: how to convert, and the stages of training, as data. See the files beside this one for the format."""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..distill.options import KINDS, FinetuneOptions, TrainOptions
from ..errors import UsageError
from ..paths import expanded
from . import document

FOLDER = Path(__file__).parent
STAGE_KINDS: dict[str, type[TrainOptions]] = {**KINDS, "finetune": FinetuneOptions}
_TOP: dict[str, Any] = {
    "name": str,
    "source": str,
    "summary": str,
    "mixer": str | list,
    "convert": dict,
    "dataset": str | None,
    "text_field": str,
    "isolate": bool,
    "tokens": int | None,
    "seed": int,
    "stages": list,
    "per_mixer": dict,
    "with_softmax": dict,
}
_CONVERT: dict[str, Any] = {
    "to": str,
    "window": int | None,
    "sinks": int | None,
    "keep_softmax": str | list | None,
    "keep_window": int | None,
    "mixer_options": dict[str, Any] | None,
    "calibrate": bool | str | None,
    "calibrate_options": dict[str, Any] | None,
    "keep_score": str | None,
}
_STAGE: dict[str, Any] = {"name": str, "kind": str, "share": float, "dataset": str, "text_field": str, "isolate": bool}
# The run says where, and its result is always a plain model.
_NOT_A_RECIPES = ("device", "merge")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: its kind, that kind's options (tokens and seed among them), and its text."""

    name: str
    kind: str
    options: TrainOptions
    dataset: str
    text_field: str
    isolate: bool

    def to_dict(self, whole: bool = True) -> dict[str, Any]:
        """Plain data; without `whole` only the options that are not the kind's defaults."""
        options = {key: value for key, value in self.options.record().items() if key not in _NOT_A_RECIPES}
        if not whole:
            defaults = {entry.name: entry.default for entry in fields(self.options)}
            options = {key: value for key, value in options.items() if value != defaults[key] and value != {}}
        text = {"dataset": self.dataset, "text_field": self.text_field, "isolate": self.isolate}
        return {"name": self.name, "kind": self.kind, **text, **options}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with every key settled; `convert` holds the arguments of the conversion as plain data."""

    name: str
    source: str
    summary: str
    convert: dict[str, Any]
    stages: list[Stage]
    seed: int

    def conversion(self) -> dict[str, Any]:
        """The keyword arguments of `convert_folder`."""
        options = _calibration(self.convert.get("calibrate_options", {}), self.seed)
        return {**self.convert, "calibrate_options": options, "seed": self.seed}

    def to_dict(self, whole: bool = True) -> dict[str, Any]:
        head = {key: value for key, value in asdict(self).items() if key != "stages"}
        return {**head, "stages": [stage.to_dict(whole) for stage in self.stages]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(whole=False), sort_keys=False, width=110, allow_unicode=True)


def shipped() -> dict[str, str]:
    """Names of the recipes that come with the package, each with a line about it."""
    return {path.stem: str(document.read(path).get("summary", "")) for path in sorted(FOLDER.glob("*.yaml"))}


def find(recipe: str | Path) -> Path:
    """The file of a shipped recipe's name, or of a path. Raises UsageError, with the nearest name, for neither."""
    names = [file.stem for file in sorted(FOLDER.glob("*.yaml"))]
    if str(recipe) in names:
        return FOLDER / f"{recipe}.yaml"
    path = expanded(recipe)
    if path.is_file():
        return path
    near = difflib.get_close_matches(str(recipe), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UsageError(
        f"RECIPE: there is no recipe or file {str(recipe)!r}{hint} There are: {', '.join(names)}; or give the path of "
        "a YAML file"
    )


def load(
    recipe: str | Path,
    settings: Iterable[str] | Mapping[str, Any] = (),
    *,
    dataset: str | None = None,
    tokens: int | None = None,
    device: str | None = None,
) -> Recipe:
    """Reads a recipe and settles every key of it.

    Args:
        recipe: a shipped recipe's name, or the path of a file.
        settings: dotted paths with values, as `--set` has them; `stages.*.KEY` is every stage that knows KEY.
        dataset, tokens: take the place of the recipe's own.

    Raises:
        UsageError: an unknown key, a value of the wrong type or out of range, no data, too few tokens for a stage.
    """
    path = find(recipe)
    where = f"the recipe {path}"
    raw = document.read(path)
    chosen = document.settings_of(settings)
    _check_top(raw, where)
    for given, value in chosen:
        if given in ("convert.to", "convert.keep_softmax"):  # what the recipe's own settings go by
            _set(raw, given, value, "--set")
    to = _mixer(raw, where)
    cases: list[tuple[str, bool, Any]] = []
    for name, overrides in raw.pop("per_mixer", {}).items():
        _check_mixer(str(name))
        cases.append((f"per_mixer.{name}", name == to, overrides))
    cases.append(("with_softmax", bool(raw["convert"].get("keep_softmax")), raw.pop("with_softmax", {})))
    for case, applies, overrides in cases:
        if not isinstance(overrides, dict):
            raise UsageError(f"{where}: {case} must map keys as stages.transfer.learning_rate to values")
        scratch = raw if applies else copy.deepcopy(raw)
        for given, value in overrides.items():
            _set(scratch, str(given), value, f"{where}, {case}")
    for given, value in chosen:
        _set(raw, given, value, "--set")
    if dataset is not None:
        raw["dataset"] = dataset
    if tokens is not None:
        raw["tokens"] = tokens
    seed = raw.get("seed", 0)
    convert = {**raw["convert"], "to": to}
    for key, value in convert.items():
        convert[key] = document.typed(value, _CONVERT[key], f"{where}: convert.{key}")
    calibrate = convert.pop("calibrate", None)
    if calibrate:
        convert["calibrate_on"] = _needs_data(raw) if calibrate is True else calibrate
        convert["text_field"] = raw.get("text_field", "text")
    convert = {key: value for key, value in convert.items() if value is not None}
    _check_conversion(convert, seed, where)
    stages = _stages(raw, seed, device, where)
    _check_windows(convert, stages, where)
    return Recipe(
        name=raw.get("name", path.stem),
        source=raw.get("source", ""),
        summary=raw.get("summary", ""),
        convert=convert,
        stages=stages,
        seed=seed,
    )


def _check_top(raw: dict[str, Any], where: str) -> None:
    document.check_keys(raw, _TOP, where)
    for key, value in raw.items():
        document.typed(value, _TOP[key], f"{where}: {key}")
    for key in ("convert", "stages"):
        if not raw.get(key):
            raise UsageError(f"{where} has no {key}")
    document.check_keys(raw["convert"], _CONVERT, f"{where}, convert")
    names: list[str] = []
    for index, stage in enumerate(raw["stages"]):
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
            raise UsageError(f"{where}: stage {index + 1} has no name")
        name = stage["name"]
        if not name.replace("-", "").replace("_", "").isalnum() or name in (*names, "convert"):
            raise UsageError(
                f"{where}: stage {index + 1} is named {name!r}; a name has letters, digits, - and _, stands once, and "
                "is not 'convert'"
            )
        names.append(name)
        kind = stage.get("kind")
        if not isinstance(kind, str) or kind not in STAGE_KINDS:
            raise UsageError(f"{where}, stage {name}: kind must be one of {', '.join(STAGE_KINDS)}, got {kind!r}")
        document.check_keys(stage, _stage_keys(kind), f"{where}, stage {name}")


def _stage_keys(kind: str) -> dict[str, Any]:
    """Keys of a stage of this kind, with their types."""
    hints = typing.get_type_hints(STAGE_KINDS[kind])
    options = {entry.name: hints[entry.name] for entry in fields(STAGE_KINDS[kind])}
    return {**_STAGE, **{name: hint for name, hint in options.items() if name not in _NOT_A_RECIPES}}


def _set(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Puts `value` at a dotted path of the recipe."""
    top, _, rest = path.partition(".")
    settable = [key for key in _TOP if key not in ("per_mixer", "with_softmax", "mixer")]
    document.check_keys([top], settable, where)
    if top == "convert":
        key, _, inner = rest.partition(".")
        document.check_keys([key], _CONVERT, f"{where} convert")
        if inner and key == "mixer_options":
            raw["convert"]["mixer_options"] = {**(raw["convert"].get(key) or {}), inner: value}
        elif inner and key == "calibrate_options":
            raw["convert"][key] = {**(raw["convert"].get(key) or {}), inner: value}
        elif inner:
            raise UsageError(f"{where}: {path} goes too deep; convert.{key} is one value")
        else:
            raw["convert"][key] = document.typed(value, _CONVERT[key], f"{where} {path}")
    elif top == "stages":
        name, _, key = rest.partition(".")
        stages = {stage["name"]: stage for stage in raw["stages"]}
        document.check_keys([name], ["*", *stages], f"{where} stages")
        aims = [
            stage
            for stage in (stages.values() if name == "*" else [stages[name]])
            if name != "*" or key in _stage_keys(stage["kind"])
        ]
        if key in ("name", "kind"):
            raise UsageError(f"{where}: {path} makes it another recipe; write it in a file of your own")
        if not aims:
            document.check_keys([key], {k: 0 for s in stages.values() for k in _stage_keys(s["kind"])}, where)
        for stage in aims:
            keys = _stage_keys(stage["kind"])
            document.check_keys([key], keys, f"{where} stages.{stage['name']}")
            stage[key] = document.typed(value, keys[key], f"{where} {path}")
            if key in ("tokens", "share"):  # each says how much
                stage.pop("share" if key == "tokens" else "tokens", None)
    elif rest:
        raise UsageError(f"{where}: {path} goes too deep; {top} is one value")
    else:
        raw[top] = document.typed(value, _TOP[top], f"{where} {path}")


def _check_conversion(convert: dict[str, Any], seed: int, where: str) -> None:
    """Raises UsageError for a score that there is none of, and for unknown options of the calibration."""
    from ..calibrate import METHODS

    if convert.get("keep_score", METHODS[0]) not in METHODS:
        raise UsageError(f"{where}: convert.keep_score must be one of {', '.join(METHODS)}")
    _calibration(convert.get("calibrate_options", {}), seed, where)


def _check_windows(convert: dict[str, Any], stages: list[Stage], where: str) -> None:
    """Raises UsageError for what the stages themselves would refuse, after the conversion."""
    from ..surgery.student import DEFAULT_WINDOW

    window = convert.get("window", DEFAULT_WINDOW)
    for stage in stages:
        if stage.options.window_dropout and not window:
            raise UsageError(f"{where}, stage {stage.name}: window_dropout needs windows, and convert.window is 0")
        if stage.kind in ("transfer", "mixing", "blocks") and window and stage.options.max_length <= window:
            raise UsageError(
                f"{where}, stage {stage.name}: max_length {stage.options.max_length} is no longer than convert.window "
                f"{window}: the linear branch would see nothing to learn from"
            )


def _calibration(options: dict[str, Any], seed: int, where: str = "the recipe") -> Any:
    """The calibration's own options. UsageError for what they do not know or allow."""
    from ..calibrate import CalibrateOptions

    hints = {name: hint for name, hint in typing.get_type_hints(CalibrateOptions).items() if name != "seed"}
    where = f"{where}, convert.calibrate_options"
    document.check_keys(options, hints, where)
    told = {name: document.typed(value, hints[name], f"{where}.{name}") for name, value in options.items()}
    return CalibrateOptions(seed=seed, **told)


def _check_mixer(name: str) -> None:
    from ..surgery.student import check_mixer

    check_mixer(name)


def _mixer(raw: dict[str, Any], where: str) -> str:
    """`convert.to`, when the recipe is for that mixer."""
    to = raw["convert"].get("to")
    if not isinstance(to, str):
        raise UsageError(f"{where}: convert.to must name a mixer, got {to!r}")
    _check_mixer(to)
    fits = raw.get("mixer", "any")
    fits = [fits] if isinstance(fits, str) else fits
    if "any" not in fits and to not in fits:
        raise UsageError(f"{where} is for {', '.join(map(str, fits))}, not for {to}; copy it to a file of your own")
    return to


def _needs_data(raw: dict[str, Any]) -> str:
    if not raw.get("dataset"):
        raise UsageError("the recipe names no data: pass --dataset")
    return str(raw["dataset"])


def _stages(raw: dict[str, Any], seed: int, device: str | None, where: str) -> list[Stage]:
    budget = _tokens(raw, where)
    made: list[Stage] = []
    used: dict[str, int] = {}
    for entry in raw["stages"]:
        name, kind = entry["name"], entry["kind"]
        keys = _stage_keys(kind)
        here = f"{where}, stage {name}"
        values = {key: document.typed(value, keys[key], f"{here}: {key}") for key, value in entry.items()}
        text = {
            key: values.pop(key, raw.get(key, default)) for key, default in (("text_field", "text"), ("isolate", False))
        }
        dataset = values.pop("dataset", None) or _needs_data(raw)
        values |= {"tokens": budget[name], "device": device}
        if kind == "finetune":
            values["merge"] = True
        options = {key: value for key, value in values.items() if key not in _STAGE}
        options.setdefault("seed", seed)
        options.setdefault("skip_tokens", used.get(dataset, 0))
        try:
            chosen = STAGE_KINDS[kind](**options)
        except UsageError as error:
            raise UsageError(f"{here}: {error}") from None
        least = chosen.batch_size * chosen.gradient_accumulation * chosen.max_length
        if budget[name] < least:
            raise UsageError(
                f"{here}: its share is {budget[name]} tokens, less than one step of {least} (batch_size "
                f"{chosen.batch_size} x max_length {chosen.max_length} x gradient_accumulation "
                f"{chosen.gradient_accumulation}); raise --tokens, or --set stages.{name}.max_length or .batch_size"
            )
        used[dataset] = used.get(dataset, 0) + budget[name]
        made.append(Stage(name=name, kind=kind, options=chosen, dataset=dataset, **text))
    return made


def _tokens(raw: dict[str, Any], where: str) -> dict[str, int]:
    """Tokens of each stage: its own, or its share of what the others leave of the budget."""
    total = raw.get("tokens")
    if total is not None and total <= 0:
        raise UsageError(f"--tokens must be positive, got {total}")
    fixed: dict[str, int] = {}
    shares: dict[str, float] = {}
    for stage in raw["stages"]:
        own, share = stage.get("tokens"), stage.get("share")
        if (own is None) == (share is None):
            raise UsageError(
                f"{where}, stage {stage['name']}: give it a share of the tokens, or tokens, one of the two"
            )
        number = own if share is None else share
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise UsageError(f"{where}, stage {stage['name']}: share and tokens are positive numbers, got {number!r}")
        if share is None:
            fixed[stage["name"]] = int(own)
        else:
            shares[stage["name"]] = float(share)
    if not shares:
        return fixed
    if total is None:
        raise UsageError(f"{where} has shares of a number of tokens that it does not name: pass --tokens")
    left = total - sum(fixed.values())
    if left <= 0:
        raise UsageError(f"--tokens {total}: the stages {', '.join(fixed)} take {sum(fixed.values())} alone; give more")
    return fixed | {name: max(int(left * share / sum(shares.values())), 1) for name, share in shares.items()}
