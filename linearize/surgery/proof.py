"""The proof that a teacher's attention was read rightly: short forwards, and each module against its own rebuild.

Whatever the names say, a module that computes something else (other positions, another mask, one more part) would make
a student that is silently wrong. So the modules' calls are caught, and each is made again: by the teacher's module, and
by softmax over the queries, keys and values that the student would have. Both in a wide precision and a module at a
time, because the model's own would hide a difference.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..modeling import AttentionAnatomy
from ..modeling.cache import CACHES
from ..modeling.kept import kept_softmax, kept_window
from ..modeling.layout import Layout, forget_layout, read_layout
from ..modeling.projections import Projections
from .anatomy import HOW_TO_ADD
from .parts import ALIBI_SCALES, first, parts_text

# Tokens of a row, the pads on the left of the second, and the sliding window for as long as the proof takes: a longer
# one would not show in so short a text.
TOKENS, PADS, WINDOW = 24, 7, 12
# A wrong part gives 1e-3 and more, rounding 1e-6 (some teachers round their softmax to fp32). What fp32 finds to be ten
# times nearer than it must is proven; fp64, which takes twice as long, says the rest, and fp32 again where a device or
# a family's code has no fp64.
TOLERANCE = 1e-4
PRECISIONS = ((torch.float32, TOLERANCE / 10), (torch.float64, TOLERANCE), (torch.float32, TOLERANCE))
# Logits of a smaller spread would not show what is done to large ones: inputs are made louder, up to so many times.
SPREAD, LOUDEST = 5.0, 10.0
# Implementations that compute in fp64 as they do in bf16; others (flash) give way to the first that knows the logits.
WIDE = ("sdpa", "eager")
# ALiBi is rounded to the model's dtype, or to bf16 whatever that is.
ROUNDED = 2.0**-7


@dataclass
class Call:
    """What an attention module was called with. `norm` is the module in its layer whose output it was given: the norm
    before it, None where there is none."""

    hidden_states: Tensor
    kwargs: dict[str, Any]
    norm: nn.Module | None

    def size(self) -> float:
        """The root mean square of the hidden states of a usual token; a few tokens can be many times larger."""
        return float(self.hidden_states.float().square().mean(-1).sqrt().median())


def proven_calls(teacher: PreTrainedModel, anatomies: Sequence[AttentionAnatomy]) -> list[Call]:
    """The calls of the attention modules in a short text, each anatomy proven on them, and before that at the last
    positions that the teacher has: some families scale their queries from some position on.

    Raises:
        UserError: as `calls_of` and `prove`; the teacher runs an attention that leaves out what bounds its logits.
    """
    if any(anatomy.logit_cap for anatomy in anatomies) and teacher.config._attn_implementation == "sdpa":
        raise UserError(
            f"{type(teacher).__name__} was loaded with sdpa attention, which does not bound its logits as its config "
            "says: load it with attn_implementation='eager'"
        )
    # The beginning comes last: rotary frequencies that follow the text's length are then as they were.
    texts = [calls_of(teacher, anatomies, start) for start in starts_of(teacher)]
    prove(teacher, anatomies, *texts)
    return texts[-1]


def starts_of(teacher: PreTrainedModel) -> list[int]:
    """The positions at which texts start: the last that the teacher has room for, where that can be told, and 0."""
    if "position_ids" not in inspect.signature(type(teacher.base_model).forward).parameters:
        return [0]
    last = max((getattr(teacher.config, "max_position_embeddings", None) or 0) - TOKENS, 0)
    return [last, 0] if last else [0]


@torch.no_grad()
def calls_of(
    teacher: PreTrainedModel,
    anatomies: Sequence[AttentionAnatomy],
    start: int = 0,
    visit: Callable[[AttentionAnatomy, Call], None] | None = None,
) -> list[Call]:
    """One short forward of the teacher on random tokens: the call of each attention module.

    From the first position on they are two rows, the second padded; from another `start` on one row. `visit` is given
    each call as it comes, before the module runs.

    Raises:
        UserError: a module is called in another way than those that are known.
    """
    calls: dict[str, Call] = {}
    made: dict[str, list[tuple[nn.Module, Any]]] = {}

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, output: made.setdefault(path, []).append((module, output))

    def before(path: str, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not modules[path]:  # the proof's copy, on a visit
                return
            named = dict(zip(inspect.signature(type(module).forward).parameters, (module, *args), strict=False))
            x = named.get("hidden_states", kwargs.get("hidden_states"))
            # The students' take the same by position: the input, and the residual where the anatomy has one.
            if set(list(named)[1:]) - {"hidden_states", "residual"} or not isinstance(x, Tensor):
                raise UserError(
                    f"{path} ({type(module).__name__}) is called with {len(args)} positional arguments and "
                    f"{', '.join(kwargs) or 'no others'}, where linearize knows hidden_states and named ones"
                )
            given = {**dict(list(named.items())[1:]), **kwargs}
            rest = {name: value for name, value in given.items() if name != "hidden_states" and name not in CACHES}
            norm = next((child for child, output in made.pop(layer, []) if output is x), None)
            calls[path] = Call(x, rest, norm)
            if visit is not None:
                visit(by_path[path], calls[path])

        return hook

    by_path = {anatomy.path: anatomy for anatomy in anatomies}
    modules = {path: teacher.get_submodule(path) for path in by_path}
    handles = []
    for anatomy in anatomies:
        attention = modules[anatomy.path]
        for child in teacher.get_submodule(anatomy.layer_path).children():
            if child is not attention:
                handles.append(child.register_forward_hook(after(anatomy.layer_path)))
        handles.append(attention.register_forward_pre_hook(before(anatomy.path, anatomy.layer_path), with_kwargs=True))
    implementation, training = teacher.config._attn_implementation, teacher.training
    window = getattr(teacher.config, "sliding_window", None)
    try:
        if window is not None:
            teacher.config.sliding_window = min(window, WINDOW)
        if implementation not in _wide(anatomies):
            teacher.set_attn_implementation(_wide(anatomies)[0])
        teacher.eval()
        teacher.base_model(**_text(teacher, start), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        if window is not None:
            teacher.config.sliding_window = window
        teacher.train(training)
        if teacher.config._attn_implementation != implementation:
            teacher.set_attn_implementation(implementation)
    missing = [anatomy.path for anatomy in anatomies if anatomy.path not in calls]
    if missing:
        raise UserError(f"the model's forward does not call {', '.join(missing)}")
    return [calls[anatomy.path] for anatomy in anatomies]


def _wide(anatomies: Sequence[AttentionAnatomy]) -> tuple[str, ...]:
    """Those of `WIDE` that compute all of these."""
    return WIDE[1:] if any(anatomy.logit_cap or anatomy.null_logits for anatomy in anatomies) else WIDE


def _text(teacher: PreTrainedModel, start: int) -> dict[str, Tensor]:
    room = getattr(teacher.config, "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, room)
    vocabulary: Any = teacher.get_input_embeddings()
    device = vocabulary.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary.weight.shape[0], (2, tokens), generator=generator, device="cpu")
    if start:
        positions = torch.arange(start, start + tokens, device=device)
        return {"input_ids": ids[:1].to(device), "position_ids": positions[None]}
    mask = torch.ones_like(ids)
    mask[1, : min(PADS, tokens - 1)] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def prove(teacher: PreTrainedModel, anatomies: Sequence[AttentionAnatomy], *texts: Sequence[Call]) -> None:
    """Checks each anatomy against the teacher's module, on its call in each of the texts.

    Raises:
        UserError: a module gives something else than its anatomy; names it, what was read, and how far off it is.
    """
    for anatomy, *calls in zip(anatomies, *texts, strict=True):
        module = teacher.get_submodule(anatomy.path)
        error: float | str = "it did not run"
        for dtype, tolerance in PRECISIONS:
            try:
                error = _error(module, anatomy, calls, dtype)
            except (RuntimeError, TypeError, ValueError, IndexError) as problem:
                if isinstance(problem, torch.OutOfMemoryError) and dtype == torch.float32:
                    raise
                error = (str(problem) or type(problem).__name__).splitlines()[0]
                continue
            if error <= tolerance or dtype == torch.float64:
                break
        if isinstance(error, str) or not error <= TOLERANCE:
            how = error if isinstance(error, str) else f"its output is {error:.1e} (relative) away"
            raise UserError(
                f"{anatomy.path} ({type(module).__name__}) is not the attention that it was read as: {how}. "
                f"Read as: {_text_of(anatomy)}. Made of: {parts_text(module)}. {HOW_TO_ADD}, and what its modules do "
                "not show in linearize/surgery/families.py"
            )


def _text_of(anatomy: AttentionAnatomy) -> str:
    facts = anatomy.to_dict()
    del facts["path"]
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _error(module: nn.Module, anatomy: AttentionAnatomy, calls: Sequence[Call], dtype: torch.dtype) -> float:
    """The largest relative error of the rebuilt module on what the teacher's was called with."""
    # Parameters are made wide as they are copied, not copied first.
    wide: dict[int, Any] = {id(each): nn.Parameter(each.to(dtype), requires_grad=False) for each in _numbers(module)}
    module = copy.deepcopy(module, wide).to(dtype).eval()
    config: Any = getattr(module, "config", None)  # the copy's own
    if config is not None and config._attn_implementation not in _wide([anatomy]):
        config._attn_implementation = _wide([anatomy])[0]
    rebuilt = Projections(anatomy, module)
    inputs = [module.get_submodule(name) for name in anatomy.inputs]
    for projection in inputs:
        _project_once(projection)
    try:
        louder = _louder(rebuilt, calls[0], dtype)
        errors = [_error_of(module, rebuilt, call, dtype, louder) for call in calls]
    finally:
        for projection in inputs:
            del projection.forward  # which holds the module, and would keep its weights
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _numbers(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.is_floating_point()]


