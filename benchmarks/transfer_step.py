"""Attention transfer on a real teacher with the kernels: the mixer's share of a training step, and its loss trace.

    python benchmarks/transfer_step.py --teacher models/ --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \
        --train sotu.jsonl.gz --out benchmarks/results/transfer-step.json

The share is by the profiler: the sum of the GPU kernels' times of a step, less that of the same step with the mixers
replaced by a scaled copy of the values. Both take the teacher's forward pass, the projections, the loss, the backward
pass and the optimizer's step. The trace is that of `linearize distill --stage transfer` with the kernels at one seed
and with the plain-torch operations at several.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linearize.bench.record import header
from linearize.convert import convert
from linearize.data import pack
from linearize.distill import distill
from linearize.distill.compiling import attentions, compiled
from linearize.distill.layer_pass import attention_pairs, transfer_pass
from linearize.source import ModelSource, load_model, load_tokenizer

KERNELS = "LINEARIZE_KERNELS"


class Copied(torch.nn.Module):
    """In a mixer's place: the values of each query head's key head, times a number that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1, device="cuda"))

    def forward(self, q, k, v, *args, **kwargs):
        return (v.repeat_interleave(q.shape[2] // v.shape[2], dim=2) * self.gain).to(q.dtype)


def kernel_ms(student: Any, teacher: Any, tokens: torch.Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of GPU kernels, and from start to end, of one training step."""
    pairs = attention_pairs(student, teacher)
    trained = [p for attention, _ in pairs.values() for p in attention.mixer.parameters()]
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        transfer_pass(
            teacher,
            pairs,
            {"input_ids": tokens},
            lambda layer, loss: (loss / len(pairs)).backward(),
            lambda enabled: torch.autocast("cuda", torch.bfloat16, enabled=enabled),
        )
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - began) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    total = sum(e.self_device_time_total for e in profile.key_averages() if e.device_type == device)
    return total / 1e3 / steps, wall


def trace(args: argparse.Namespace, mixer: str, teacher: Any, tokenizer: Any, kernels: str, seed: int) -> list[float]:
    """The transfer loss of every step."""
    os.environ[KERNELS] = kernels
    torch.manual_seed(seed)
    student = convert(teacher, mixer, window=args.window, sinks=args.sinks)
    tokens = args.steps * args.trace_batch_size * args.length
    work = Path(args.out).with_suffix(f".{mixer}-{kernels}-{seed}.work")
    distill(
        student,
        teacher,
        pack(args.train, tokenizer, length=args.length, tokens=tokens, seed=seed),
        tokenizer=tokenizer,
        stage="transfer",
        tokens=tokens,
        max_length=args.length,
        batch_size=args.trace_batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        log_steps=1,
        compile=args.compile and kernels != "reference",
        work_dir=work,
        overwrite=True,
        device="cuda",
    )
    (log,) = work.rglob("loss.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--train", required=True, help="comma-separated files")
    parser.add_argument("--mixers", default="linear,retention,gla,mamba2,gated_delta,based")
    parser.add_argument("--traces", default="linear,gla", help="mixers whose loss is traced")
    parser.add_argument("--seeds", type=int, default=3, help="of the plain-torch operations")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--trace-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24, help="of a trace")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--compile", action="store_true", help="measure compiled mixers, as `distill --compile`")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    source = ModelSource(args.teacher, gguf_file=args.gguf_file)
    teacher = load_model(source, dtype=torch.float32, device="cuda")
    tokenizer = load_tokenizer(source)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "teacher": Path(args.gguf_file or args.teacher).name,
        "train": [Path(name).name for name in args.train.split(",")],
        **header("python benchmarks/transfer_step.py " + " ".join(Path(a).name for a in sys.argv[1:]), "cuda"),
        **{
            name: getattr(args, name)
            for name in (
                "window",
                "sinks",
                "length",
                "batch_size",
                "trace_batch_size",
                "steps",
                "learning_rate",
                "compile",
            )
        },
        "shares": [],
        "traces": [],
    }

    def write() -> None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    tokens = torch.randint(0, teacher.config.vocab_size, (args.batch_size, args.length), device="cuda")
    os.environ[KERNELS] = "auto"
    for mixer in args.mixers.split(","):
        student = convert(teacher, mixer, window=args.window, sinks=args.sinks).to("cuda").train()
        with compiled(attentions(student)) if args.compile else nullcontext():
            with_mixer, wall = kernel_ms(student, teacher, tokens, 5)
        bare = copy.copy(student)
        for _, attention in bare.mixer_layers():
            attention.mixer = Copied()
        with compiled(attentions(bare)) if args.compile else nullcontext():
            without, bare_wall = kernel_ms(bare, teacher, tokens, 5)
        row = {"mixer": mixer, "step_kernel_ms": with_mixer, "rest_kernel_ms": without}
        row |= {"share": 1 - without / with_mixer, "step_ms": wall, "rest_ms": bare_wall}
        result["shares"].append(row)
        print(json.dumps(row), flush=True)
        write()
        del student, bare
        torch.cuda.empty_cache()
    for mixer in filter(None, args.traces.split(",")):
        ours = trace(args, mixer, teacher, tokenizer, "auto", 0)
        theirs = [trace(args, mixer, teacher, tokenizer, "reference", seed) for seed in range(args.seeds)]
        row = {"mixer": mixer, "kernels": ours, "reference": theirs}
        # Against the same seed's trace, and how far apart the seeds themselves are.
        row["apart"] = max(abs(a - b) / b for a, b in zip(ours, theirs[0], strict=True))
        row["spread"] = max((max(x) - min(x)) / min(x) for x in zip(*theirs, strict=True))
        result["traces"].append(row)
        print(
            mixer, "apart", row["apart"], "spread", row["spread"], "last", ours[-1], [t[-1] for t in theirs], flush=True
        )
        write()


if __name__ == "__main__":
    main()
