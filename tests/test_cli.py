"""The command line: every verb end to end on a tiny model, and what is said of bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MIXER_NAMES, tiny_teacher
from families import CONVERTED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, MptConfig, PreTrainedTokenizerFast, T5Config
from verbs import done, error_of, run

from linearize import __version__, cli
from linearize.cli import main
from linearize.distill.trainer import StageTrainer
from linearize.modeling import LinearizeForCausalLM

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
VOCAB = 264
# Longer than the window, so that the linear branch has something to do.
TRAIN = ["--max-length", "32", "--batch-size", "2"]
EVALUATE = ["--context", "32", "--sequences", "3", "--recall-length", "12", "--recall-passages", "2"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def teacher_at(folder: Path, **overrides) -> Path:
    tiny_teacher(vocab_size=VOCAB, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Place:
    """A folder with what the verbs read; `place["name"]` is a path in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("models")
    teacher_at(folder / "teacher")
    rows(
        folder / "text.jsonl",
        *({"text": f"Document {i} says that the sum of {i} and {3 * i} is {4 * i}. " * 3} for i in range(60)),
    )
    rows(
        folder / "chat.jsonl",
        *(
            {
                "messages": [
                    {"role": "user", "content": f"{i}+1?"},
                    {"role": "assistant", "content": f"It is {i + 1}."},
                ]
            }
            for i in range(30)
        ),
    )
    done("convert", folder / "teacher", "--to", "linear", "--window", "8", "-o", folder / "student")
    return Place(folder)


# -- what the verbs do


def test_help_and_version():
    assert __version__ in done("--version")
    for verb in main.commands:
        assert f"linearize {verb}" in done(verb, "--help")


def test_ls():
    lists = json.loads(done("ls", "--json"))
    assert sorted(lists["mixers"]) == sorted(MIXER_NAMES)
    assert sorted(lists["families"]) == sorted({name.partition("+")[0] for name in CONVERTED})
    assert done("ls", "mixers").splitlines()[1].split()[0] == "based"
    assert list(json.loads(done("ls", "families", "--json"))) == ["families"]


def test_convert(place, tmp_path, mixer_name):
    result = run("convert", place["teacher"], "--to", mixer_name, "-o", tmp_path / "student", "--json")
    facts = json.loads(result.stdout)  # while progress went to stderr
    assert "Writing model shards" in result.stderr
    assert facts["out"] == str(tmp_path / "student") and facts["mixer"] == mixer_name
    assert facts["mixer_options"] == {"window": 64, "sinks": 1}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert isinstance(model, LinearizeForCausalLM)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    record = json.loads((tmp_path / "student" / "linearize.json").read_text())
    assert record["stage"] == "convert" and record["parent"] == place["teacher"] and record["parent_hash"]
    assert record["versions"]["linearize"] == __version__
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_linearize.py"):
        assert (tmp_path / "student" / name).is_file()
    assert listing(tmp_path) == ["student", *sorted(f"student/{name}" for name in listing(tmp_path / "student"))]


@pytest.mark.parametrize(
    ("flags", "mixers", "heads", "options"),
    [
        (["--keep-softmax", "1"], ["linear", "softmax"], [], {"window": 64, "sinks": 1}),
        (["--keep-softmax", "every:2"], ["linear", "softmax"], [], {"window": 64, "sinks": 1}),
        (["--keep-softmax", "heads:0.1,0.2"], ["linear", "linear"], [1, 2], {"window": 64, "sinks": 1}),
        (
            ["--window", "0", "--feature-map", "t2r"],
            ["linear"] * 2,
            [],
            {"window": 0, "sinks": 0, "feature_map": "t2r"},
        ),
        (
            ["--sinks", "4", "--state-heads", "query"],
            ["linear"] * 2,
            [],
            {"window": 64, "sinks": 4, "state_heads": "query"},
        ),
        (["--mixer-option", "gains=false"], ["linear"] * 2, [], {"window": 64, "sinks": 1, "gains": False}),
    ],
)
def test_convert_options(place, tmp_path, flags, mixers, heads, options):
    text = done("convert", place["teacher"], "--to", "linear", "-o", tmp_path / "student", *flags)
    assert "next: linearize distill" in text
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "student").config
    assert [layer["mixer"] for layer in config.layers] == mixers
    assert config.layers[0].get("softmax_heads", []) == heads
    assert config.mixer_options == options


