"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .plan import LayerPlan, Plan


def size(count: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _runs(layers: list[LayerPlan]) -> Iterable[tuple[str, LayerPlan]]:
    """Layers that became the same, together: the label of their indices and the first of them."""

    def kind(layer: LayerPlan) -> tuple:
        names = tuple((tensor.name.split(f".{layer.index}.", 1)[-1], tuple(tensor.shape)) for tensor in layer.tensors)
        return layer.mixer, tuple(layer.softmax_heads), names

    groups: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(kind(layer), []).append(layer)
    for members in groups.values():
        yield ", ".join(ranges([layer.index for layer in members])), members[0]


def ranges(indices: list[int]) -> list[str]:
    """Rising indices as a person writes them: 0-3, 7."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]


def format_plan(plan: Plan, *, tensors: bool = True) -> str:
    """The plan's summary, and every kind of tensor with its origin (layers that are alike are shown once)."""
    share = plan.new_parameters / plan.parameters
    options = ", ".join(f"{name} {value}" for name, value in plan.mixer_options.items())
    lines = [
        f"to {plan.mixer} ({options}), {plan.dtype}",
        f"parameters        {plan.parameters:,}, of them new {plan.new_parameters:,} ({share:.2%})",
        f"state a sequence  {size(plan.state_bytes_per_sequence)}, at any length",
        f"KV cache a token  {size(plan.kv_bytes_per_token)}, the teacher's {size(plan.kv_bytes_per_token_teacher)}",
    ]
    if plan.kv_bytes_per_token_teacher > plan.kv_bytes_per_token:
        more = max(plan.state_bytes_per_sequence - plan.state_bytes_per_sequence_teacher, 0)
        tokens = more / (plan.kv_bytes_per_token_teacher - plan.kv_bytes_per_token)
        lines.append(f"smaller than the teacher's cache from {tokens:,.0f} tokens on")
    if plan.placeholder is not None:
        left = plan.kv_bytes_per_token / plan.kv_bytes_per_token_teacher
        told = f"{left:.1%} of the KV bytes, " if left else ""
        lines.append(f"{plan.placeholder}: {told}measured at the conversion; below as many, evenly spread")
    memory, seconds = plan.convert["memory_bytes"], plan.convert["seconds"]
    lines.append(f"convert           about {size(memory)}, {seconds:.0f} s ({plan.convert['assumes']})")
    loaded = size(plan.convert["memory_bytes_loaded"])
    lines.append(f"                  about {loaded} where the model is loaded: --calibrate, auto, --device, GGUF")
    for name, stage in plan.distill["stages"].items():
        fits = "fits one 80 GB GPU" if stage["fits_80_gb"] else "does not fit one 80 GB GPU"
        lines.append(
            f"distill, {name}: about {size(stage['memory_bytes'])} ({fits}), "
            f"{stage['hours_20m_tokens']} h for 20M tokens"
        )
    lines.append(f"  at {plan.distill['batch']} x {plan.distill['length']} tokens; {plan.distill['assumes']}")
    if tensors:
        outside, *layers = plan.layers
        for label, layer in [("outside the layers", outside), *(_runs(layers))]:
            kept = f", softmax heads {', '.join(map(str, layer.softmax_heads))}" if layer.softmax_heads else ""
            kept += f" (of the last {layer.softmax_window} keys)" if layer.softmax_window else ""
            title = label if layer.index < 0 else f"layers {label}: {layer.mixer}{kept}"
            lines += ["", title]
            lines += [f"  {tensor.name}  {tensor.shape}  <- {tensor.origin}" for tensor in layer.tensors]
    return "\n".join(lines)
