"""MODEL: from a Hub id, a folder or a GGUF file to config, weights and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from .checkpoint_files import INDEX, SINGLE, block_sizes, check_folder, gguf_names, shards_of
from .errors import UsageError, UserError, one_line
from .gguf_model import gguf_config, gguf_tokenizer, load_gguf
from .json_files import read_object
from .load_errors import said_clearly
from .paths import expanded

DTYPES: dict[str, str | torch.dtype] = {
    **{"auto": "auto", "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16},
    **{"bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16},
}
# Parts that a config counts, each a module or more of its own.
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
_MOST = 10_000
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_AT = re.compile(r"(?P<model>\w[\w.-]*(/\w[\w.-]*)?)@(?P<revision>[\w./-]+)")


@dataclass(frozen=True)
class ModelSource:
    """What a person calls a model: a Hub id, a folder, a .gguf file, or `gguf_file` in a folder or Hub id.

    A Hub id may bring its revision, `owner/name@REVISION`: where a verb takes several models, each its own.

    Raises:
        UsageError: two revisions are named that differ.
    """

    model: str
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        found = _AT.fullmatch(self.model)
        if found is None or Path(self.model).exists():
            return
        if self.revision not in (None, found["revision"]):
            raise UsageError(f"--revision {self.revision}: {self.model} names another already; leave one of them out")
        object.__setattr__(self, "model", found["model"])
        object.__setattr__(self, "revision", found["revision"])

    @property
    def label(self) -> str:
        """How results name it: two revisions of one model differ."""
        return self.model if self.revision is None or Path(self.model).exists() else f"{self.model}@{self.revision}"

    @classmethod
    def of(cls, model: str | Path | ModelSource) -> ModelSource:
        return model if isinstance(model, ModelSource) else cls(str(model))

    def describe(self) -> dict[str, str]:
        """Plain data for `linearize.json`."""
        facts = {"model": self.model, "revision": self.revision, "gguf_file": self.gguf_file}
        return {name: value for name, value in facts.items() if value is not None}


@dataclass(frozen=True)
class _Place:
    """A source resolved: a Hub id or a folder to give to transformers, and what is special about it."""

    repo: str
    folder: Path | None = None
    gguf: Path | None = None
    config_file: Path | None = None


def load_config(src: str | Path | ModelSource) -> PreTrainedConfig:
    """The model's config. Needs no weights: a folder with config.json alone, or the file itself, is enough.

    Raises:
        UserError: there is no model there, or transformers does not know its kind.
    """
    src = ModelSource.of(src)
    place = _resolve(src)
    with said_clearly("reading the config of", src.model, src.revision):
        if place.gguf is not None:
            return gguf_config(place.gguf)
        if base := _adapter_base(src, place):
            return load_config(base)
        where = place.repo if place.config_file is None else str(place.config_file)
        return _of_a_size(AutoConfig.from_pretrained(where, **_remote(src)), src)


def _of_a_size(config: Any, src: ModelSource) -> PreTrainedConfig:
    """The config, if a model of so many modules can be built at all: a wrong number would take hours and memory."""
    for name in _COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and not -1 <= count <= _MOST:
            raise UserError(f"{src.model}: its config.json says {name}: {count}; download it again")
    return config


def load_model(
    src: str | Path | ModelSource,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The causal language model in eval mode, in the checkpoint's dtype unless `dtype` says otherwise.

    A GGUF file is dequantised ("auto": fp32, or bf16 where the file is) into a plain model that can be saved.
    A folder with a LoRA adapter gives its base model with the adapter merged.

    Raises:
        UserError: no model, no or damaged or too few weights, no causal language model, no such device.
        UsageError: an unknown `dtype` or `device`.
    """
    src = ModelSource.of(src)
    dtype, device = parse_dtype(dtype), parse_device(device)
    place = _resolve(src)
    if place.config_file is not None:
        raise UserError(f"{src.model} is a config alone, without weights; give the folder or the Hub id of a model")
    if place.gguf is not None:
        dense: Any = bounding(load_gguf(place.gguf, dtype))
        return dense.to(device)
    if base := _adapter_base(src, place):
        return _merge_adapter(load_model(base, dtype=dtype, device=device), place)
    if place.folder is not None:
        check_folder(place.folder)
        load_config(src)
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    with said_clearly("loading", src.model, src.revision):
        found: Any = AutoModelForCausalLM.from_pretrained(
            place.repo, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **_remote(src)
        )
    model, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{src.model}: the weights lack {len(missing)} tensors of its config's ({missing[0]}, ...): "
            "the checkpoint is not whole, or its config.json belongs to another model; download it again"
        )
    if place.folder is None:
        model._hub_commit = _cached_commit(src)
    return bounding(model.eval())


