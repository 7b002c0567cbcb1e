"""Writes README.md's tables from the JSON files under benchmarks/results: `python benchmarks/tables.py [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ("linear", "based", "mamba2", "retention", "gla")


def transfer_table(data: dict[str, Any]) -> list[str]:
    rows = sorted(data["rows"], key=lambda row: (row["variant"] != "default", ORDER.index(row["mixer"])))
    off = rows[0]["start"]["linear_off"]
    lines = [
        "| student | training tokens | perplexity / teacher's | KL, nats a token | recall loss |",
        "|---|---|---|---|---|",
        f"| the teacher | | 1 | 0 | {rows[0]['recall_teacher']:.2f} |",
        f"| window and sink alone | 0 | {off['ppl_ratio']:.2f} | {off['kl']:.3f} | {off['recall']:.2f} |",
    ]
    for row in rows:
        name = f"`{row['mixer']}`" + ("" if row["variant"] == "default" else f", {row['variant']}")
        tokens = f"{row['tokens'] / 1e6:.1f}M"
        lines.append(f"| {name} | {tokens} | {row['ppl_ratio']:.2f} | {row['kl']:.3f} | {row['recall']:.2f} |")
    evaluated = " and ".join(name.removesuffix(".jsonl.gz") for name in data["eval"])
    lines += [
        "",
        f"Measured on {evaluated}, 32 x 1024 tokens each, on one {rows[0]['hardware']}; "
        "[JSON](benchmarks/results/transfer-smollm2.json), [script](benchmarks/transfer.py).",
    ]
    return lines


def lengths_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| context | teacher: cache | prefill | a token | student: state | prefill | a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in data["contexts"]:
        cells = []
        for role in ("teacher", "student"):
            row = next(row for row in data["rows"] if row["context"] == length and row["model"] == role)
            cells += [
                f"{row['cache_bytes'] / 2**20:.1f} MiB",
                f"{row['prefill_s']:.1f} s",
                f"{row['decode_ms']:.0f} ms",
            ]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`{data['mixer']}`, window {data['window']}, fp32, {data['hardware']}; "
        "[JSON](benchmarks/results/lengths-smollm2-cpu.json), [script](benchmarks/lengths.py).",
    ]
    return lines


TABLES = {
    "transfer": (transfer_table, "transfer-smollm2.json"),
    "lengths": (lengths_table, "lengths-smollm2-cpu.json"),
}


def written(text: str) -> str:
    """README's text with every table made anew."""
    for name, (make, file) in TABLES.items():
        body = "\n".join(make(json.loads((RESULTS / file).read_text())))
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"README.md has no place for the table {name}"
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = written(text)
    if "--check" in sys.argv:
        sys.exit(
            0 if new == text else "README.md's tables are not those of benchmarks/results: run this without --check"
        )
    readme.write_text(new)


if __name__ == "__main__":
    main()
