"""Several processes: the losses and weights of one, checkpoints that go on under another number, and how runs end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_teacher
from safetensors.torch import load_file
from test_data import letters
from train_together import LENGTH, train
from transformers import AutoModelForCausalLM

from linearize import cli, processes
from linearize.convert import convert
from linearize.distill import TransferOptions, together
from linearize.distill.interrupt import Interrupt
from linearize.errors import UsageError, UserError

TOLERANCE = 1e-4
TESTS = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
DDP = [*ACCELERATE, "--multi_gpu"]  # of CPUs too, where there is no GPU
FSDP = [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"]
# Batches of 5 and 3 rows on two processes; layers, windows and branches that a step leaves out.
KINDS = {
    "transfer": {"stage": "transfer", "window_dropout": 0.4},
    "mixing": {"stage": "mixing"},
    "blocks": {"stage": "blocks", "train": "all"},
    "logits": {"stage": "logits", "window_dropout": 0.3, "repeats": 0.5, "gradient_accumulation": 2, "batch_size": 3},
    "isolated": {"stage": "logits", "isolate": True, "ce_weight": 0.3},
    "active": {"stage": "logits", "active": "1"},
    "adapter": {"lora_rank": 2, "max_grad_norm": 0},
}
MORE = {
    "l2": {"stage": "transfer", "loss": "l2", "train": "attention", "gradient_accumulation": 2, "batch_size": 3},
    "window": {"stage": "logits", "linear_branch": False},
    "lora": {"stage": "logits", "lora_rank": 2},
    "all": {"stage": "all"},
    "merged": {"merge": True},
}
LONG = {"tokens": 5 * LENGTH * 12, "save_steps": 5, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher's folder, a student's and a text."""
    path = tmp_path_factory.mktemp("place")
    teacher = tiny_teacher(num_hidden_layers=2)
    for name, model in (("teacher", teacher), ("student", convert(teacher, "gla", window=8))):
        model.save_pretrained(path / name)
        letters().save_pretrained(path / name)
    lines = "".join(f"line {n}: the quick brown fox jumps over the lazy dog {n * n} times.\n" for n in range(300))
    (path / "text.txt").write_text(lines)
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(launcher: list[str], *args: str | Path) -> list[str]:
    port = ["--main_process_port", str(free_port())] if "accelerate.commands.launch" in launcher else []
    return [sys.executable, *launcher, *port, *map(str, args)]


def environment() -> dict[str, str]:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def launch(launcher: list[str], *args: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launcher, *args), env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def train_in_two(launcher: list[str], place: Path, out: Path, runs: dict) -> None:
    out.mkdir(exist_ok=True)
    (out / "runs.json").write_text(json.dumps(runs))
    done = launch(launcher, TESTS / "train_together.py", place, out, out / "runs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def numbers(line: dict) -> list[float]:
    values = [value for value in line.values() if not isinstance(value, str)]
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def same_run(found: Path, expected: Path) -> None:
    """The same lines of the log, the same weights, the same files."""
    log, wanted = lines_of(found), lines_of(expected)
    assert len(log) == len(wanted) > 1
    for line, other in zip(log, wanted, strict=True):
        assert line.keys() == other.keys()
        assert (line["step"], line["tokens"]) == (other["step"], other["tokens"])
        assert numbers(line) == pytest.approx(numbers(other), abs=TOLERANCE)
    files = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == files
    weights = "model.safetensors" if "model.safetensors" in files else "adapter_model.safetensors"
    ours, theirs = load_file(found / weights), load_file(expected / weights)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=TOLERANCE)


# what each process does


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_of_a_batch_belongs_to_one_process(count, monkeypatch) -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5)}
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("LOCAL_RANK", "0")
    parts = []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(together.own_rows(batch))
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    sizes = {len(part["labels"]) for part in parts}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_launchers_that_cannot_work_are_refused(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.count() == 1 and processes.is_main() and not processes.sharded()
    assert processes.from_main(lambda: 3) == 3
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="torchrun"):
        processes.count()
    done = CliRunner().invoke(cli.main, ["ls"])
    assert done.exit_code == 1 and done.output.startswith("Error: several processes were started by MPI")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK"):
        processes.count()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="--batch-size 1 is the batch of all 2 processes"):
        together.check_batch(TransferOptions(batch_size=1))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed"):
        processes.start("cpu")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        processes.start("cpu")
    done = CliRunner().invoke(cli.main, ["convert", "teacher", "--to", "gla", "-o", "out"])
    assert done.exit_code == 1 and "runs in one process" in done.output
    monkeypatch.setenv("RANK", "1")  # all fail alike: the main one says it
    done = CliRunner().invoke(cli.main, ["convert", "teacher", "--to", "gla", "-o", "out"])
    assert done.exit_code == 1 and done.output == ""