def _project_once(projection: nn.Module) -> None:
    """Given the same input again, as by the module and then by its rebuild, it gives the same again: most of the
    proof's time goes there. A copy, because what is done to it in place must not show."""
    forward = projection.forward
    last: list[Tensor] = []

    def remembering(x: Tensor) -> Tensor:
        if not last or last[0] is not x:
            last[:] = x, forward(x)
        return last[1].clone()

    projection.forward = remembering


def _louder(rebuilt: Projections, call: Call, dtype: torch.dtype) -> Tensor:
    """What to multiply the inputs with."""
    x = torch.nan_to_num(call.hidden_states[:1]).to(dtype)
    q, k, _ = rebuilt.project(x, _widened(call.kwargs.get("position_embeddings"), dtype))
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(rebuilt.anatomy.group_size, 2))
    spread = (logits * rebuilt.anatomy.scale).std().clamp(min=1e-6)
    return torch.nan_to_num((SPREAD / spread).sqrt().clamp(1.0, LOUDEST), nan=1.0)


def _error_of(module: nn.Module, rebuilt: Projections, call: Call, dtype: torch.dtype, louder: Tensor) -> float:
    """The relative error on one call, at tokens that are no pads."""
    anatomy = rebuilt.anatomy
    x = torch.nan_to_num(call.hidden_states).to(dtype) * louder
    kwargs = {name: _widened(value, dtype) for name, value in call.kwargs.items()}
    positions = kwargs.get("position_embeddings")
    # As it came: what is no key in a mask of floats is the lowest number of its own type.
    layout = read_layout(call.kwargs.get("attention_mask"), call.kwargs.get("position_ids"), *x.shape[:2])
    forget_layout()
    if anatomy.alibi:
        kwargs |= _unrounded(anatomy, module, layout, kwargs)

    theirs = module(x, **kwargs)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    q, k, v = rebuilt.project(x, positions)
    options: dict[str, Any] = {"scale": anatomy.scale, "layout": layout, "cache": None, "bend": rebuilt.bend(x.device)}
    if anatomy.window is None:
        heads = kept_softmax(q, k, v, **options)
    else:
        heads = kept_window(q, k, v, window=min(anatomy.window, WINDOW), sinks=0, **options)
    ours = rebuilt.put_out(heads)
    if anatomy.adds_residual:
        theirs = theirs - kwargs["residual"]
    if layout.real is not None:
        ours, theirs = ours[layout.real], theirs[layout.real]
    return float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(dtype).tiny))