def test_shards_and_precision(place, tmp_path):
    out = tmp_path / "deep" / "er" / "student"
    done("convert", place["teacher"], "--to", "gla", "--dtype", "bf16", "--max-shard-size", "50KB", "-o", out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    dtypes = {name: p.dtype for name, p in AutoModelForCausalLM.from_pretrained(out).named_parameters()}
    assert {dtypes[name] for name in dtypes if ".mixer." not in name} == {torch.bfloat16}
    assert {dtypes[name] for name in dtypes if ".mixer." in name} == {torch.float32}


def test_dry_run_is_the_plan_and_writes_nothing(place, tmp_path):
    flags = [place["teacher"], "--to", "gla", "--mixer-option", "gate_rank=4", "--keep-softmax", "0"]
    dry = json.loads(done("convert", *flags, "-o", tmp_path / "student", "--dry-run", "--json"))
    assert dry.pop("out") is None
    assert dry == json.loads(done("plan", *flags, "--json"))
    assert "model.layers.1.self_attn.mixer.gate_up" in done("convert", *flags, "-o", tmp_path / "student", "--dry-run")
    assert listing(tmp_path) == []


def test_the_whole_way(place, tmp_path):
    """distill, finetune as an adapter and merged, eval of both, generate."""
    data, teacher = place["text.jsonl"], place["teacher"]
    common = ["--dataset", data, "--tokens", "1500", *TRAIN]
    near, adapter, tuned = (tmp_path / name for name in ("near", "adapter", "tuned"))
    result = run("distill", place["student"], "--teacher", teacher, *common, "-o", near, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [stage["stage"] for stage in facts["stages"]] == ["transfer", "logits"]
    assert all(stage["steps"] and stage["tokens"] and stage["loss"] is not None for stage in facts["stages"])
    assert "transfer" in result.stderr and "it/s" in result.stderr
    done("finetune", near, "--dataset", place["chat.jsonl"], "--tokens", "640", *TRAIN, "-o", adapter)
    text = done("finetune", near, *common, "--lora-rank", "2", "--merge", "-o", tuned)
    assert "finetune: " in text and f"linearize generate {tuned}" in text
    assert (adapter / "adapter_config.json").is_file() and not (tuned / "adapter_config.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "near", "tuned"]  # no work folders stay
    history = json.loads((tuned / "linearize.json").read_text())["history"]
    assert [record["stage"] for record in history] == ["convert", "all"]
    for model in (adapter, tuned):
        measured = json.loads(done("eval", model, "--dataset", data, "--teacher", teacher, *EVALUATE, "--json"))
        assert measured["perplexity"]["ratio"] > 0
        continued = json.loads(done("generate", model, "Document 7", "--max-new-tokens", "6", "--json"))
        assert continued["prompt"] == "Document 7" and continued["text"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage", "transfer", "--lr-scale", "map_q=0.1", "--isolate"],
        ["--stage", "logits", "--lora-rank", "2", "--learning-rate", "1e-3"],
        ["--stage", "logits", "--train", "new", "--no-gradient-checkpointing", "--temperature", "2"],
    ],
)
def test_distill_stages(place, tmp_path, flags):
    common = ["--dataset", place["text.jsonl"], "--tokens", "256", *TRAIN]
    text = done("distill", place["student"], "--teacher", place["teacher"], *common, *flags, "-o", tmp_path / "out")
    assert text.startswith(f"{flags[1]}: 4 steps, 256 tokens, loss ")


def test_resume(place, tmp_path, monkeypatch):
    common = ["distill", place["student"], "--teacher", place["teacher"], "--dataset", place["text.jsonl"], *TRAIN]
    common += ["--tokens", "640", "--stage", "transfer", "--save-steps", "3", "--log-steps", "1"]
    done(*common, "-o", tmp_path / "straight")
    step, taken = StageTrainer.training_step, []

    def stopped(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stopped)
    broken = run(*common, "-o", tmp_path / "out", "--work-dir", tmp_path / "work")
    monkeypatch.undo()
    assert broken.exit_code == 1 and not (tmp_path / "out").exists()
    assert "--resume" in error_of(run(*common, "-o", tmp_path / "out", "--work-dir", tmp_path / "work"))
    done(*common, "-o", tmp_path / "out", "--work-dir", tmp_path / "work", "--resume")
    for name in ("model.safetensors", "loss.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_eval(place):
    flags = ["--dataset", place["text.jsonl"], *EVALUATE]
    result = run("eval", place["student"], "--teacher", place["teacher"], *flags, "--json")
    facts = json.loads(result.stdout)
    assert "evaluating" in result.stderr
    for part in (facts, facts["linear_off"]):
        figures = (*part["perplexity"].values(), part["kl"], part["recall"]["student"], part["recall"]["teacher"])
        assert all(isinstance(figure, float) for figure in figures)
        assert set(part["perplexity"]) == {"student", "teacher", "ratio"}
    assert facts["kl"] != facts["linear_off"]["kl"]
    assert facts["tokens"] == 96
    table = done("eval", place["student"], "--teacher", place["teacher"], *flags)
    *lines, note = table.splitlines()
    assert note == "kv@512: none, too short to hide 8 facts in prose"
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "teacher",
        place["student"],
        f"{place['student']}, linear branch off",
        f"{place['student']}, window off",
        f"{place['student']}, window alone untrained",
    ]
    alone = json.loads(done("eval", place["student"], *flags, "--no-branches", "--json"))
    assert alone["kl"] is alone["perplexity"]["ratio"] is alone["linear_off"] is None
    assert alone["perplexity"]["student"] == pytest.approx(facts["perplexity"]["student"])


def test_eval_has_text_of_its_own(place):
    facts = json.loads(done("eval", place["teacher"], *EVALUATE, "--json"))
    assert facts["tokens"] == 96 and facts["linear_off"] is None


def test_generate(place):
    flags = ["generate", place["student"], "Document 3", "--max-new-tokens", "8"]
    text = json.loads(done(*flags, "--json"))["text"]
    assert done(*flags) == text + "\n"
    assert json.loads(done(*flags, "--chat", "--json"))["text"] != text
    warm = [done(*flags, "--temperature", "2", "--seed", str(seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_json_stands_alone_on_stdout(place, tmp_path):
    """In a process of its own, where libraries may write to the real file descriptors."""
    common = ["--dataset", place["text.jsonl"], "--tokens", "256", *TRAIN, "--stage", "transfer"]
    command = ["distill", place["student"], "--teacher", place["teacher"], *common, "-o", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "linearize.cli", *command, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stages"][0]["steps"] == 4
    assert "transfer" in result.stderr


def test_the_script_leaves_with_the_code_of_the_verb(monkeypatch, tmp_path, capsys):
    codes: list[int] = []
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    monkeypatch.setattr("os._exit", codes.append)
    for words in (["ls"], ["plan", str(tmp_path), "--to", "linear"], ["plan"]):
        monkeypatch.setattr("sys.argv", ["linearize", *words])
        cli.run()
    assert codes == [0, 1, 2]


# -- bad input


@pytest.fixture(scope="module")
def bad(place) -> Place:
    """The same folder, and in it all that no verb should take."""
    folder = place.folder
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder / "bert")
    T5Config().save_pretrained(folder / "t5")
    MptConfig(d_model=32, n_layers=1, n_heads=2).save_pretrained(folder / "mpt")
    teacher_at(folder / "deeper", num_hidden_layers=3)
    tiny_teacher(vocab_size=VOCAB + 8).save_pretrained(folder / "wider")
    (folder / "nothing").mkdir()
    (folder / "notes.md").write_text("no model")
    for name in ("cut", "corrupt", "lacking", "strange", "martian"):
        shutil.copytree(folder / "teacher", folder / name)
    weights = (folder / "teacher" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-1000])
    (folder / "corrupt" / "model.safetensors").write_bytes(b"\xff" * 64 + weights[64:])
    (folder / "lacking" / "model.safetensors").unlink()
    (folder / "strange" / "config.json").write_text('{"model_type": ')
    (folder / "martian" / "config.json").write_text('{"model_type": "martian"}')
    (folder / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 9, 4) + b"\x14\0\0\0\0\0\0\0general.arch")
    (folder / "no.gguf").write_bytes(b"LLAMA and nothing else")
    (folder / "empty.jsonl").write_text("")
    rows(folder / "titles.jsonl", {"title": "a"})
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "short.jsonl").write_text('{"text": "a"}\n')
    shutil.copytree(folder / "student", folder / "taken")
    return place


CONVERT = "convert {teacher} --to linear -o {out}"
DISTILL = "distill {student} --teacher {teacher} --dataset {text.jsonl} --max-length 32 --batch-size 2 -o {out}"
FINETUNE = "finetune {student} --dataset {text.jsonl} --max-length 32 --batch-size 2 -o {out}"
EVAL = "eval {student} --teacher {teacher} --dataset {text.jsonl} --context 32"
GENERATE = "generate {student} hello"


@pytest.mark.parametrize(
    ("code", "command", "message"),
    [
        # mixers and their options
        (2, "convert {teacher} --to lineer -o {out}", "did you mean 'linear'?"),
        (2, "plan {teacher} --to mamba", "did you mean 'mamba2'?"),
        (2, "convert {teacher} --to transformer -o {out}", "based, gated_delta, gla, linear, mamba2, retention"),
        (2, CONVERT + " --mixer-option nonsense=1", "no option 'nonsense'. It has: feature_map"),
        (2, "convert {teacher} --to gla --mixer-option gate_rnk=2 -o {out}", "did you mean 'gate_rank'?"),
        (2, "convert {teacher} --to gla --mixer-option gate_rank=few -o {out}", "must be int, got 'few'"),
        (2, CONVERT + " --mixer-option num_heads=2", "no option 'num_heads'"),
        (2, CONVERT + " --mixer-option nonsense", "NAME=VALUE"),
        (2, CONVERT + " --mixer-option window=4", "a flag of its own, --window 4"),
        (2, CONVERT + " --feature-map cosine", "--feature-map 'cosine' is unknown"),
        (2, "convert {teacher} --to based --feature-map elu -o {out}", "based has no option 'feature_map'"),
        (2, "convert {teacher} --to based --feature-dim 17 -o {out}", "--feature-dim must be from 1 to"),
        (2, CONVERT + " --state-heads value", "--state-heads"),
        (2, CONVERT + " --window -1", "--window must be at least 0, got -1"),
        (2, CONVERT + " --window 0 --sinks 1", "--sinks"),
        (2, CONVERT + " --sinks -1", "--sinks"),
        (2, CONVERT + " --max-shard-size big", "--max-shard-size"),
        (2, CONVERT + " --dtype int3", "--dtype: unknown 'int3'"),
        (2, CONVERT + " --device toaster", "--device"),
        # --keep-softmax
        (2, CONVERT + " --keep-softmax 2", "layer 2 is out of range, the model has layers 0 to 1"),
        (2, CONVERT + " --keep-softmax heads:1.4", "head 1.4 is out of range, layer 1 has heads 0 to 3"),
        (2, CONVERT + " --keep-softmax heads:2.0", "layer 2 is out of range"),
        (2, CONVERT + " --keep-softmax every:3", "keeps nothing"),
        (2, CONVERT + " --keep-softmax some", "is not understood; give layers '0,7,14'"),
        # models
        (1, "convert {nowhere} --to linear -o {out}", "there is no such file or folder"),
        (1, "convert {nothing} --to linear -o {out}", "is not a model"),
        (1, "convert {notes.md} --to linear -o {out}", "is not a model"),
        (1, "convert {bert} --to linear -o {out}", "'bert' is an encoder; linearize converts decoder-only"),
        (1, "convert {t5} --to linear -o {out}", "'t5' is an encoder-decoder"),
        (1, "plan {mpt} --to linear", "Wqkv (Linear)"),
        (1, "plan {t5} --to linear", "'t5' is an encoder-decoder"),
        (1, "convert {student} --to linear -o {out}", "already converted"),
        (1, "plan {student} --to linear", "already converted"),
        (1, "convert {strange} --to linear -o {out}", "reading the config"),
        (1, "convert {martian} --to linear -o {out}", "does not know its model type"),
        (1, "convert {teacher}/config.json --to linear -o {out}", "a config alone"),
        (1, "convert {cut} --to linear -o {out}", "model.safetensors is truncated"),
        (1, "convert {corrupt} --to linear -o {out}", "model.safetensors is corrupt"),
        (1, "convert {lacking} --to linear -o {out}", "no weights"),
        (1, "convert {cut.gguf} --to linear -o {out}", "cut.gguf is truncated"),
        (1, "convert {no.gguf} --to linear -o {out}", "is not a GGUF file"),
        (1, "convert {teacher} --gguf-file x.gguf --to linear -o {out}", "--gguf-file"),
        (1, "distill {teacher} --teacher {teacher} --dataset {text.jsonl} -o {out}", "convert it first: linearize"),
        (1, "generate {cut} hello", "truncated"),
        (1, "eval {bert}", "no weights"),
        # pairs
        (1, DISTILL + " --teacher {wider}", "vocab_size is 264 in the student and 272 in the teacher"),
        (1, DISTILL + " --teacher {deeper}", "num_hidden_layers is 2 in the student and 3"),
        (1, EVAL + " --teacher {wider}", "the student's has 264 tokens, the teacher's 272"),
        # data
        (1, DISTILL + " --dataset {empty.jsonl}", "is empty"),
        (1, DISTILL + " --dataset {titles.jsonl}", "titles.jsonl:1 has no field 'text'; it has: title"),
        (1, DISTILL + " --text-field body", "--text-field"),
        (1, DISTILL + " --dataset {broken.jsonl}", "broken.jsonl:2: not a JSON object"),
        (1, DISTILL + " --dataset {nowhere.jsonl}", "there is no file"),
        (1, DISTILL + " --dataset {short.jsonl}", "fewer than one sequence"),
        (1, FINETUNE + " --dataset {empty.jsonl}", "is empty"),
        (1, EVAL + " --dataset {titles.jsonl}", "has no field 'text'"),
        (1, EVAL + " --dataset {nowhere.jsonl}", "there is no file"),
        (1, EVAL + " --context 1000000", "lower --context"),
        # output
        (2, "convert {teacher} --to linear -o {taken}", "exists; choose another name, or pass --overwrite"),
        (2, "convert {teacher} --to linear -o {taken} --dry-run", "exists"),
        (2, "convert {teacher} --to linear -o {notes.md}/out", "is a file"),
        (2, DISTILL + " -o {taken}", "exists"),
        (2, FINETUNE + " -o {taken}", "exists"),
        (2, "convert {teacher} --to linear -o {nothing} --overwrite --dtype int3", "--dtype"),
        # numbers of training, evaluation and generation
        (2, DISTILL + " --learning-rate -1 --stage transfer", "--learning-rate must be positive, got -1"),
        (2, DISTILL + " --learning-rate 1e-3", "--learning-rate with --stage all"),
        (2, DISTILL + " --tokens 0", "--tokens must be positive, got 0"),
        (2, DISTILL + " --tokens 8", "--tokens 8 is less than one sequence"),
        (2, DISTILL + " --stage everything", "--stage must be one of"),
        (2, DISTILL + " --stage transfer --temperature 2", "'temperature'"),
        (2, DISTILL + " --lr-scale gain", "NAME=VALUE"),
        (2, DISTILL + " --lr-scale gain=lots", "'lots' is not a number"),
        (2, DISTILL + " --lr-scale (=1", "not a regular expression"),
        (2, DISTILL + " --dtype int3", "--dtype"),
        (2, DISTILL + " --device toaster", "--device"),
        (2, FINETUNE + " --lora-rank 0", "--lora-rank must be positive"),
        (2, EVAL + " --sequences 0", "--sequences"),
        (2, GENERATE + " --max-new-tokens 0", "--max-new-tokens"),
        (2, GENERATE + " --temperature -1", "--temperature"),
    ],
)
def test_bad_input(bad, tmp_path, code, command, message):
    before = listing(bad.folder)
    names = {"out": str(tmp_path / "out")}
    args = []
    for word in command.split():
        for name in ("nowhere", *os.listdir(bad.folder), "nowhere.jsonl", "out"):
            word = word.replace("{" + name + "}", names.get(name, bad[name]))
        args.append(word)
    result = run(*args)
    assert message in error_of(result)
    assert result.exit_code == code
    assert listing(tmp_path) == [] and listing(bad.folder) == before


@pytest.mark.parametrize(
    "command",
    [
        "convert {teacher} -o {out}",
        "convert --to linear -o {out}",
        "convert {teacher} --to linear",
        CONVERT + " --bogus",
        CONVERT + " --seed abc",
        "distill {student} -o {out}",
        "generate {student}",
        "ls kernels",
        "nonsense",
    ],
)
def test_wrong_usage(place, tmp_path, command):
    args = command.format(teacher=place["teacher"], student=place["student"], out=tmp_path / "out").split()
    result = run(*args)
    assert result.exit_code == 2 and "Usage: linearize" in result.stderr and "Error: " in error_of(result)
    assert listing(tmp_path) == []


def test_a_name_that_the_hub_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("convert", "nobody/nothing-at-all", "--to", "linear", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no folder of this name here" in error_of(result)
    assert listing(tmp_path) == []


def test_traceback_on_request(bad, tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_DEBUG", "1")
    result = run("convert", bad["nothing"], "--to", "linear", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "Error: " in result.stderr.splitlines()[-1]


def test_what_was_not_foreseen_is_one_line_too(place, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(LinearizeForCausalLM, "save_pretrained", fails)
    result = run("convert", place["teacher"], "--to", "linear", "-o", tmp_path / "out")
    assert (
        result.exit_code == 1
        and "RuntimeError: first second" in error_of(result)
        and "LINEARIZE_DEBUG" in error_of(result)
    )
    assert listing(tmp_path) == []


def fill_the_disk(monkeypatch) -> None:
    def full(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LinearizeForCausalLM, "save_pretrained", full)


def test_overwrite_keeps_the_old_until_the_new_is_whole(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert = ["convert", place["teacher"], "--to", "gla", "-o", out, "--overwrite"]
    shutil.copytree(place["student"], out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        assert "the disk is full" in error_of(run(*convert))
    assert {path: path.read_bytes() for path in out.iterdir()} == before and os.listdir(tmp_path) == ["out"]
    done(*convert)
    assert AutoModelForCausalLM.from_pretrained(out).config.layers[0]["mixer"] == "gla"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("command", [CONVERT, DISTILL + " --tokens 256", FINETUNE + " --tokens 128 --merge"])
def test_full_disk(place, tmp_path, monkeypatch, command):
    fill_the_disk(monkeypatch)
    for name in ("teacher", "student", "text.jsonl"):
        command = command.replace("{" + name + "}", place[name])
    result = run(*command.replace("{out}", str(tmp_path / "deep" / "out")).split())
    assert result.exit_code == 1 and "the disk is full" in error_of(result)
    left = [name for name in listing(tmp_path) if not name.startswith("deep/out.work")]
    assert left in ([], ["deep"])  # checkpoints stay, for --resume


def test_a_disk_that_is_really_full(place, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        result = run("convert", place["teacher"], "--to", "linear", "-o", disk / "out")
        assert result.exit_code == 1 and "the disk is full" in error_of(result)
        assert listing(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_terminated_verb_leaves_nothing_half_written(tmp_path):
    code = """
import sys, time
import linearize.cli as cli
from linearize.output import new_folder
def main():
    with new_folder(sys.argv[1]) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
cli.main = main
cli.run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "writing\n"
    assert list(tmp_path.iterdir())
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert list(tmp_path.iterdir()) == []