def test_processes_stop_after_the_step_that_they_agree_on(monkeypatch) -> None:
    interrupt = Interrupt()
    interrupt._note(signal.SIGTERM, None)
    assert interrupt.agreed and interrupt.exit_code == 143
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not interrupt.agreed  # the other one does not know yet
    interrupt._note(signal.SIGTERM, None)  # and a launcher's second signal does not hurry it
    interrupt.others = True
    assert interrupt.agreed


# the runs


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """The runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    train(place, out, {**KINDS, "whole": {"stage": "logits", **LONG}})
    return out


def test_two_processes_train_as_one_and_go_on_as_one(place, alone, tmp_path) -> None:
    stopped = {"stage": "logits", **LONG, "stop": 7}
    train(place, tmp_path, {"one-then-two": stopped})
    runs = {**KINDS, "one-then-two": {"stage": "logits", **LONG, "resume": True}, "two-then-one": stopped}
    train_in_two(DDP, place, tmp_path, runs)
    for name in KINDS:
        same_run(tmp_path / name, alone / name)
    work = tmp_path / "two-then-one.work/logits"
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-5"}
    assert not (tmp_path / "two-then-one").exists()
    train(place, tmp_path, {"two-then-one": {"stage": "logits", **LONG, "resume": True}})
    for name in ("one-then-two", "two-then-one"):
        same_run(tmp_path / name, alone / "whole")
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_other_kinds_in_two_processes(place, tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(place, tmp_path / "one", MORE)
    train_in_two(TORCHRUN, place, tmp_path / "two", MORE)
    for name in MORE:
        same_run(tmp_path / "two" / name, tmp_path / "one" / name)


@pytest.mark.slow
def test_fsdp_trains_as_one_process_and_its_shards_go_on_anywhere(place, alone, tmp_path) -> None:
    """Checkpoints of one process, of two with DDP and of two with FSDP, each taken up by each."""
    ways = {"one": None, "ddp": DDP, "fsdp": FSDP}
    two_kinds = {"logits": {"stage": "logits", **LONG}, "blocks": {"stage": "blocks", **LONG}}

    def runs_of(way: str, runs: dict) -> None:
        if ways[way] is None:
            train(place, tmp_path, runs)
        else:
            train_in_two(ways[way], place, tmp_path, runs)

    train(place, tmp_path, {f"whole-{kind}": options for kind, options in two_kinds.items()})
    pairs = [(before, after) for before in ways for after in ways if "fsdp" in (before, after)]
    for before in ways:
        stops = {
            f"{before}-{after}-{kind}": {**options, "stop": 7}
            for kind, options in two_kinds.items()
            for after in ways
            if (before, after) in pairs
        }
        runs_of(before, {**stops, **(KINDS if before == "fsdp" else {})})
    for name in KINDS:
        same_run(tmp_path / name, alone / name)
    assert (tmp_path / "fsdp-one-logits.work/logits/checkpoint-5/shards/.metadata").is_file()
    assert not (tmp_path / "fsdp-one-logits.work/logits/checkpoint-5/optimizer.pt").exists()
    assert (tmp_path / "one-fsdp-logits.work/logits/checkpoint-5/optimizer.pt").is_file()
    for after in ways:
        names = [
            (f"{before}-{after}-{kind}", kind) for before in ways for kind in two_kinds if (before, after) in pairs
        ]
        runs_of(after, {name: {**two_kinds[kind], "resume": True} for name, kind in names})
        for name, kind in names:
            same_run(tmp_path / name, tmp_path / f"whole-{kind}")


@pytest.mark.slow
def test_fsdp_trains_the_other_kinds_as_one_process(place, tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(place, tmp_path / "one", MORE)
    train_in_two(FSDP, place, tmp_path / "two", MORE)
    for name in MORE:
        same_run(tmp_path / "two" / name, tmp_path / "one" / name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_gpus_train_as_one(place, launcher, tmp_path) -> None:
    runs = {name: {**options, "device": None} for name, options in KINDS.items()}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(place, tmp_path / "one", runs)
    train_in_two(launcher, place, tmp_path / "two", runs)
    for name in KINDS:
        same_run(tmp_path / "two" / name, tmp_path / "one" / name)


# the command line


def options_of(place: Path, out: Path) -> list[str | Path]:
    options = ["--dataset", place / "text.txt", "--max-length", str(LENGTH), "--batch-size", "4", "--log-steps", "2"]
    return [place / "student", "--teacher", place / "teacher", *options, "--device", "cpu", "-o", out]


def errors_in(text: str) -> list[str]:
    """What linearize said; the launcher has its own to say."""
    return re.findall(r"(?<!\w)Error: .+", text)


FAULT = """
import os, signal, sys
from linearize import cli
from linearize.distill.trainer import StageTrainer
from linearize.errors import UserError

