"""Writes the tables of README.md and docs/results.md from the JSON files under benchmarks/results:

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tables_aims import aims_table
from tables_quality import glance_table, keep_table, quality_table, recipes_table, starts_table
from tables_speed import beside_table, kernels_table, lengths_table, model_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FRONT, ALL = ROOT / "README.md", ROOT / "docs" / "results.md"

TABLES = {
    "glance": (FRONT, glance_table, "quality-smollm2.json"),
    "recipes": (FRONT, recipes_table, "quality-smollm2.json"),
    "beside": (FRONT, beside_table, "kernels-h200.json"),
    "model": (FRONT, model_table, "model-h200.json"),
    "quality": (ALL, quality_table, "quality-smollm2.json"),
    "aims": (ALL, aims_table, "quality-smollm2.json"),
    "starts": (ALL, starts_table, "quality-smollm2.json"),
    "keep": (ALL, keep_table, "keep-scores-smollm2.json"),
    "kernels": (ALL, kernels_table, "kernels-h200.json"),
    "lengths": (ALL, lengths_table, "lengths-smollm2-cpu.json"),
}


def written(page: Path) -> str:
    """The page's text with every table of it made anew."""
    text = page.read_text()
    up = "../" * len(page.parent.relative_to(ROOT).parts)
    for name, (where, make, file) in TABLES.items():
        if where != page:
            continue
        body = "\n".join(make(json.loads((RESULTS / file).read_text()))).replace("](benchmarks/", f"]({up}benchmarks/")
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"{page.name} has no place for the table {name}"
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    pages = {page: written(page) for page in (FRONT, ALL)}
    if "--check" in sys.argv:
        stale = [page.name for page, text in pages.items() if text != page.read_text()]
        sys.exit(f"not the tables of benchmarks/results: {', '.join(stale)}; run this without --check" if stale else 0)
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
