"""Prefill, decoding and cache size over context, student beside teacher: `python benchmarks/lengths.py --help`.

The pure-torch operations on a CPU: one sequence, greedy decoding of a few tokens after a random context.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linearize.convert import convert
from linearize.modeling.cache import CACHE, MixerCacheLayer
from linearize.provenance import versions
from linearize.source import ModelSource, load_model


def cache_bytes(cache: DynamicCache) -> int:
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.bytes()
        else:
            total += sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
    return total


@torch.no_grad()
def measure(model: Any, context: int, new_tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    started = time.monotonic()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.monotonic() - started
    steps = []
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        started = time.monotonic()
        out = model(token, **{CACHE: out[CACHE]}, use_cache=True)
        steps.append(time.monotonic() - started)
    return {
        "context": context,
        "prefill_s": prefill,
        "decode_ms": 1e3 * sorted(steps)[len(steps) // 2],
        "cache_bytes": cache_bytes(out[CACHE]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--mixer", default="based")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--contexts", default="1024,4096,8192")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    teacher = load_model(ModelSource(args.teacher, gguf_file=args.gguf_file), dtype=torch.float32)
    student = convert(teacher, args.mixer, window=args.window, share_memory=True)
    contexts = [int(length) for length in args.contexts.split(",")]
    rows = []
    for context in contexts:
        for name, model in (("teacher", teacher), ("student", student)):
            measure(model, 64, 2)  # the first forward of a shape sets things up
            rows.append({"model": name, **measure(model, context, args.new_tokens)})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "teacher": Path(args.gguf_file or args.teacher).name,
        "mixer": args.mixer,
        "window": args.window,
        "contexts": contexts,
        "hardware": f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "command": "python benchmarks/lengths.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
