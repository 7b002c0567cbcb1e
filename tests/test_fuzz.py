"""What is given to the verbs may be damaged in any way: they say so in one line, in time, and leave nothing behind.

500 drawn corruptions of configs, indices, shards, GGUF, recipes, data sets and records; the same on every machine.
"""

from __future__ import annotations

import faulthandler
import gzip
import hashlib
import json
import math
import os
import random
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from conftest import tiny_config, tiny_teacher
from corruptions import damage, put
from test_cli import rows, teacher_at
from test_source import write_gguf

from linearize.checkpoint_files import check_folder
from linearize.cli import main
from linearize.distill.trainer import StageTrainer
from linearize.recipes.recipe import FOLDER as RECIPES

SEED = os.environ.get("LINEARIZE_FUZZ_SEED", "linearize")  # another draws 500 others
CASES, DEFAULT = 500, 4  # all of them are slow, every fourth is not
SECONDS = 20  # a verb takes one at most here
SMALL = "--max-length 32 --batch-size 2 --tokens 128 --device cpu"
EVAL = "--context 32 --sequences 2 --recall-passages 1 --recall-length 8 --retrieval-items 1 --agreement-prompts 1"
EVAL += " --retrieval-contexts 32 --device cpu"
DISTILL = f"distill student --teacher teacher --dataset text.jsonl -o out {SMALL}"
RECIPE_SMALL = "--tokens 2048 --set stages.*.max_length=128 --set stages.*.batch_size=2 --device cpu"
RECIPE_SMALL += " --set convert.calibrate_options.sequences=4 --set convert.calibrate_options.length=64"
# (how often, the verb, what of its input is damaged)
TARGETS: list[tuple[int, str, str]] = [
    (4, "plan teacher --to gla", "teacher/config.json"),
    (2, "plan teacher/config.json --to based --json", "teacher/config.json"),
    (5, "convert teacher --to gla -o out", "teacher/config.json"),
    (4, "convert teacher --to linear -o out", "teacher/model.safetensors"),
    (2, "convert teacher --to linear -o out", "teacher/generation_config.json"),
    (2, "convert teacher --to linear -o out", "teacher/tokenizer.json"),
    (2, "convert teacher --to linear -o out", "teacher/tokenizer_config.json"),
    (4, "convert shards --to retention -o out", "shards/model.safetensors.index.json"),
    (3, "convert shards --to retention -o out", "shards/model-00002-of-00003.safetensors"),
    (
        1,
        "convert teacher --to gla --calibrate text.jsonl --calibrate-length 64 --calibrate-sequences 4 -o out",
        "text.jsonl",
    ),
    (3, "plan tiny.gguf --to gla", "tiny.gguf"),
    (4, "convert tiny.gguf --to gla -o out", "tiny.gguf"),
    (3, f"eval student --teacher teacher --dataset text.jsonl {EVAL}", "student/config.json"),
    (2, f"eval student --dataset text.jsonl {EVAL} --json", "student/model.safetensors"),
    (2, f"eval student --teacher teacher --dataset text.jsonl {EVAL}", "text.jsonl"),
    (1, f"eval student --dataset text.jsonl --tasks tasks.jsonl {EVAL}", "tasks.jsonl"),
    (1, f"eval adapter --dataset text.jsonl {EVAL}", "adapter/adapter_config.json"),
    (1, f"eval adapter --dataset text.jsonl {EVAL}", "adapter/adapter_model.safetensors"),
    (1, "generate student hello --max-new-tokens 4 --device cpu", "student/generation_config.json"),
    (1, "generate student hello --max-new-tokens 4 --device cpu --chat", "student/tokenizer.json"),
    (3, DISTILL, "text.jsonl"),
    (2, DISTILL, "student/config.json"),
    (1, DISTILL, "student/linearize.json"),
    (1, DISTILL, "teacher/model.safetensors"),
    (2, DISTILL.replace("text.jsonl", "text.jsonl.gz"), "text.jsonl.gz"),
    (2, DISTILL.replace("text.jsonl", "text.txt"), "text.txt"),
    (2, DISTILL.replace("text.jsonl", "text.parquet"), "text.parquet"),
    (2, f"{DISTILL} --stage transfer --resume", "out.work/transfer/run.json"),
    (1, f"{DISTILL} --stage transfer --resume", "out.work/transfer/loss.jsonl"),
    (1, f"{DISTILL} --stage transfer --resume", "out.work/transfer/checkpoint-1/trainer_state.json"),
    (1, f"{DISTILL} --stage transfer --resume", "out.work/transfer/checkpoint-1/trainable.safetensors"),
    (1, f"{DISTILL} --stage transfer --resume", "out.work/transfer/checkpoint-1/optimizer.pt"),
    (3, f"finetune student --dataset chat.jsonl -o out --merge {SMALL}", "chat.jsonl"),
    (1, f"finetune student --dataset text.jsonl -o out {SMALL}", "student/model.safetensors"),
    (6, f"run recipe.yaml teacher --dataset text.jsonl -o out --dry-run {RECIPE_SMALL}", "recipe.yaml"),
    (2, f"run recipe.yaml teacher --dataset text.jsonl -o out {RECIPE_SMALL}", "recipe.yaml"),
    (1, f"run recipe.yaml teacher --dataset text.jsonl -o out {RECIPE_SMALL}", "teacher/config.json"),
    (1, f"run recipe.yaml teacher --dataset text.jsonl -o out --resume {RECIPE_SMALL}", "out.work/recipe.json"),
    (
        1,
        f"run recipe.yaml teacher --dataset text.jsonl -o out --resume {RECIPE_SMALL}",
        "out.work/1-convert/config.json",
    ),
    (
        1,
        f"run recipe.yaml teacher --dataset text.jsonl -o out --resume {RECIPE_SMALL}",
        "out.work/1-convert/linearize.json",
    ),
    (2, "push student me/student --dry-run", "student/config.json"),
    (1, "push student me/student --dry-run", "student/model.safetensors"),
    (2, "push student me/student --dry-run --json", "student/linearize.json"),
    (2, "push student me/student --dry-run", "student/evaluation.json"),
    (1, "push student me/student --dry-run", "student/loss.jsonl"),
    (1, "push student me/student --dry-run", "student/tokenizer_config.json"),
    (2, "report student -o out", "student/evaluation.json"),
    (2, "report student -o out", "student/loss.jsonl"),
    (2, "report student -o out", "student/keep_scores.json"),
    (2, "report student -o out", "student/linearize.json"),
    (1, "report student -o out", "student/calibration.json"),
]
SCHEDULE = [target for target in TARGETS for _ in range(target[0])]