def _unrounded(
    anatomy: AttentionAnatomy, module: nn.Module, layout: Layout, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The biases among a call's arguments as they are before they are rounded: `alibi`, and masks that hold it.

    Raises:
        ValueError: they are no slope times a place, and not for rounding.
    """
    alibi = kwargs.get("alibi")
    if not isinstance(alibi, Tensor):
        raise ValueError("it is given no alibi")
    batch, heads = alibi.numel() // (anatomy.num_heads * alibi.shape[-1]), anatomy.num_heads
    real = layout.real if layout.real is not None else torch.ones(batch, alibi.shape[-1], device=alibi.device)
    place = (real.long().cumsum(1) - 1).clamp(min=0)[:, None, None, :]  # of every key, [B, 1, 1, T]
    exact = torch.tensor(anatomy.alibi, dtype=alibi.dtype, device=alibi.device)[:, None, None] * place
    scale = first(module, ALIBI_SCALES, (int, float))
    given = {"alibi": exact / (getattr(module, scale) if scale else 1.0)}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.is_floating_point():
        hidden = mask < -1e4
        if bool((mask.masked_fill(hidden, 0) != 0).any()):
            given["attention_mask"] = torch.where(hidden, mask, exact)
    for name, value in given.items():
        found = kwargs[name].view(batch, heads, -1, alibi.shape[-1])
        off = (found - value).abs() > ROUNDED * value.abs() + 1e-6
        if bool((off & real.bool()[:, None, None]).any()):
            raise ValueError(f"its {name} is not what ALiBi's slopes make")
    return {name: value.expand(batch, heads, -1, -1).reshape(kwargs[name].shape) for name, value in given.items()}


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_widened(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
