"""What stays softmax, chosen in different ways and untrained: the teacher's window and sinks, and the kept heads whole.

    python benchmarks/keep_scores.py --teacher MODEL --text text.jsonl.gz --heldout prose.jsonl.gz \
        --out benchmarks/results/keep-scores-smollm2.json

Scores are measured on `--text`, KL, perplexity and recall on `--heldout`, as `linearize eval` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linearize.bench.record import header
from linearize.calibrate import PASSAGE, measure, passages_on, sequences
from linearize.convert import convert
from linearize.evaluate import evaluate
from linearize.modeling import branch_off
from linearize.source import ModelSource, load_model, load_tokenizer
from linearize.surgery.anatomy import read_anatomy
from linearize.surgery.keep import as_many, parse_auto

WINDOW, SINKS = 64, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--text", required=True, help="what scores are measured on")
    parser.add_argument("--heldout", required=True, help="what the choice is judged on")
    parser.add_argument("--keep", default="heads:auto:5,heads:auto:9,auto:6")
    parser.add_argument("--methods", default="even,induction,gradient")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 1024 tokens for KL and perplexity")
    parser.add_argument("--passages", type=int, default=32, help="passages of 256 tokens for recall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    source = ModelSource(options.teacher, gguf_file=options.gguf_file)
    tokenizer = load_tokenizer(source)
    teacher = load_model(source, dtype="float32", device=options.device)
    passages = sequences(options.text, tokenizer, count=passages_on(teacher.device), length=PASSAGE)
    anatomies = read_anatomy(teacher)
    total = sum(anatomy.num_kv_heads for anatomy in anatomies)
    given = [Path(part).name if "/" in part else part for part in sys.argv[1:]]
    command = ["python", "benchmarks/keep_scores.py", *given]
    results = header(command, options.device) | {
        "teacher": Path(options.teacher).name,
        "window": WINDOW,
        "sinks": SINKS,
        "score_passages": len(passages),
        "rows": [],
    }

    def judge(method: str, keep: str | None, chosen: object, seconds: float) -> None:
        student = convert(teacher, "retention", window=WINDOW, sinks=SINKS, keep_softmax=chosen, share_memory=True)
        if student.mixer_layers():
            with branch_off(student, "linear"):
                found = evaluate(
                    student,
                    teacher,
                    tokenizer=tokenizer,
                    dataset=options.heldout,
                    sequences=options.sequences,
                    recall_passages=options.passages,
                    batch_size=4,
                    branches=False,
                )
        swapped = dict(student.mixer_layers())
        groups = sum(
            len(swapped[i].softmax_groups) if i in swapped else a.num_kv_heads for i, a in enumerate(anatomies)
        )
        row = {
            "method": method,
            "keep": keep,
            "groups": groups,
            "kv_share": groups / total,
            "kl": found["kl"],
            "ppl_ratio": found["perplexity"]["ratio"],
            "recall": found["recall"]["student"],
            "recall_teacher": found["recall"]["teacher"],
            "seconds": round(seconds, 1),
            "kept": chosen if isinstance(chosen, str | None) else list(chosen),
        }
        print(json.dumps({key: value for key, value in row.items() if key != "kept"}), file=sys.stderr, flush=True)
        results["rows"].append(row)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    judge("none", None, None, 0.0)
    for keep in options.keep.split(","):
        wanted = parse_auto(keep, anatomies)
        assert wanted is not None, keep
        for method in options.methods.split(","):
            started = time.monotonic()
            if method == "even":
                chosen = as_many(wanted, anatomies)
            else:
                chosen = measure(teacher, passages, wanted, window=WINDOW, sinks=SINKS, method=method).keep_softmax
            judge(method, keep, chosen, time.monotonic() - started)


if __name__ == "__main__":
    main()