class Hang(BaseException):
    """The verb did not end in time; no `except Exception` catches it."""


@contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """In that folder, without the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Everything that a verb reads, whole."""
    folder = tmp_path_factory.mktemp("world")
    teacher_at(folder / "teacher")
    model = teacher_at(folder / "shards")
    (model / "model.safetensors").unlink()
    tiny_teacher(vocab_size=264).save_pretrained(model, max_shard_size="150KB")
    assert len(list(model.glob("model-*-of-00003.safetensors"))) == 3
    write_gguf(folder / "tiny.gguf")
    sentences = [f"Document {i} says that the sum of {i} and {3 * i} is {4 * i}. " * 3 for i in range(40)]
    text = rows(folder / "text.jsonl", *({"text": sentence} for sentence in sentences))
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(text.read_bytes()))
    (folder / "text.txt").write_text("".join(sentences))
    pyarrow.parquet.write_table(pyarrow.table({"text": sentences}), folder / "text.parquet")
    chats = [[("user", f"{i}+1?"), ("assistant", f"It is {i + 1}.")] for i in range(20)]
    chats = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in chats]
    rows(folder / "chat.jsonl", *chats)
    rows(folder / "tasks.jsonl", *({"context": f"{i} and", "choices": [" a", " b"], "gold": i % 2} for i in range(4)))
    shutil.copyfile(RECIPES / "default.yaml", folder / "recipe.yaml")
    convert = "convert teacher --to linear --window 8 --keep-softmax heads:auto:1 --calibrate text.jsonl"
    for command in (
        f"{convert} --calibrate-length 64 --calibrate-sequences 4 -o student",
        f"finetune student --dataset text.jsonl -o adapter {SMALL}",
        f"eval student --teacher teacher --dataset text.jsonl {EVAL} --json",
    ):
        with standing_in(folder):
            done = CliRunner().invoke(main, command.split())
        assert done.exit_code == 0, (command, done.output)
        if command.startswith("eval"):
            (folder / "student" / "evaluation.json").write_text(done.stdout)
            log = [{"stage": "transfer", "step": step, "tokens": 64 * step, "loss": 1 / step} for step in (1, 2, 3)]
            rows(folder / "student" / "loss.jsonl", *log)
    return folder


