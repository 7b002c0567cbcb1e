"""A converted folder where linearize is not installed: the code beside the weights runs, with the same numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import shake
from families import teacher_of

from linearize.convert import convert

SCRIPT = """
import sys
sys.modules["linearize"] = None   # any import of it fails, as where it is not installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
ids = torch.load({folder!r} + "/ids.pt")
with torch.no_grad():
    torch.save(model(ids).logits, {folder!r} + "/logits.pt")
out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
assert out.shape[1] == ids.shape[1] + 4
model.save_pretrained({folder!r} + "/again")
"""


@pytest.mark.parametrize(("family", "mixer"), [("llama", "based"), ("gpt_neox", "gla")])
def test_remote_code_gives_the_same_logits(family, mixer, tmp_path):
    student = shake(convert(teacher_of(family), mixer, window=8, keep_softmax="heads:0.1"))
    ids = torch.randint(3, 128, (2, 30))
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    torch.save(ids, folder / "ids.pt")
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(folder))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "logits.pt"), student(ids).logits)
    assert (folder / "again" / "modeling_linearize.py").exists()


def test_modeling_imports_torch_and_transformers_alone():
    import ast
    from pathlib import Path

    import linearize.modeling

    folder = Path(linearize.modeling.__file__).parent
    names = {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
                assert roots <= {"torch"} | sys.stdlib_module_names, (path.name, roots)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in names, (path.name, node.module)
            elif isinstance(node, ast.ImportFrom):
                root = (node.module or "").split(".")[0]
                if root == "peft" and node.col_offset:  # inside a function: needed by who loads an adapter
                    continue
                assert root in {"torch", "transformers"} | sys.stdlib_module_names, (path.name, root)
