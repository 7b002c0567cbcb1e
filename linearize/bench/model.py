"""`linearize bench model`: prefill and decoding over length, a student beside its teacher.

Decoding is `generate`, whatever it does inside, so that the figures are those of a person's own call. A token's time is
the difference between generating many and few, which leaves the first step and the call's own cost out.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ..convert import convert
from ..errors import UsageError
from ..modeling.cache import CACHE
from ..source import ModelSource, load_config, load_model, load_student, parse_device, parse_dtype
from ..surgery import student_config
from ..surgery.anatomy import meta_model
from . import record
from .caches import Fresh, cache_bytes, filled
from .options import MODELS, ModelOptions
from .record import Row
from .timing import GIB, Clock, said

FILE = "model.json"
REPEATS = 3
_LONG_S = 5.0  # a prefill that lasts longer is timed once

Say = Callable[[str], None]


def bench_model(
    student: str | Path | None = None,
    teacher: str | ModelSource | None = None,
    options: ModelOptions | None = None,
    *,
    config_source: ModelSource | None = None,
    mixer_options: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    command: str | Sequence[str] = "linearize.bench.bench_model",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measures a student beside its teacher.

    Args:
        student: a converted model; None with `options.config`, whose random weights both models then share.
        teacher: the model that it was converted from; None with `options.config`.
        config_source: `options.config` with its revision; by default as the option names it.
        mixer_options: with `options.config`, further options of the mixer.
        dtype: of the weights; "auto" is the checkpoint's, and for a config that names none bfloat16 on an accelerator.
        out: folder for model.json, written as the run goes on; None writes nothing.

    Returns:
        What model.json holds: the run's facts, `rows` (a model, batch and context: `prefill_tokens_per_second`,
        `decode_ms`, `decode_tokens_per_second` of all sequences together, peak GiB above the weights, `state_bytes`
        and `kv_bytes`; None for what was not measured or is lost in the noise, `error` says why) and `overtakes` (a
        batch: the context from which on the student is ahead, None for never).

    Raises:
        UsageError, UserError: an option, a model or `out` is wrong.
    """
    options = options or ModelOptions()
    place = parse_device(device)
    if options.compile and place.type != "cuda":
        raise UsageError("--compile: transformers compiles decoding on a GPU alone; leave it out here")
    if options.config is not None and (student is not None or teacher is not None):
        raise UsageError("--config makes both models from random weights: leave STUDENT and --teacher out")
    if options.config is None and (student is None or teacher is None):
        raise UsageError("give STUDENT and --teacher MODEL, or --config CONFIG --to MIXER for random weights")
    if mixer_options and options.config is None:
        raise UsageError("--mixer-option goes with --config; a STUDENT is converted already")
    if options.merge and out is None:
        raise UsageError("--merge needs -o/--out: the folder whose rows are kept")
    path = old = None
    if out is not None:
        path = record.folder(out, FILE, merge=options.merge, hint=", or pass --merge to replace its rows") / FILE
        old = record.read(path) if path.exists() else None
    models, names = _models(student, teacher, options, config_source, mixer_options, dtype, place)
    config: Any = models["student"].config
    results: Row = {
        **record.header(command, str(place)),
        **names,
        "dtype": str(models["teacher"].dtype).removeprefix("torch."),
        "mixers": sorted({layer["mixer"] for layer in config.layers}),
        "mixer_options": dict(config.mixer_options),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "options": options.to_dict(),
        "rows": [],
        "overtakes": [],
    }
    if old is not None and path is not None:
        record.check_same(path, old, results, ("teacher", "student", "dtype", "hardware"))
        results["rows"] = old["rows"]
    origin = {name: results[name] for name in ("commit", "versions", "command")}
    clock = Clock(place)
    for batch in options.batches():
        for context in options.lengths():
            for name in options.chosen_models():
                row = {"model": name, **_measure(models[name], name, batch, context, options, clock), **origin}
                say(_line(row))
                rows = record.merged(results["rows"], [row], ("model", "batch", "context"))
                rows.sort(key=lambda row: (row["batch"], row["context"], MODELS.index(row["model"])))
                results["rows"] = rows
                results["overtakes"] = [overtakes(rows, size) for size in dict.fromkeys(row["batch"] for row in rows)]
                if path is not None:
                    record.write(path, results)
    return results


