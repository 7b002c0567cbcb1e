"""What a converted model is, as rows of a table: its teacher, mixers, what stays softmax, and what a sequence holds."""

from __future__ import annotations

from typing import Any

from .. import public
from ..convert.show import ranges, size
from .facts import Facts
from .markdown import plain


def student_rows(facts: Facts, named: str) -> list[tuple[str, Any]]:
    """What and its value; `named` is the teacher's name as the page writes it."""
    rows: list[tuple[str, Any]] = [("teacher", _teacher(facts, named))]
    rows += [(f"mixer `{name}`", f"layers {', '.join(ranges(layers))}") for name, layers in facts.mixers.items()]
    options = {name: value for name, value in facts.options.items() if name not in ("window", "sinks")}
    if facts.mixers:
        rows.append(("window, keys of exact softmax", facts.options.get("window", "not recorded")))
        rows.append(("sinks, first tokens always visible", facts.options.get("sinks", "not recorded")))
    if options:
        rows.append(("other options of the mixer", ", ".join(f"{name} {value}" for name, value in options.items())))
    rows.append(("stays softmax", _kept(facts)))
    rows.append(("parameters", f"{facts.parameters:,}, of them new {facts.new_parameters:,}; {facts.dtype}"))
    held = facts.costs
    if held is not None and held.state_bytes is not None and held.kv_bytes_per_token is not None:
        told = f"a state of {size(held.state_bytes)}, and {size(held.kv_bytes_per_token)} of KV a token"
        theirs = held.kv_bytes_per_token_teacher
        rows.append(("a sequence holds", told + (f" (the teacher's: {size(theirs)})" if theirs is not None else "")))
    return rows


def _teacher(facts: Facts, named: str) -> str:
    teacher = facts.teacher
    if teacher.name is None:
        return "not recorded"
    parts = [named]
    if teacher.gguf_file:
        parts.append(f"its {public.cut(teacher.gguf_file)}")
    if teacher.hub_id is not None:
        parts.append(f"revision {teacher.revision}" if teacher.revision else "revision not recorded")
        if teacher.commit and teacher.commit != teacher.revision:
            parts[-1] = f"revision {teacher.revision or 'main'} (commit {teacher.commit})"
    else:
        parts.append("a local folder" + (f", sample hash {teacher.hash[:16]}" if teacher.hash else ""))
    return ", ".join(parts)


def _kept(facts: Facts) -> str:
    kept = facts.kept
    parts = []
    if kept.layers:
        parts.append(f"layers {', '.join(ranges(kept.layers))}")
    if kept.heads:
        names = ", ".join(f"{layer}.{head}" for layer, heads in kept.heads.items() for head in heads)
        seen = "" if kept.window is None else f", which see the last {kept.window:,} keys"
        parts.append(f"query heads {names} (layer.head){seen}")
    if not parts:
        return "nothing beside the window"
    scores = facts.measured.scores
    chosen = f", chosen by measured scores ({plain(str(scores.get('method')))})" if scores else ""
    return f"{'; '.join(parts)}: {kept.groups} of {kept.groups_in_all} key groups have a KV cache{chosen}"
