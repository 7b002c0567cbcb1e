"""Attention transfer on a real teacher: every mixer at the same tokens, against its window and sinks alone.

    python benchmarks/transfer.py --teacher models/ --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \
        --train 'sotu.jsonl.gz,treasury_david.jsonl.gz' --eval moby_dick.jsonl.gz --eval grimm.jsonl.gz \
        --mixers linear,based --tokens 5000000 --out benchmarks/results/transfer-smollm2.json

Nothing but new parameters trains. Rows of several runs with the same settings are merged into `--out`, one a mixer and
variant. It needs no more than this repository, torch, transformers and accelerate (and gguf for a GGUF teacher).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linearize.bench.record import commit, hardware
from linearize.convert import convert
from linearize.data import pack
from linearize.distill import distill
from linearize.evaluate import evaluate
from linearize.flags import mixer_options
from linearize.provenance import versions
from linearize.source import ModelSource, load_model, load_tokenizer


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of an evaluation that the table shows."""
    off = result.get("linear_off")
    return {
        "ppl_ratio": result["perplexity"]["ratio"],
        "kl": result["kl"],
        "recall": result["recall"]["student"],
        "recall_teacher": result["recall"]["teacher"],
        "by_dataset": [
            {"dataset": Path(row["name"]).name, "ratio": row["perplexity"]["ratio"], "kl": row["kl"]}
            for row in result["datasets"]
        ],
        "linear_off": None
        if off is None
        else {"ppl_ratio": off["perplexity"]["ratio"], "kl": off["kl"], "recall": off["recall"]["student"]},
    }


def run(args: argparse.Namespace, mixer: str, teacher: Any, tokenizer: Any) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    options = mixer_options(tuple(args.mixer_option))
    student = convert(teacher, mixer, window=args.window, sinks=args.sinks, mixer_options=options)

    def measure() -> dict[str, Any]:
        return figures(
            evaluate(
                student,
                teacher,
                tokenizer=tokenizer,
                dataset=args.eval,
                context=1024,
                sequences=args.sequences,
                batch_size=8,
                recall_passages=args.passages,
                branches=args.window > 0,
                device=args.device,
            )
        )

    start = measure()
    print(mixer, "start", json.dumps(start), flush=True)
    data = pack(args.train, tokenizer, length=args.length, tokens=args.tokens, seed=args.seed)
    before = time.monotonic()
    student = distill(
        student,
        teacher,
        data,
        tokenizer=tokenizer,
        stage="transfer",
        tokens=args.tokens,
        max_length=args.length,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        log_steps=50,
        device=args.device,
    )
    seconds = time.monotonic() - before
    trained = sum(p.numel() for n, p in student.named_parameters() if ".mixer." in n)
    row = {
        "mixer": mixer,
        "variant": args.variant,
        "commit": commit(),
        "hardware": hardware(args.device),
        "note": args.note,
        "mixer_options": options,
        "window": args.window,
        "sinks": args.sinks,
        "tokens": student.distillation[0].tokens,
        "learning_rate": args.learning_rate,
        "length": args.length,
        "batch_size": args.batch_size,
        "trained_parameters": trained,
        "seconds": round(seconds, 1),
        "loss": student.distillation[0].loss,
        "start": start,
        **measure(),
    }
    print(mixer, "trained", json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--train", required=True, help="comma-separated files")
    parser.add_argument("--eval", action="append", required=True, help="a file to measure on; the first gives recall")
    parser.add_argument("--mixers", default="linear,retention,gla,mamba2,gated_delta,based")
    parser.add_argument("--mixer-option", action="append", default=[])
    parser.add_argument("--variant", default="default")
    parser.add_argument("--note", default="", help="kept with the rows, as 'three runs shared the GPU'")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if not args.window:
        args.sinks = 0
    source = ModelSource(args.teacher, gguf_file=args.gguf_file)
    teacher = load_model(source, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(source)
    rows = [run(args, mixer, teacher, tokenizer) for mixer in args.mixers.split(",")]
    old = json.loads(args.out.read_text())["rows"] if args.out.exists() else []

    def key(row: dict[str, Any]) -> tuple:
        return row["mixer"], row["variant"], row["window"], row["tokens"]

    done = {key(row) for row in rows}
    result = {
        "teacher": Path(args.gguf_file or args.teacher).name,
        "train": [Path(name).name for name in args.train.split(",")],
        "eval": [Path(name).name for name in args.eval],
        "versions": versions(),
        "command": "python benchmarks/transfer.py "
        + " ".join(",".join(Path(part).name if "/" in part else part for part in a.split(",")) for a in sys.argv[1:]),
        "rows": sorted(
            [row for row in old if key(row) not in done] + rows,
            key=lambda row: (row["mixer"], row["variant"]),
        ),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