def _models(
    student: str | Path | None,
    teacher: str | ModelSource | None,
    options: ModelOptions,
    config_source: ModelSource | None,
    mixer_options: Mapping[str, Any] | None,
    dtype: str,
    place: torch.device,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Teacher and student on the device, and what to call them."""
    if options.config is None:
        assert student is not None and teacher is not None
        source = ModelSource.of(teacher)
        chosen = parse_dtype(dtype)
        loaded: dict[str, Any] = {
            "teacher": load_model(source, dtype=chosen, device=place),
            "student": load_student(student, dtype=chosen, device=place),
        }
        return loaded, {"teacher": source.gguf_file or source.model, "student": str(student)}
    assert options.to is not None
    config = load_config(config_source or ModelSource.of(options.config))
    swap: dict[str, Any] = {name: getattr(options, name) for name in ("window", "sinks", "keep_softmax", "keep_window")}
    swap["mixer_options"] = dict(mixer_options or {})
    student_config(meta_model(config), options.to, **swap)  # what cannot be converted is said before weights are made
    wanted = parse_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        wanted = config.dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with place:
        made = AutoModelForCausalLM.from_config(config, dtype=wanted)
    made = made.eval().requires_grad_(False)
    pair = {"teacher": made, "student": convert(made, options.to, share_memory=True, **swap)}
    made_of = pair["student"].config.mixer_options
    count = sum(parameter.numel() for parameter in made.parameters())
    return pair, {
        "teacher": f"{config.model_type} of {_large(count)} random weights",
        "student": f"{options.to} (window {made_of['window']}, sinks {made_of['sinks']}) on the same weights",
    }


def _large(count: int) -> str:
    return f"{count / 1e9:.2g}B" if count >= 1e9 else f"{count / 1e6:.2g}M"


def _measure(model: Any, name: str, batch: int, context: int, options: ModelOptions, clock: Clock) -> Row:
    row: Row = {
        "batch": batch,
        "context": context,
        "prefill_s": None,
        "prefill_tokens_per_second": None,
        "prefill_peak_gib": None,
        "decode_ms": None,
        "decode_tokens_per_second": None,
        "decode_peak_gib": None,
        "decoder": None,
        "state_bytes": None,
        "kv_bytes": None,
    }
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, context), generator=torch.Generator().manual_seed(0))
    ids = ids.to(clock.device)
    errors = []
    longest = options.teacher_max_prefill if name == "teacher" else None
    if options.prefill and (longest is None or context <= longest):
        try:
            row |= _prefill(model, ids, clock)
        except Exception as error:
            errors.append(f"prefill: {said(error)}")
        clock.free()
    for static in [False, True] if options.compile else [False]:
        try:
            taken = _decode(model, ids, options.new_tokens, clock, static=static)
            row.setdefault("decode_ms_by", {})[taken["decoder"]] = taken["decode_ms"]
            if taken["decode_ms"] is None:
                errors.append(
                    f"decoding by {taken['decoder']}: a token's time is lost in the noise; raise --new-tokens above "
                    f"{options.new_tokens}"
                )
                taken = {name: value for name, value in taken.items() if row[name] is None}
            if row["decode_ms"] is None or taken.get("decode_ms", math.inf) < row["decode_ms"]:
                row |= taken
        except Exception as error:
            errors.append(f"decoding{', compiled' if static else ''}: {said(error)}")
        clock.free()
    if errors:
        row["error"] = "; ".join(errors)
    return row


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor, clock: Clock) -> Row:
    """Seconds, tokens a second and peak memory of reading the whole context into a fresh cache."""

    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    model(ids[:, :64], use_cache=True, logits_to_keep=1)  # what a first call compiles
    clock.synchronize()
    started = time.perf_counter()
    peak = clock.peak_bytes(read)
    clock.synchronize()
    seconds = time.perf_counter() - started
    if seconds < _LONG_S:
        seconds = statistics.median(_seconds(read, clock) for _ in range(REPEATS))
    return {
        "prefill_s": seconds,
        "prefill_tokens_per_second": ids.numel() / seconds,
        "prefill_peak_gib": None if peak is None else peak / GIB,
    }


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    clock.synchronize()
    started = time.perf_counter()
    run()
    clock.synchronize()
    return time.perf_counter() - started


def _decode(model: Any, ids: torch.Tensor, new_tokens: int, clock: Clock, *, static: bool) -> Row:
    """ms a token after the context, all sequences in step; peak memory above the weights; what the cache holds."""
    batch, context = ids.shape
    few = min(max(4, new_tokens // 8), new_tokens - 1)  # the first tokens record a CUDA graph, a step at a time
    if static:
        torch.compiler.reset()  # each length compiles anew, and dynamo gives up after a few
    fresh: Fresh = filled(model, batch, context - 1, new_tokens, static=static)
    mask = torch.ones_like(ids)

    def generate(cache: Any, count: int) -> None:
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=count)

    def seconds(count: int) -> float:
        cache = fresh()
        return _seconds(lambda: generate(cache, count), clock)

    with _greedy(model):
        cache = fresh()
        generate(cache, 1)  # reads the last token of the context, and no more
        state, kv = cache_bytes(cache, context)
        for _ in range(2):
            seconds(few)  # compiles, records CUDA graphs
        cache = fresh()
        peak = clock.peak_bytes(lambda: generate(cache, new_tokens))
        short = [seconds(few) for _ in range(REPEATS)]
        long = [seconds(new_tokens) for _ in range(REPEATS)]
    if static:
        torch.compiler.reset()
    each = _each(short, long, new_tokens - few)
    return {
        "decode_ms": None if each is None else 1e3 * each,
        "decode_tokens_per_second": None if each is None else batch / each,
        "decode_peak_gib": None if peak is None else (peak + state + kv) / GIB,
        "decoder": "compiled, static cache" if static else "generate",
        "state_bytes": state,
        "kv_bytes": kv,
    }


def _each(short: Sequence[float], long: Sequence[float], more: int) -> float | None:
    """Seconds a token, from times of short runs and of runs `more` tokens longer: the difference of the medians. None
    where that is no more than what equal runs differ by: it is then the timer's noise."""
    taken = statistics.median(long) - statistics.median(short)
    return taken / more if taken > min(max(times) - min(times) for times in (short, long)) else None


@contextlib.contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Inside, `generate` is greedy and no token ends it."""
    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


def overtakes(rows: Sequence[Row], batch: int) -> Row:
    """The context from which on the student is ahead of the teacher, for a batch and each thing that was measured.

    Interpolated between the contexts (time a token and bytes of cache grow by straight lines), the shortest context
    where the student is ahead in all, None where it is not ahead at the longest.
    """
    found: Row = {"batch": batch}
    for key, cost in _COSTS.items():
        by_model = {
            model: {row["context"]: cost(row) for row in rows if (row["batch"], row["model"]) == (batch, model)}
            for model in ("teacher", "student")
        }
        points = []
        for context, theirs in sorted(by_model["teacher"].items()):
            ours = by_model["student"].get(context)
            if theirs is not None and ours is not None:
                points.append((context, theirs - ours))
        if points:
            found[key] = _ahead_from(points)
    return found


def _prefill_cost(row: Row) -> float | None:
    return None if row["prefill_s"] is None else row["prefill_s"] / (row["batch"] * row["context"])


def _cache_cost(row: Row) -> float | None:
    return None if row["kv_bytes"] is None else float(row["kv_bytes"] + row["state_bytes"])


_COSTS: dict[str, Callable[[Row], float | None]] = {
    "decode": lambda row: row["decode_ms"],
    "prefill": _prefill_cost,
    "cache": _cache_cost,
}


def _ahead_from(points: list[tuple[int, float]]) -> float | None:
    """Where the lead (positive: the student is ahead) turns positive for good."""
    if points[-1][1] <= 0:
        return None
    start = len(points) - 1
    while start > 0 and points[start - 1][1] > 0:
        start -= 1
    if start == 0:
        return float(points[0][0])
    (x0, behind), (x1, ahead) = points[start - 1], points[start]
    return x0 + (x1 - x0) * -behind / (ahead - behind)


def _line(row: Row) -> str:
    said_of = {"prefill_tokens_per_second": "tokens/s prefill", "decode_ms": "ms a token"}
    figures = [f"{row[key]:.4g} {unit}" for key, unit in said_of.items() if row[key] is not None]
    tail = [f"({row['error']})"] if "error" in row else []
    return f"{row['model']} batch {row['batch']} context {row['context']}: " + ", ".join([*figures, *tail])
