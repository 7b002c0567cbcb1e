"""Which files of a converted folder belong on the Hub; every other is left out by name, with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import provenance
from ..checkpoint_files import check_folder
from ..errors import UserError
from ..json_files import read_object
from . import measured
from .measured import BENCH_FOLDERS, Measured
from .pictures import FOLDER as PICTURES

CARD = "README.md"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_BYTES = 50 * 10**9  # plain HTTP gives no larger file back
_NAMED = {"generation_config.json", "recipe.yaml", provenance.FILE}
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}
_TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
}
_TEMPLATES = "additional_chat_templates/"
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|ATTRIBUTION)(\.(md|txt))?", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
_UNFINISHED = re.compile(r"\..+\.(partial|replaced)-\d+")
_RELATIVE = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import\b|import\s+\.(\w+))", re.MULTILINE)
_FOLDERS = tuple(folder for folder in (*BENCH_FOLDERS, _TEMPLATES, PICTURES) if folder)
_STALE = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|adapter_(config\.json|model\.safetensors)|evaluation\.json|loss\.jsonl"
    r"|(keep_scores|calibration)\.(json|png)|((speed|bench)/)?(model|kernels)\.(json|png)" + rf"|{PICTURES}[\w.-]+\.png"
)


@dataclass(frozen=True)
class Belongings:
    """What goes up (path in the repository -> file here), what stays and why, and what was read on the way. The card
    is in neither: `own_card` is the README.md that lies there. `told` are the files that are records and results, and
    no part of the model."""

    files: dict[str, Path]
    left_out: dict[str, str]
    config: dict[str, Any]
    shards: list[Path]
    measured: Measured
    own_card: Path | None
    told: frozenset[str]


def is_stale(name: str) -> bool:
    """Whether a file of the repository that this push does not have would be loaded in place of what it has, or tells
    of other weights: those, their index, an adapter, the tokenizer's, figures and pictures."""
    return name in (WEIGHTS, INDEX) or name in _TOKENIZER or _STALE.fullmatch(name) is not None


def collect(folder: Path) -> Belongings:
    """Sorts `folder`, which must hold a whole converted model.

    Raises:
        UserError: no such folder, no converted model, a work folder, an adapter, a file that is missing, damaged, a
            link out of the folder, or larger than the Hub takes.
    """
    _check_kind(folder)
    there, left_out = _listing(folder)
    config = _config(folder, there)
    shards = _weights(folder, there, left_out)
    found = measured.read(folder.resolve().name, there)
    belong = {CONFIG, *(INDEX,) * (INDEX in there and shards != [WEIGHTS]), *shards}
    belong |= _code(folder, config, there, left_out)
    belong |= {*found.files, *found.pictures}
    belong |= {name for name in there if name in _NAMED | _TOKENIZER or _TERMS.fullmatch(name)}
    belong |= {name for name in there if name.startswith(_TEMPLATES) and name.endswith(".jinja")}
    belong |= {name for name in there if name.startswith(PICTURES) and name.endswith(".png")}
    for name in sorted(set(there) - belong - {CARD}):
        left_out[name] = found.refused.get(name) or _why(name)
    for name in sorted(belong):
        if there[name].stat().st_size > MOST_BYTES:
            raise UserError(
                f"{folder / name} is larger than the {MOST_BYTES / 1e9:.0f} GB that the Hub gives back in one file: "
                "write smaller ones, as linearize convert --max-shard-size 5GB, or save_pretrained(OUT, "
                "max_shard_size='5GB')"
            )
    return Belongings(
        files={name: there[name] for name in sorted(belong)},
        left_out=dict(sorted(left_out.items())),
        config=config,
        shards=[there[name] for name in shards],
        measured=found,
        own_card=there.get(CARD),
        told=frozenset(belong & {*found.files, "recipe.yaml", provenance.FILE}),
    )


def _check_kind(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the OUT of linearize convert, distill, finetune or run")
    if _UNFINISHED.fullmatch(folder.resolve().name):
        raise UserError(f"{folder} is half written: run the command that was making it again, and push its OUT")
    if (folder / CONFIG).is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds a LoRA adapter, which names a folder of this machine as its base: merge it, with "
            "linearize finetune --merge, and push that folder"
        )
    if (folder / "recipe.json").is_file() or (folder / "run.json").is_file() or any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{folder} is the work folder of an unfinished run: finish it with --resume, and push the OUT that it makes"
        )
    raise UserError(f"{folder} has no {CONFIG}: give the OUT of linearize convert, distill, finetune or run")