@pytest.fixture(scope="module")
def stopped(world) -> dict[str, Path]:
    """The work folders of a `distill` that ended after a step, and of a `run` that ended before its last stage."""
    step, taken = StageTrainer.training_step, []

    def stop(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with standing_in(world), pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", stop)
        done = CliRunner().invoke(main, f"{DISTILL} --stage transfer --save-steps 1".split())
    assert (world / "out.work" / "transfer" / "checkpoint-1" / "trainer_state.json").is_file(), done.output
    found = {"distill": (world / "out.work").rename(world / "distill.work")}
    with standing_in(world):
        done = CliRunner().invoke(main, f"run recipe.yaml teacher --dataset text.jsonl -o out {RECIPE_SMALL}".split())
    assert done.exit_code == 0, done.output
    shutil.rmtree(world / "out")
    return found | {"run": (world / "out.work").rename(world / "run.work")}


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under a folder, with what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = f"{path.stat().st_mode:o}"
    return found


def invoke(command: str) -> tuple[object, str]:
    """The verb's result, and the traceback of what escaped it, if anything did."""

    def late(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where not even the alarm is heard
    signal.alarm(SECONDS)
    try:
        result = CliRunner().invoke(main, command.split())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    error = result.exception
    escaped = None if error is None or isinstance(error, SystemExit) else error
    return result, "" if escaped is None else "".join(traceback.format_exception(escaped))


def check_whole(out: Path) -> None:
    """OUT is what the verb promised: a report, or a folder whose weights and record are there."""
    if out.is_file():
        assert out.read_text().rstrip().endswith("</html>")
        return
    assert (out / "linearize.json").is_file()
    if (out / "config.json").is_file():
        json.loads((out / "config.json").read_text())
        check_folder(out)
    else:
        assert (out / "adapter_model.safetensors").is_file()


def parameters():
    for case in range(CASES):
        yield pytest.param(case, marks=[pytest.mark.slow] if case % DEFAULT else [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**9, -1, 0, 1.5, "2", True, [])),
        *(("hidden_size", value) for value in (0, -64, 2**40, {})),
        *((name, value) for name in ("num_attention_heads", "num_key_value_heads", "head_dim") for value in (0, -1, 3)),
        *((name, value) for name in ("vocab_size", "intermediate_size") for value in (0, -1)),
        *(("sliding_window", value) for value in (2.5, "8", math.nan)),
        *(("hidden_act", value) for value in ("4", None, [])),
        *(("rope_parameters", value) for value in (1, {"rope_type": []}, {"rope_type": "default", "rope_theta": {}})),
        *(("dtype", value) for value in (1, {}, "float128")),
        *(("layer_types", value) for value in (["full_attention"], [1, 2], "full_attention")),
    ],
)
def test_a_config_with_a_wrong_number(name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict() | {name: value}))
    result, escaped = invoke(f"plan {tmp_path / 'config.json'} --to gla")
    assert not escaped and "not foreseen" not in result.output, (result.output, escaped)
    assert result.exit_code in (0, 1)


@pytest.mark.parametrize("case", parameters())
def test_a_corruption_is_said_in_one_line(case, world, stopped, tmp_path):
    draw = random.Random(f"{SEED} {case}")
    _, command, victim = SCHEDULE[case * 7919 % len(SCHEDULE)]
    here, outside = tmp_path / "here", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("keep out")
    here.mkdir()
    for name in {word.split("/")[0] for word in (*command.split(), victim)}:
        if name == "out.work":
            put(stopped[command.split()[0]], here / name)
        elif (world / name).exists():
            put(world / name, here / name)
    if (here / "adapter").exists():
        put(world / "student", here / "student")
        config = json.loads((here / "adapter" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(here / "student")
        (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    did = damage(here / victim, outside, draw)
    before = snapshot(tmp_path)
    with standing_in(here):
        result, escaped = invoke(command)
    what = f"case {case}: {command}\n{did}\n{result.output[-3000:]}\n{escaped}"
    assert not escaped, what
    assert result.exit_code in (0, 1, 2), what
    assert "Traceback" not in result.output and "not foreseen" not in result.output, what
    if result.exit_code:
        last = result.stderr.replace("\r", "\n").rstrip("\n").split("\n")[-1]
        assert last.startswith("Error: ") and len(last) < 3000, what
    after = snapshot(tmp_path)
    new = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    allowed = [str(here / "out.work")] + ([] if result.exit_code else [str(here / "out")])
    strange = [path for path in new if not any(path == root or path.startswith(f"{root}/") for root in allowed)]
    assert not strange, (what, strange)
    if (here / "out").exists():
        check_whole(here / "out")