def bounding(model: PreTrainedModel) -> PreTrainedModel:
    """The model with attention that bounds its logits where its config has a bound: older transformers take sdpa for
    Gemma 2, which leaves the bound out."""
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def weights_folder(src: str | Path | ModelSource) -> Path | None:
    """The folder with a model's safetensors, which are fetched from the Hub where need be; None for what is loaded in
    another way: a GGUF file, an adapter, a config alone, a model on the Hub that has no safetensors.

    Raises:
        UserError: there is no such model, or it cannot be fetched, or its index names files outside its folder.
    """
    src = ModelSource.of(src)
    place = _resolve(src)
    if place.gguf is not None or place.config_file is not None or _adapter_base(src, place) is not None:
        return None
    if place.folder is not None:
        return place.folder
    with said_clearly("downloading", src.model, src.revision):
        single = cached_file(src.model, SINGLE, revision=src.revision, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return Path(single).parent
        index = cached_file(src.model, INDEX, revision=src.revision, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return None
        folder = Path(index).parent
        for shard in shards_of(Path(index)):
            cached_file(src.model, shard, revision=folder.name)
        return folder


def load_generation_config(src: str | Path | ModelSource) -> GenerationConfig | None:
    """The model's generation config as loading it would give; None where its files say nothing of generation.

    Raises:
        UserError: they say something that is none.
    """
    src = ModelSource.of(src)
    place = _resolve(src)
    forms: list[dict[str, Any]] = [{}, {"config_file_name": "config.json", "_from_model_config": True}]
    for options in forms:
        try:
            return GenerationConfig.from_pretrained(place.repo, revision=src.revision or "main", **options)
        except OSError:
            continue
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            file = options.get("config_file_name", "generation_config.json")
            said = f"{type(error).__name__}: {one_line(error, 300)}"
            raise UserError(f"{src.model}: its {file} cannot be read ({said})") from error
    return None


def load_student(
    path: str | Path | ModelSource,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A converted model, always with the installed classes and never with code that lies in its folder.

    Raises:
        UserError: as `load_model`, and for a model that is not converted.
    """
    src = replace(ModelSource.of(path), trust_remote_code=False)
    config = load_config(src)
    if config.model_type != "linearize":
        raise UserError(
            f"{src.model} is not a converted model (its model_type is {config.model_type}); "
            f"convert it first: linearize convert {src.model} --to based -o OUT"
        )
    return load_model(src, dtype=dtype, device=device)


def load_tokenizer(src: str | Path | ModelSource) -> Any:
    """The model's tokenizer with its chat template. Raises UserError when it has none."""
    src = ModelSource.of(src)
    place = _resolve(src)
    if place.config_file is not None:
        raise UserError(f"{src.model} is a config alone, without a tokenizer; give the folder or Hub id of a model")
    if place.gguf is not None:
        return gguf_tokenizer(place.gguf)
    if place.folder is not None and not _tokenizer_files(place.folder):
        if base := _adapter_base(src, place):
            return load_tokenizer(base)
        raise UserError(f"{place.folder} has no tokenizer (no tokenizer.json); copy the tokenizer's files there")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if place.folder is not None and (place.folder / name).exists():
            read_object(place.folder / name, "download the model again")
    with said_clearly("reading the tokenizer of", src.model, src.revision):
        return AutoTokenizer.from_pretrained(place.repo, **_remote(src))


def commit_of(model: Any) -> str | None:
    """The commit on the Hub of a model that `load_model` gave, None for one that is not from there."""
    return getattr(model, "_hub_commit", None)


def _cached_commit(src: ModelSource) -> str | None:
    """The commit that the Hub's cache holds for a revision: its folder's name."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(src.model, "config.json", revision=src.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def folder_of(model: Any, patterns: Sequence[str]) -> Path | None:
    """Where the files of a loaded model lie: its folder, or the Hub's cache, into which those that fit `patterns` are
    fetched. None where neither is known, or the Hub does not answer."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    commit = commit_of(model)
    if commit is None:
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))
    except Exception:  # what a model's history says is worth no failure of a run
        return None


def parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """`--dtype` as transformers takes it; None is auto. Raises UsageError for an unknown name."""
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: unknown {dtype!r}; there are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | torch.device) -> torch.device:
    """`--device`, if it is there. Raises UsageError for what names no device, UserError for an absent one."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device: {device!r} is no device; try cpu or cuda") from error
    try:
        # with its number: safetensors takes "cuda" for the first, whichever one this process is to use
        return torch.empty(1, device=found).device
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"--device: {device} cannot be used here ({first}); pass --device cpu") from error


def _tokenizer_files(folder: Path) -> list[Path]:
    return [path for pattern in ("*token*", "*vocab*", "*.model") for path in folder.glob(pattern)]


def _remote(src: ModelSource) -> dict[str, Any]:
    # An explicit False: without it transformers asks at the terminal.
    return {"revision": src.revision, "trust_remote_code": src.trust_remote_code}


def _resolve(src: ModelSource) -> _Place:
    """Where the source is. Downloads the file when it is a GGUF on the Hub."""
    path = expanded(src.model)
    if path.is_dir():
        return _resolve_folder(src, path)
    if path.is_file():
        if src.gguf_file is not None:
            raise UsageError(f"--gguf-file: {path} is a file already; give its folder, or leave --gguf-file out")
        if path.suffix == ".gguf":
            return _Place(str(path.parent), path.parent, gguf=path)
        if path.suffix == ".json":
            return _Place(str(path.parent), path.parent, config_file=path)
        raise UserError(
            f"{path} is not a model: a MODEL is a Hub id, a folder with config.json and safetensors, or a .gguf file"
        )
    looks_local = src.model.startswith((".", "/", "~")) or src.model.endswith((".gguf", ".json"))
    if looks_local or not _HUB_ID.fullmatch(src.model):
        raise UserError(
            f"{src.model}: there is no such file or folder, and it is no Hub id (owner/name); check the path"
        )
    if src.gguf_file is None:
        return _Place(src.model)
    block_sizes()  # tells before a long download that the gguf package is missing
    with said_clearly("downloading", src.model, src.revision):
        from huggingface_hub import hf_hub_download

        local = Path(hf_hub_download(src.model, src.gguf_file, revision=src.revision))
    return _Place(str(local.parent), local.parent, gguf=local)


def _resolve_folder(src: ModelSource, folder: Path) -> _Place:
    present = gguf_names(folder)
    if src.gguf_file is not None:
        gguf = folder / src.gguf_file
        if not gguf.is_file():
            instead = f"; it has {', '.join(present)}" if present else ", nor any other .gguf file"
            raise UserError(f"--gguf-file: {folder} has no {src.gguf_file}{instead}")
        return _Place(str(gguf.parent), gguf.parent, gguf=gguf)
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return _Place(str(folder), folder)
    if present:
        raise UserError(
            f"{folder} has no config.json but GGUF files ({', '.join(present[:3])}): pass one with "
            f"--gguf-file {present[0]}"
        )
    raise UserError(
        f"{folder} is not a model: it has no config.json; a MODEL is a Hub id, a folder with config.json and "
        "safetensors, or a .gguf file"
    )


def _adapter_base(src: ModelSource, place: _Place) -> ModelSource | None:
    """The base model of a folder that holds a LoRA adapter and no model of its own."""
    if place.folder is None or place.config_file is not None or (place.folder / "config.json").is_file():
        return None
    path = place.folder / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_object(path, "save the adapter again").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} names no base model (base_model_name_or_path); merge the adapter where it was made")
    if (Path(base) / path.name).is_file() and not (Path(base) / "config.json").is_file():
        raise UserError(f"{path}: its base model {base} is an adapter too; merge that one first")
    return ModelSource(base)  # code that a person trusts is the adapter's, and not of whatever base it names


def read_for(model: Any) -> list[str]:
    """What of this machine may be read for a MODEL, a `ModelSource` or a loaded one: itself, and an adapter's base."""
    name = model.model if isinstance(model, ModelSource) else getattr(model, "name_or_path", model)
    if not isinstance(name, str | Path):
        return []
    folder = expanded(name)
    base = _adapter_base(ModelSource(str(folder)), _Place(str(folder), folder))
    return [str(name)] if base is None else [str(name), base.model]


def _merge_adapter(base: PreTrainedModel, place: _Place) -> PreTrainedModel:
    from peft import PeftModel

    assert place.folder is not None
    if not (place.folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{place.folder} has no adapter_model.safetensors, and pickles are not loaded; save the adapter again with "
            "peft's save_pretrained"
        )
    with said_clearly("loading the adapter", place.repo):
        return PeftModel.from_pretrained(base, place.repo).merge_and_unload().eval()
