"""CONTRIBUTING.md: what it shows of a file stands there, what it names exists, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_what_is_shown_of_a_file_stands_there():
    shown = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(shown) == 3
    for path, code in shown:
        assert code in (ROOT / path).read_text(), path


def test_what_is_named_exists():
    paths = set(re.findall(r"`((?:linearize|tests)/[\w/.]*)`", TEXT))
    assert len(paths) > 8 and all((ROOT / path).exists() for path in paths), paths


def test_its_python_runs():
    blocks = re.findall(r"(?<!-->\n)```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