step = StageTrainer.training_step

def faulty(self, *args, **kwargs):
    if self.state.global_step == 4 and os.environ["RANK"] == "1":
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("this process alone has a fault")
    return step(self, *args, **kwargs)

StageTrainer.training_step = faulty
fault = sys.argv.pop()
cli.run()
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", "Error: this process alone has a fault"),
        pytest.param("killed", "Error: another process of this run has ended without a word", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_one_process_ends_all_with_one_message(place, tmp_path, fault, said) -> None:
    (tmp_path / "faulty.py").write_text(FAULT)
    out = tmp_path / "out"
    options = [*options_of(place, out), "--stage", "transfer", "--tokens", "12800", "--save-steps", "3", fault]
    began = time.monotonic()
    done = launch(TORCHRUN, tmp_path / "faulty.py", "distill", *options)
    assert done.returncode != 0 and done.stdout == ""
    messages = errors_in(done.stderr)
    assert len(messages) == 1 and messages[0].startswith(said), done.stderr
    assert time.monotonic() - began < 120  # and not a collective's half hour
    assert not out.exists() and not list(tmp_path.glob(".*"))
    # the checkpoint before it is whole, for either number of processes
    assert (tmp_path / "out.work/transfer/checkpoint-3/trainer_state.json").is_file()


def test_the_command_line_prints_and_writes_once(place, tmp_path) -> None:
    out = tmp_path / "out"
    options = [*options_of(place, out), "--stage", "transfer", "--tokens", "1024", "--json"]
    done = launch(TORCHRUN, "-m", "linearize.cli", "distill", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["stages"][0]["steps"] == 8 and told["stages"][0]["tokens"] == 1024
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "linearize"
    record = json.loads((out / "linearize.json").read_text())
    assert record["tokens"] == 1024 and record["options"]["transfer"]["batch_size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_leaves_a_checkpoint(place, tmp_path, number) -> None:
    out = tmp_path / "out"
    options = [*options_of(place, out), "--stage", "transfer", "--tokens", "40960"]
    log = out.with_name("out.work") / "transfer" / "loss.jsonl"
    with subprocess.Popen(
        command(TORCHRUN, "-m", "linearize.cli", "distill", *options),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        while not log.is_file() and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(number)
        _, said = running.communicate(timeout=120)
    assert running.returncode != 0 and said.count("stopped at step") == 1 and not errors_in(said)
    checkpoints = list(log.parent.glob("checkpoint-*/trainer_state.json"))
    assert len(checkpoints) == 1 and not out.exists()
    # one process goes on where two stopped
    done = launch([], "-m", "linearize.cli", "distill", *options, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "whole"
    options[options.index(out)] = whole
    assert launch([], "-m", "linearize.cli", "distill", *options).returncode == 0
    same_run(out, whole)


RECIPE = """
name: two
convert: {to: gla, window: 8}
stages:
  - {name: near, kind: transfer, share: 1, learning_rate: 1e-2}
  - {name: far, kind: logits, share: 1, learning_rate: 1e-3, window_dropout: 0.3, repeats: 0.5}
  - {name: tune, kind: finetune, share: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_recipe_in_two_processes(place, launcher, tmp_path) -> None:
    (tmp_path / "two.yaml").write_text(RECIPE)
    sets = [f"stages.*.{key}" for key in (f"max_length={LENGTH}", "batch_size=4", "log_steps=2")]
    options = ["--dataset", place / "text.txt", "--tokens", "1536", "--device", "cpu", "--json"]
    options += [word for setting in sets for word in ("--set", setting)]

    def run(launcher: list[str], out: str, *more: str) -> dict:
        call = ("-m", "linearize.cli", "run", tmp_path / "two.yaml", place / "teacher", "-o", tmp_path / out)
        done = launch(launcher, *call, *options, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    one, two = run([], "one"), run(launcher, "two")
    same_run(tmp_path / "two", tmp_path / "one")
    facts = [[(s["name"], s["steps"], s["tokens"]) for s in told["stages"]] for told in (one, two)]
    assert facts[0] == facts[1] and facts[0][1] == ("near", 4, 512)
    # the last stage alone is made again
    (tmp_path / "two").rename(tmp_path / "before")
    before = (tmp_path / "two.work/3-far").stat().st_mtime_ns
    run(launcher, "two", "--resume")
    assert (tmp_path / "two.work/3-far").stat().st_mtime_ns == before
    same_run(tmp_path / "two", tmp_path / "one")
