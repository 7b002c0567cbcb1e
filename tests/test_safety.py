"""What comes from others is data: no pickle is loaded, no code runs that nobody asked for, in no file of any kind."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors import safe_open
from test_cli import DISTILL, TRAIN, place  # noqa: F401  (place is a fixture)
from transformers import AutoModelForCausalLM
from verbs import done, error_of, run

import linearize
from linearize.convert import convert
from linearize.modeling.modeling_linearize import AUTO_MAP
from linearize.source import ModelSource, load_model

PACKAGE = Path(linearize.__file__).parent
SITTING = 4500  # lines


class Trap:
    """Pickled, a call of os.mkdir when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A path that is made where a trap goes off."""
    return tmp_path / "sprung"


def trap(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(mark)))


def code(mark: Path) -> str:
    return f"import os\nos.mkdir({str(mark)!r})\n"


# -- pickles


def test_the_package_calls_nothing_that_runs_what_it_reads():
    """No pickles, no eval, no shell, no code of others by default; YAML by safe loaders alone."""
    loaders = {"_Loader", "_Names"}  # recipes' own and that of lm-eval's task files, both SafeLoaders
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}, where
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "np.load"), where
            assert called != "torch.load" or given.get("weights_only") == "True", where
            assert given.get("shell") != "True" and given.get("trust_remote_code") != "True", where
            assert given.get("weights_only") != "False" and given.get("allow_pickle") != "True", where
            assert called != "yaml.load" or given["Loader"] in loaders, where
            assert called not in ("yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), where
    from yaml import SafeLoader

    from linearize.evaluate.task_files import _Names
    from linearize.recipes.document import _Loader

    assert issubclass(_Loader, SafeLoader) and issubclass(_Names, SafeLoader)
    assert "!" not in SafeLoader.yaml_multi_constructors  # what a task's file may hold is its loader's alone


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"])
def test_a_pickle_in_a_models_folder_is_left_alone(place, tmp_path, mark, name):  # noqa: F811
    folder = Path(shutil.copytree(place["teacher"], tmp_path / "model"))
    trap(folder / name, mark)
    done("convert", folder, "--to", "linear", "-o", tmp_path / "out")  # there are safetensors too
    (folder / "model.safetensors").unlink()
    assert "no weights" in (text := error_of(run("convert", folder, "--to", "linear", "-o", tmp_path / "no"))) or (
        "pickles" in text and "not loaded" in text
    )
    assert not mark.exists() and not (tmp_path / "no").exists()


def test_an_adapter_that_is_a_pickle_is_refused(place, tmp_path, mark):  # noqa: F811
    adapter = tmp_path / "adapter"
    done("finetune", place["student"], "--dataset", place["text.jsonl"], "--tokens", "128", *TRAIN, "-o", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    trap(adapter / "adapter_model.bin", mark)
    text = error_of(run("generate", adapter, "hello"))
    assert "no adapter_model.safetensors" in text and "pickles are not loaded" in text and not mark.exists()


def test_a_checkpoint_is_resumed_without_running_what_lies_in_it(place, tmp_path, mark, monkeypatch):  # noqa: F811
    """The Trainer keeps its optimizer as torch.save does; torch reads tensors and numbers back, and nothing else."""
    from linearize.distill.trainer import StageTrainer

    names = {name: place[name] for name in ("student", "teacher", "text.jsonl")} | {"out": str(tmp_path / "out")}
    words = DISTILL
    for name, path in names.items():
        words = words.replace("{" + name + "}", path)
    words = [*words.split(), *["--stage", "transfer", "--tokens", "256", "--save-steps", "1"]]
    step, taken = StageTrainer.training_step, []

    def stopped(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stopped)
    run(*words)
    monkeypatch.undo()
    checkpoint = tmp_path / "out.work" / "transfer" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt"):
        whole = (checkpoint / name).read_bytes()
        trap(checkpoint / name, mark)
        assert "cannot be read" in error_of(run(*words, "--resume")) and not mark.exists()
        (checkpoint / name).write_bytes(whole)
    torch.save(Trap(mark), checkpoint / "rng_state.pth")
    assert "cannot be read" in error_of(run(*words, "--resume")) and not mark.exists()


def test_what_is_written_is_safetensors(place, tmp_path):  # noqa: F811
    for verb in ("convert {teacher} --to gla", "distill {student} --teacher {teacher} --dataset {text.jsonl}"):
        for name in ("teacher", "student", "text.jsonl"):
            verb = verb.replace("{" + name + "}", place[name])
        words = verb.split() + (["--tokens", "128", *TRAIN, "--stage", "transfer"] if "distill" in verb else [])
        out = tmp_path / words[0]
        done(*words, "-o", out)
        kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
        assert kinds <= {".safetensors", ".json", ".jsonl", ".py", ".jinja", ".png"}, kinds
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.keys()


# -- code of others


def with_code(folder: Path, mark: Path) -> Path:
    """A model whose config names code of its own."""
    (folder / "configuration_own.py").write_text(
        code(mark) + "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "plan {own} --to gla",
        "convert {own} --to gla -o {out}",
        "eval {own}",
        "generate {own} hello",
        "run default {own} --dataset {text.jsonl} --tokens 1000000 -o {out}",
        "distill {student} --teacher {own} --dataset {text.jsonl} --tokens 128 --max-length 32 --batch-size 2 -o {out}",
        "bench model {student} --teacher {own} --contexts 1 --device cpu",
    ],
)
def test_code_of_a_repository_runs_when_asked_for_alone(place, tmp_path, mark, command):  # noqa: F811
    own = with_code(Path(shutil.copytree(place["teacher"], tmp_path / "own")), mark)
    names = {"own": str(own), "out": str(tmp_path / "out")}
    names |= {name: place[name] for name in ("student", "text.jsonl")}
    for name, path in names.items():
        command = command.replace("{" + name + "}", path)
    result = run(*command.split())
    assert result.exit_code == 1 and "--trust-remote-code" in error_of(result)
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_trust_remote_code_runs_it(place, tmp_path, mark):  # noqa: F811
    own = with_code(Path(shutil.copytree(place["teacher"], tmp_path / "own")), mark)
    run("plan", own, "--to", "gla", "--trust-remote-code")
    assert mark.exists()


def test_a_tokenizer_s_code_runs_when_asked_for_alone(place, tmp_path, mark):  # noqa: F811
    folder = Path(shutil.copytree(place["teacher"], tmp_path / "own"))
    (folder / "tokenization_own.py").write_text(code(mark))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run("convert", folder, "--to", "gla", "-o", tmp_path / "out")
    assert not mark.exists()
    assert result.exit_code == 0 or "--trust-remote-code" in error_of(result)


def test_a_students_folder_is_never_asked_for_its_code(tmp_path, mark):
    from conftest import tiny_teacher

    convert(tiny_teacher(), "linear").save_pretrained(tmp_path / "student")
    for file in (tmp_path / "student").glob("*.py"):
        file.write_text(code(mark))
    for trust in (False, True):
        load_model(ModelSource(str(tmp_path / "student"), trust_remote_code=trust))
    AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True)  # linearize is imported
    assert not mark.exists()


# -- recipes and data sets


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{mark}]", "!!python/object/new:os.mkdir [{mark}]"])
def test_a_recipe_is_data(place, tmp_path, mark, tag):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(f"name: x\nconvert: {tag.format(mark=mark)}\n")
    command = ["run", tmp_path / "recipe.yaml", place["teacher"], "--dataset", place["text.jsonl"]]
    result = run(*command, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "is no YAML" in error_of(result) and not mark.exists()
    setting = f"convert.to={tag.format(mark=mark)}"
    result = run("run", "default", *command[2:], "--set", setting, "-o", tmp_path / "out")
    assert result.exit_code == 2 and not mark.exists()


def test_a_data_set_brings_no_code(place, tmp_path, mark, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    Path("evil").mkdir()
    Path("evil/evil.py").write_text(code(mark))
    trap(Path("rows.pkl"), mark)
    for spec in ("evil", "evil:default", "evil/evil.py", "./evil/evil.py", "rows.pkl"):
        result = run("eval", place["student"], "--dataset", spec)
        assert result.exit_code == 1 and "--dataset" in error_of(result)
        assert not mark.exists()


def test_the_hub_is_asked_for_data_alone(monkeypatch):
    from linearize.rows import load_rows

    asked = {}

    def fake(name, config, **options):
        asked.update(options)
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load_rows("some/data@v1:default:test")
    assert asked == {"split": "test", "revision": "v1", "streaming": False}
    assert int(datasets.__version__.split(".")[0]) >= 4  # which runs no scripts
    assert '"datasets>=4' in (PACKAGE.parent / "pyproject.toml").read_text()


# -- a converted model's code


def test_the_code_beside_the_weights_is_one_flat_folder_to_read(tmp_path):
    """Nothing that the model does not import, no folder, and no more than one reads in a sitting."""
    from conftest import tiny_teacher

    convert(tiny_teacher(), "linear").save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    needed: set[str] = set()
    queue = [name.split(".")[0] for name in AUTO_MAP.values()]
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            text = (tmp_path / f"{name}.py").read_text()
            queue += re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)
    copied = {path.stem for path in tmp_path.glob("*.py")}
    assert copied == needed == {path.stem for path in (PACKAGE / "modeling").glob("*.py")} - {"__init__"}
    lines = [len(path.read_text().splitlines()) for path in tmp_path.glob("*.py")]
    assert sum(lines) < SITTING and max(lines) < 500