def _listing(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Plain files of the folder, and of the sub-folders that may hold any that belong; and what is neither."""
    there: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    root = folder.resolve()
    for place in ("", *_FOLDERS):
        inside = folder / place
        if place and (not inside.is_dir() or inside.is_symlink()):
            continue
        for path in sorted(inside.iterdir()):
            name = f"{place}{path.name}"
            if path.name.startswith("."):
                left_out[name] = "hidden"
            elif path.is_symlink() and not _inside(path, root):
                left_out[name] = "a link to something outside the folder"
            elif path.is_dir():
                if place or f"{name}/" not in _FOLDERS or path.is_symlink():
                    left_out[f"{name}/"] = _why_folder(path)
            elif not path.is_file():
                left_out[name] = "no plain file"
            elif path.name.lower().endswith(_PICKLES):
                left_out[name] = "a pickle or the like, which can run code when it is loaded"
            else:
                there[name] = path
    return there, left_out


def _inside(path: Path, root: Path) -> bool:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # it leads round
        return False
    return root in target.parents and not any(part.startswith(".") for part in target.relative_to(root).parts)


def _config(folder: Path, there: Mapping[str, Path]) -> dict[str, Any]:
    if CONFIG not in there:
        raise UserError(_link(folder, CONFIG))
    config = read_object(there[CONFIG], "write the folder again")
    kind = config.get("model_type")
    if kind != "linearize":
        raise UserError(
            f"{folder} is no converted model (its model_type is {kind}); convert it first: "
            f"linearize convert {folder} --to based -o OUT"
        )
    if not isinstance(config.get("layers"), list) or not isinstance(config.get("parent_config"), dict):
        raise UserError(f"{there[CONFIG]} lacks layers or parent_config: the folder is not whole; write it again")
    return config


def _weights(folder: Path, there: Mapping[str, Path], left_out: Mapping[str, str]) -> list[str]:
    """The weight files that `from_pretrained` reads, all of them whole."""
    for name in (WEIGHTS, INDEX):
        if name in left_out:
            raise UserError(_link(folder, name))
    try:
        check_folder(folder)
    except UserError as error:
        raise UserError(f"{error}, or make the folder again; nothing was pushed") from error
    if WEIGHTS in there:
        return [WEIGHTS]
    shards = sorted(set(json.loads(there[INDEX].read_text(encoding="utf-8"))["weight_map"].values()))
    for name in shards:
        if name not in there:
            raise UserError(_link(folder, name))
    return shards


def _code(folder: Path, config: Mapping[str, Any], there: Mapping[str, Path], left_out: Mapping[str, str]) -> set[str]:
    """The modules that the config names and those that they import: what `trust_remote_code` runs, and no more."""
    named = config.get("auto_map") or {}
    queue = sorted({f"{str(target).partition('.')[0]}.py" for target in named.values()})
    if not queue:
        raise UserError(f"{folder / CONFIG} names no code (auto_map): save the model again with save_pretrained")
    code: set[str] = set()
    while queue:
        name = queue.pop()
        if name in code:
            continue
        if name in left_out:
            raise UserError(_link(folder, name))
        if name not in there:
            raise UserError(
                f"{folder} lacks {name}, code that the model needs where linearize is not installed: the folder is "
                "half written; make it again, or save the model again with save_pretrained"
            )
        code.add(name)
        text = there[name].read_text(encoding="utf-8")
        queue += [f"{first or second}.py" for first, second in _RELATIVE.findall(text)]
    return code


def _link(folder: Path, name: str) -> str:
    return f"{folder / name} is a link out of the folder, and is not followed: put the file itself there (cp -L)"


def _why(name: str) -> str:
    if name.endswith(".safetensors"):
        return "weights that no index names"
    if name == INDEX:
        return f"{WEIGHTS} is what is loaded"
    if name.endswith(".py"):
        return "code that the model does not import"
    if name in ("trainer_state.json", "run.json", "recipe.json"):
        return "state of a run"
    return "not part of a converted model"


def _why_folder(path: Path) -> str:
    if path.name.startswith("checkpoint-"):
        return "a checkpoint"
    if path.name.endswith(".work") or (path / "run.json").is_file():
        return "a work folder"
    if path.name == "__pycache__":
        return "a cache"
    return "a folder that is not part of a converted model"
