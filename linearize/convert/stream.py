"""Surgery on a checkpoint larger than memory: from file to file, tensor by tensor.

Most of a student is its teacher's, under the same names, and is copied as bytes. What is new is made a layer at a time,
after that layer's proof. The files are those that `save_pretrained` would write of the student in memory, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .. import provenance, stored
from ..checkpoint_files import INDEX
from ..modeling import AttentionAnatomy, LinearizeForCausalLM
from ..stored import Stored, stored_tensors, tensors_of
from ..surgery.anatomy import read_anatomy
from ..surgery.layerwise import prove_layerwise, started_mixer, without_weights
from ..surgery.proof import Call
from ..surgery.student import student_config
from .origins import NotPlain, Origins, origins


@dataclass(frozen=True)
class Streamed:
    """A conversion that is ready to be written: teacher and student have no weights."""

    folder: Path
    teacher: PreTrainedModel
    student: LinearizeForCausalLM
    origins: Origins

    def key(self, **facts: Any) -> str:
        """Tells conversions apart that would write other bytes; `facts` is plain data."""
        files = {tensor.path for tensor in self.origins.sources.values() if tensor is not None}
        stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        made_of = [provenance.parent_hash(self.folder), stamps, self.student.config.to_dict()]
        said = [*made_of, provenance.versions(), facts]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def streamed(
    folder: Path, config: PreTrainedConfig, to: str, *, dtype: str | torch.dtype = "auto", **options: Any
) -> Streamed | None:
    """The conversion of the safetensors in `folder`; None where the model must be loaded for it, because it is
    quantised, or because its files hold other tensors than it saves.

    Raises:
        UserError: damaged, missing or wrong files and tensors.
        UsageError: as `student_config`.
    """
    tensors = stored_tensors(folder)
    if getattr(config, "quantization_config", None) is not None:
        return None
    chosen = dtype if isinstance(dtype, torch.dtype) else _own_dtype(config, tensors)
    if chosen not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return None
    config.dtype = chosen
    teacher = without_weights(config, chosen)
    with torch.device("meta"):
        student = LinearizeForCausalLM(student_config(teacher, to, **options))
    try:
        return Streamed(folder, teacher, student, origins(teacher, student, tensors, chosen))
    except (NotPlain, ImportError):  # what transformers does to names is no public interface of it
        return None


def _own_dtype(config: PreTrainedConfig, tensors: Mapping[str, Stored]) -> torch.dtype | None:
    """What "auto" is: the config's, or that of the first numbers in the first file."""
    if config.dtype is not None:
        return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    first = min(tensor.path for tensor in tensors.values())
    kinds = (tensor.dtype for tensor in sorted(tensors.values(), key=lambda each: each.name) if tensor.path == first)
    return next((kind for kind in kinds if kind is not None and kind.is_floating_point), None)


class ShardFile:
    """One weight file: the teacher's bytes are copied first, then the new tensors are put between them."""

    def __init__(self, origins: Origins, name: str, tensors: Sequence[str]) -> None:
        self.origins, self.name = origins, name
        self.tensors = stored.laid_out({each: origins.saved[each] for each in tensors})

    def copy(self, folder: Path, work: Path, stopping: threading.Event) -> None:
        """Leaves the file in `work` without its new tensors, unless it is there or in `folder`."""
        part, copied = work / f"{self.name}.part", work / f"{self.name}.copied"
        if copied.exists() or (folder / self.name).exists():
            return
        with part.open("wb", buffering=0) as file:
            file.write(stored.header(self.origins.saved, self.tensors))
            position = file.tell()
            for name in self.tensors:
                if stopping.is_set():
                    return
                source, tensor = self.origins.sources[name], self.origins.saved[name]
                if source is not None:
                    file.seek(position)
                    source.copy_to(file, tensor.dtype)
                position += tensor.nbytes
        part.rename(copied)

    def finish(self, folder: Path, work: Path, started: Mapping[str, Stored]) -> None:
        """Moves the file to `folder` with its new tensors, which are in other files by now."""
        copied = work / f"{self.name}.copied"
        if (folder / self.name).exists():
            return
        with copied.open("r+b", buffering=0) as file:
            position = len(stored.header(self.origins.saved, self.tensors))
            for name in self.tensors:
                tensor = self.origins.saved[name]
                if self.origins.sources[name] is None:
                    file.seek(position)
                    started[name].copy_to(file, tensor.dtype)
                position += tensor.nbytes
        copied.rename(folder / self.name)


def write_started(ready: Streamed, work: Path, seed: int) -> None:
    """Proves every layer and leaves its new tensors in `work`, a file a layer; what is there already stays.

    Raises:
        UserError: a module is not the attention that it was read as; see `surgery.proof`.
        NotPlain: the proof needs a tensor that is merged of several.
    """
    done = work / "proven"
    if done.exists():
        return
    swapped = {attention.path: attention for _, attention in ready.student.mixer_layers()}
    anatomies = read_anatomy(ready.teacher)

    def visit(anatomy: AttentionAnatomy, call: Call) -> None:
        if anatomy.path in swapped:
            new = started_mixer(swapped[anatomy.path], ready.teacher, call, seed)
            save_file({name: tensor.contiguous() for name, tensor in new.items()}, work / f"{anatomy.path}.safetensors")

    prove_layerwise(ready.teacher, anatomies, ready.origins.read, ready.origins.mapped, visit)
    done.touch()


def write_student(ready: Streamed, folder: Path, work: Path, *, seed: int, max_shard_size: str) -> None:
    """Writes the weight files and their index; what an earlier call left whole in `folder` and `work` stays.

    Raises:
        UserError, NotPlain: as `write_started`.
    """
    saved = ready.origins.saved
    split = split_state_dict_into_shards_factory(
        saved,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files = [ShardFile(ready.origins, name, names) for name, names in split.filename_to_tensors.items()]
    stopping = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as beside:  # the proof computes, the copying waits for the disk
        try:
            copying = beside.submit(_copy, files, folder, work, stopping)
            write_started(ready, work, seed)
            copying.result()
        finally:
            stopping.set()
    started = {name: tensor for path in work.glob("*.safetensors") for name, tensor in tensors_of(path).items()}
    for file in files:
        file.finish(folder, work, started)
    if len(files) > 1:
        index = {
            "metadata": {"total_parameters": ready.student.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(files: Sequence[ShardFile], folder: Path, work: Path, stopping: threading.Event) -> None:
    for file in logging.tqdm(files, desc="Copying weights"):
        file.copy(folder, work, stopping)


def write_model(ready: Streamed, folder: Path, work: Path, generation: GenerationConfig | None) -> None:
    """Writes what `save_pretrained` writes beside the weights."""
    student: Any = ready.student
    student.generation_config = generation or ready.teacher.generation_config
    student.to(dtype=ready.teacher.dtype)  # without weights: it is what the config says of them
    beside = work / "beside"  # in `folder` it would take the weight files for those of a model that was there before
    beside.mkdir(exist_ok=True)
    student.save_pretrained(beside, state_dict={})
    for path in beside.iterdir():
        path.replace(folder / path.name)
