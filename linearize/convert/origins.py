"""Which tensor of a teacher's files becomes which tensor of the student's, without reading either.

transformers may rename a checkpoint's tensors as it loads them, and merge some (a mixture's experts) that it takes
apart again as it saves. Both are asked of it, for tensors on the meta device; what was merged and comes apart into
what lay in the files is a copy again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..modeling import LinearizeForCausalLM
from ..stored import PIECE, Stored

_FLOATS = ("F64", "F32", "F16", "BF16")


class NotPlain(Exception):
    """The files do not hold the student's tensors under other names at most: the model must be loaded."""


@dataclass(frozen=True)
class Origins:
    """By a tensor's name in the teacher: where it lies, as far as it is not merged of several, and the dtype that it
    has once it is loaded. By its name in the student's files, in their order: shape and dtype (on the meta device), and
    where it lies, None for a new one."""

    plain: dict[str, Stored]
    dtypes: dict[str, torch.dtype]
    saved: dict[str, Tensor]
    sources: dict[str, Stored | None]

    def read(self, name: str) -> Tensor:
        """A tensor of the teacher as loading gives it. Raises NotPlain."""
        return self._plain(name).read(self.dtypes[name])

    def mapped(self, name: str) -> Tensor:
        """As `read`, mapped from its file where it lies there as it is."""
        found = self._plain(name)
        return found.mapped() if found.dtype == self.dtypes[name] else self.read(name)

    def _plain(self, name: str) -> Stored:
        if name not in self.plain:
            raise NotPlain(name)
        return self.plain[name]


def origins(
    teacher: PreTrainedModel, student: LinearizeForCausalLM, stored: Mapping[str, Stored], dtype: torch.dtype
) -> Origins:
    """Of a teacher and a student without weights, and the tensors in the teacher's files; `dtype` is the model's.

    Raises:
        UserError: a tensor is missing, of another shape, or of a type that is no number of the model's kind.
        NotPlain: what lies in the files is not what the student saves.
    """
    in_model = _names_in(teacher)
    shapes = teacher.state_dict()
    plain: dict[str, Stored] = {}
    merged: set[str] = set()
    for name, found in stored.items():
        target, renamed = in_model(name)
        if target in shapes and renamed:
            plain[target] = found
        elif target in shapes:
            merged.add(target)
    dtypes = _dtypes(teacher, dtype)
    _tie(teacher, plain)
    saved = _saved(student, dtypes)
    sources: dict[str, Stored | None] = {}
    missing = []
    for name, tensor in saved.items():
        source = plain.get(name) or stored.get(name)
        target = name if source is not None else in_model(name)[0]
        source = source or plain.get(target)
        if ".mixer." in name:
            source = None
        elif source is None and target in merged:
            raise NotPlain(name)
        elif source is None:
            missing.append(name)
        else:
            _check(source, tensor)
        sources[name] = source
    if missing:
        may_miss = teacher._keys_to_ignore_on_load_missing or ()
        if any(re.search(pattern, name) for pattern in may_miss for name in missing):
            raise NotPlain(missing[0])
        where = next(iter(stored.values())).path.parent if stored else "the folder"
        raise UserError(
            f"{where}: the weights lack {len(missing)} tensors of its config's ({', '.join(sorted(missing)[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): the checkpoint is not whole, or its config.json belongs to "
            "another model; download it again"
        )
    return Origins(plain, dtypes, saved, sources)


def _names_in(teacher: PreTrainedModel) -> Any:
    """Gives for a name in the files the name in the model, and whether it is one tensor there as here."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(teacher)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    if len(renamings) + len(converters) != len(transforms):
        raise NotPlain("transforms of another kind")
    prefix, shapes = teacher.base_model_prefix, teacher.state_dict()

    def in_model(name: str) -> tuple[str, bool]:
        found, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if found not in shapes and name in shapes:
            found, pattern = rename_source_key(name, [], [], prefix, shapes)
        return found, pattern is None

    return in_model


def _dtypes(teacher: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What loading in `dtype` makes of each tensor: a family may keep some in fp32."""
    from transformers.core_model_loading import build_glob_alternation

    kinds = {name: tensor.dtype for name, tensor in teacher.state_dict().items()}
    plan = teacher._get_dtype_plan(dtype)
    if plan:
        pattern, groups, _ = build_glob_alternation(list(plan))
        for name in kinds:
            found = pattern.search(name)
            if found is not None and found.lastgroup is not None:
                kinds[name] = plan[groups[found.lastgroup]]
    return kinds


def _tie(teacher: PreTrainedModel, plain: dict[str, Stored]) -> None:
    """Leaves of tied tensors the one that the student saves."""
    for target, source in (teacher.all_tied_weights_keys or {}).items():
        if target in plain and source in plain and not _same(plain[target], plain[source]):
            raise UserError(
                f"{plain[target].path.parent}: config.json ties {target} to {source}, and the weights have two that "
                'differ; if that is how the model was trained, write "tie_word_embeddings": false in its config.json'
            )
        if target in plain:
            plain.setdefault(source, plain[target])
            del plain[target]


def _same(one: Stored, other: Stored) -> bool:
    if (one.kind, one.size) != (other.kind, other.size):
        return False
    if (one.path, one.start) == (other.path, other.start):
        return True
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for position in range(0, one.size, PIECE):
            count = min(PIECE, one.size - position)
            if first.read(count) != second.read(count):
                return False
    return True


def _saved(student: LinearizeForCausalLM, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """What `save_pretrained` would write: names, shapes and dtypes, in its order."""
    from transformers.core_model_loading import revert_weight_conversion

    student.tie_weights()
    tensors = {}
    for name, tensor in student.state_dict().items():
        if name in (student.all_tied_weights_keys or {}):
            continue
        kind = dtypes.get(name, torch.float32 if tensor.is_floating_point() else tensor.dtype)  # new ones are in fp32
        tensors[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
    return revert_weight_conversion(student, tensors)


def _check(source: Stored, tensor: Tensor) -> None:
    if source.shape != tuple(tensor.shape):
        raise UserError(
            f"{source.path}: the tensor {source.name} has the shape {list(source.shape)}, where config.json makes "
            f"{list(tensor.shape)}: its config.json belongs to another model, or the file does; download it again"
        )
    fits = source.kind in _FLOATS if tensor.is_floating_point() else source.dtype == tensor.dtype
    if not fits:
        raise UserError(
            f"{source.path}: the tensor {source.name} is stored as {source.kind}, which cannot become "
            f"{str(tensor.dtype).removeprefix('torch.')}; a model that is quantised must be had as it was before"
        )
