"""Recipes: every shipped one from end to end, what is refused, and runs that stop and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_teacher
from safetensors.torch import load_file, save_file
from test_data import letters
from test_distill_kinds import sigterm_at
from transformers import AutoModelForCausalLM

from linearize import cli
from linearize.distill.trainer import StageTrainer
from linearize.errors import UsageError, UserError
from linearize.recipes import guards, load, shipped
from linearize.recipes.recipe import FOLDER
from linearize.recipes.run import run_recipe

NAMES = ["default", "halo", "liger", "lolcats", "mamba-in-llama", "mohawk", "radlads"]
LENGTH = 32
SMALL = {
    "stages.*.max_length": LENGTH,
    "stages.*.batch_size": 2,
    "stages.*.share": 1,
    "stages.*.log_steps": 2,
    "convert.window": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher's folder, another teacher's, and a text."""
    path = tmp_path_factory.mktemp("place")
    for name, seed in (("teacher", 0), ("other", 1)):
        model = tiny_teacher(num_hidden_layers=2)
        if seed:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight += 0.1
        model.save_pretrained(path / name)
        letters().save_pretrained(path / name)
    lines = "".join(f"line {n}: the quick brown fox jumps over the lazy dog {n * n} times.\n" for n in range(300))
    (path / "text.txt").write_text(lines)
    return path


def run(place, recipe, out, *, steps: int = 4, settings=None, teacher="teacher", **options):
    chosen = {**SMALL, **(settings or {})}
    stages = len(load(recipe, dataset="x", tokens=10**7).stages)
    options = {"tokens": stages * steps * 2 * LENGTH, "device": "cpu", **options}
    return run_recipe(recipe, place / teacher, out, settings=chosen, dataset=str(place / "text.txt"), **options)


TWO = """
name: two
convert: {to: linear, window: 8}
stages:
  - {name: near, kind: transfer, share: 1, learning_rate: 1e-2}
  - {name: far, kind: logits, share: 1, learning_rate: 1e-3, window_dropout: 0.3, repeats: 0.5}
"""


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(TWO)
    return path


# the shipped ones


def test_the_shipped_recipes_are_listed() -> None:
    assert list(shipped()) == NAMES and all(shipped().values())
    result = CliRunner().invoke(cli.main, ["ls", "recipes"])
    assert result.exit_code == 0 and all(name in result.output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_runs_from_end_to_end(place, name, tmp_path) -> None:
    settings = {"convert.keep_softmax": "auto:1"} if name == "halo" else {}
    if name == "default":
        settings |= {"convert.calibrate_options": {"sequences": 12, "length": 64, "passes": 1}}
    out = tmp_path / "out"
    result = run(place, name, out, settings=settings)
    stages = load(name, dataset="x").stages
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.model_type == "linearize" and (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["parent_config"]["use_cache"] is True
    record = json.loads((out / "linearize.json").read_text())
    assert [entry["recipe"]["stage"] for entry in (*record["history"], record)] == [
        f"{index}-{stage}" for index, stage in enumerate(["convert", *(s.name for s in stages)], start=1)
    ]
    assert record["recipe"]["source"] == load(name, dataset="x").source
    log = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["stage"] for line in log)) == [stage.name for stage in stages]
    # every stage's folder stays, and loads; the last became OUT
    for folder in [stage.folder for stage in result.stages]:
        assert (Path(folder) / "config.json").is_file() and guards.architecture(Path(folder)) == record["architecture"]
    AutoModelForCausalLM.from_pretrained(result.stages[0].folder)
    measured = {"default": "calibration.json", "halo": "keep_scores.json"}.get(name, "config.json")
    assert (out / measured).is_file()  # what the conversion measured travels on
    assert [stage.steps for stage in result.stages[1:]] == [4] * len(stages)
    assert sum(stage.tokens for stage in result.stages[1:]) == 4 * 2 * LENGTH * len(stages)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.work"}


def test_the_papers_proportions(place) -> None:
    shares = {
        name: [round(stage.options.tokens / 1e5) for stage in load(name, dataset="x", tokens=10_000_000).stages]
        for name in NAMES
    }
    assert shares == {
        "default": [70, 30],
        "halo": [14, 43, 43],
        "liger": [100],
        "lolcats": [50, 50],
        "mamba-in-llama": [25, 25, 50],
        "mohawk": [3, 5, 92],
        "radlads": [17, 65, 17],
    }
    stages = load("radlads", dataset="x", tokens=10_000_000).stages
    assert [stage.options.skip_tokens for stage in stages] == [0, stages[0].options.tokens, 10_000_000 - 1739131]


# the format


def test_settings_and_numbers_as_people_write_them(two) -> None:
    settings = ["stages.near.learning_rate=3e-4", "stages.*.seed=5", "convert.mixer_options.gains=false"]
    recipe = load(two, [*settings, "convert.sinks=2", "tokens=1e5"], dataset="x")
    near, far = recipe.stages
    assert near.options.learning_rate == 3e-4 and near.options.seed == far.options.seed == 5
    assert recipe.convert == {"to": "linear", "window": 8, "mixer_options": {"gains": False}, "sinks": 2}
    assert near.options.tokens == far.options.tokens == 50_000 and far.options.skip_tokens == 50_000
    again = load(two, {"stages.near.tokens": 20_000, "stages.far.window_dropout": 0.1}, dataset="x", tokens=100_000)
    assert [stage.options.tokens for stage in again.stages] == [20_000, 80_000]


def test_keys_that_differ_by_mixer(two) -> None:
    two.write_text(TWO + "per_mixer:\n  gla: {stages.near.learning_rate: 5e-3, convert.window: 16}\n")
    assert load(two, dataset="x", tokens=10**6).stages[0].options.learning_rate == 1e-2
    gla = load(two, {"convert.to": "gla"}, dataset="x", tokens=10**6)
    assert gla.convert == {"to": "gla", "window": 16} and gla.stages[0].options.learning_rate == 5e-3
    told = load(two, ["convert.to=gla", "stages.near.learning_rate=1e-4"], dataset="x", tokens=10**6)
    assert told.stages[0].options.learning_rate == 1e-4
    assert "mixer_options" not in load("default", dataset="x").convert
    assert load("default", {"convert.to": "gla"}, dataset="x").convert["mixer_options"] == {"feature_map": "hedgehog"}
    two.write_text(TWO + "per_mixer:\n  gla: {stages.near.learning_rat: 5e-3}\n")
    with pytest.raises(UsageError, match=r"per_mixer.gla stages.near: .*did you mean 'learning_rate'"):
        load(two, dataset="x", tokens=10**6)


def test_keys_that_differ_where_something_stays_softmax(two) -> None:
    two.write_text(TWO + "with_softmax: {stages.near.learning_rate: 5e-3, stages.far.repeats: 0.75}\n")
    plain, kept = (load(two, said, dataset="x", tokens=10**6).stages for said in ([], ["convert.keep_softmax=auto:1"]))
    assert [stage.options.learning_rate for stage in (plain[0], kept[0])] == [1e-2, 5e-3]
    assert [stage.options.repeats for stage in (plain[1], kept[1])] == [0.5, 0.75]
    told = load(two, ["stages.far.repeats=0.1", "convert.keep_softmax=auto:1"], dataset="x", tokens=10**6)
    assert told.stages[1].options.repeats == 0.1
    for said, repeats in (({}, 0), ({"convert.keep_softmax": "heads:auto:10%"}, 0.25)):
        assert load("default", said, dataset="x").stages[1].options.repeats == repeats
    two.write_text(TWO + "with_softmax: {stages.far.repeat: 0.5}\n")  # read also where it does not apply
    with pytest.raises(UsageError, match=r"with_softmax stages.far: .*did you mean 'repeats'"):
        load(two, dataset="x", tokens=10**6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: two", "nam: two", r"no key 'nam'; did you mean 'name'\?"),
        ("window: 8", "windw: 8", r"convert: there is no key 'windw'; did you mean 'window'\?"),
        ("learning_rate: 1e-2", "learning_rat: 1e-2", r"stage near: .*'learning_rat'; did you mean 'learning_rate'\?"),
        ("learning_rate: 1e-2", "window: 1", r"stage near: there is no key 'window'"),
        ("learning_rate: 1e-2", "device: cpu", r"stage near: there is no key 'device'"),
        ("learning_rate: 1e-2", "learning_rate: fast", r"learning_rate must be float, got 'fast'"),
        ("learning_rate: 1e-2", "learning_rate: -1", r"stage near: --learning-rate must be positive"),
        ("learning_rate: 1e-2", "batch_size: 2.5", r"batch_size must be int, got 2.5"),
        ("learning_rate: 1e-2", "compile: 1", r"compile must be bool, got 1"),
        ("kind: transfer", "kind: transfr", r"stage near: kind must be one of transfer, logits"),
        ("name: near", "name: far", r"stage 2 is named 'far'"),
        ("name: near", "name: a/b", r"stage 1 is named 'a/b'"),
        ("name: near, ", "", r"stage 1 has no name"),
        ("share: 1, learning_rate: 1e-2", "learning_rate: 1e-2", r"stage near: give it a share"),
        ("share: 1, learning_rate: 1e-2", "share: 0", r"share and tokens are positive"),
        ("learning_rate: 1e-2", "share: 2", r"the key 'share' twice"),
        ("to: linear", "to: linaer", r"no mixer 'linaer'; did you mean 'linear'"),
        ("to: linear, ", "", r"convert.to must name a mixer"),
        ("name: two", "name: two: three", r"is no YAML"),
        ("name: two", "name: !!python/object/apply:os.getcwd []", r"is no YAML"),
        ("name: two", "mixer: [gla]", r"is for gla, not for linear"),
    ],
)
def test_a_file_that_is_wrong_is_refused_at_once(two, old, new, said) -> None:
    assert TWO.count(old) == 1 or old == "share: 1, learning_rate: 1e-2"
    two.write_text(TWO.replace(old, new, 1))
    with pytest.raises(UsageError, match=said) as error:
        load(two, dataset="x", tokens=10**6)
    if "mixer 'linaer'" not in said:
        assert "two.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages.near.learning_rat=1", r"--set stages.near: .*did you mean 'learning_rate'"),
        ("stages.nera.learning_rate=1", r"--set stages: .*'nera'; did you mean 'near'"),
        ("stage.near.learning_rate=1", r"--set: .*'stage'; did you mean 'stages'"),
        ("stages.*.windw_dropout=1", r"did you mean 'window_dropout'"),
        ("convert.windw=4", r"--set convert: .*did you mean 'window'"),
        ("convert.window.size=4", r"goes too deep"),
        ("stages.near.kind=logits", r"another recipe"),
        ("stages.near.learning_rate=fast", r"learning_rate must be float"),
        ("seed.x=1", r"goes too deep"),
        ("stages.near.learning_rate", r"--set wants KEY=VALUE"),
        ("tokens=[1", r"is no YAML"),
        ("stages.near.max_length=8", r"stage near: max_length 8 is no longer than convert.window 8"),
        ("convert.window=0", r"stage far: window_dropout needs windows"),
        ("convert.keep_score=chance", r"convert.keep_score must be one of"),
        ("convert.calibrate_options.sequence=9", r"calibrate_options: .*did you mean 'sequences'"),
        ("convert.calibrate_options.sequences=999", r"--calibrate-sequences"),
        ("stages.near.max_length=65536", r"stage near: its share is 50000 tokens, less than one step of 524288"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_at_once(two, setting, said) -> None:
    with pytest.raises(UsageError, match=said):
        load(two, [setting], dataset="x", tokens=100_000)


def test_what_a_run_lacks_is_said(two, tmp_path) -> None:
    with pytest.raises(UsageError, match="did you mean 'lolcats'"):
        load("lolcat")
    with pytest.raises(UsageError, match="names no data: pass --dataset"):
        load("lolcats")
    with pytest.raises(UsageError, match="pass --tokens"):
        load(two, dataset="x")
    with pytest.raises(UsageError, match="--tokens must be positive, got -5"):
        load(two, dataset="x", tokens=-5)
    with pytest.raises(UsageError, match="stages near take 500 alone"):
        load(two, {"stages.near.tokens": 500}, dataset="x", tokens=400)
    with pytest.raises(UsageError, match="is for linear, not for gla"):
        load("lolcats", ["convert.to=gla"], dataset="x")
    two.write_text(TWO[: TWO.index("stages:")])
    with pytest.raises(UsageError, match="has no stages"):
        load(two, dataset="x")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UsageError, match="no mapping"):
        load(tmp_path / "list.yaml")


def test_every_shipped_key_is_plain_in_its_file() -> None:
    """A recipe's comments name its source, and what it settles is what the file says."""
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert text.startswith("#") and f"name: {name}\n" in text
        assert load(name, dataset="x").to_dict()["stages"]


# on the command line


def command(place, recipe, out, *words) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    data = ["--dataset", str(place / "text.txt"), "--tokens", str(8 * 2 * LENGTH), "--device", "cpu"]
    return ["run", str(recipe), str(place / "teacher"), "-o", str(out), *settings, *data, *words]


def test_the_command_line_runs_and_a_dry_run_writes_nothing(place, two, tmp_path) -> None:
    out = tmp_path / "out"
    dry = CliRunner().invoke(cli.main, command(place, two, out, "--dry-run"))
    assert dry.exit_code == 0, dry.output
    assert "learning_rate: 0.001" in dry.stdout and "far: logits, 256 tokens" in dry.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"two.yaml"}
    done = CliRunner().invoke(cli.main, command(place, two, out, "--json"))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [stage["name"] for stage in told["stages"]] == ["convert", "near", "far"] and told["tokens"] == 512
    assert "2-near: transfer" in done.stderr and told["stages"][2]["folder"] == str(out)
    again = CliRunner().invoke(cli.main, command(place, two, out))
    assert again.exit_code == 2 and "exists" in again.stderr
    shutil.rmtree(out)
    again = CliRunner().invoke(cli.main, command(place, two, out))
    assert again.exit_code == 2 and "--resume to go on, --overwrite to start anew" in again.stderr
    wrong = CliRunner().invoke(cli.main, command(place, two, tmp_path / "new", "--set=stages.far.repeat=1"))
    assert wrong.exit_code == 2 and "did you mean 'repeats'" in wrong.stderr and not (tmp_path / "new.work").exists()


@pytest.mark.parametrize("keep", ["auto:2", "heads:auto:100%", "0,1"])
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_recipe_that_would_train_nothing_is_refused_before_it_measures(
    place, two, tmp_path, monkeypatch, keep, calibrate, dry
) -> None:
    from linearize.convert import calibrated

    monkeypatch.setattr(calibrated, "measure", None)  # which takes minutes
    sets = [f"--set=convert.keep_softmax={keep}", f"--set=convert.calibrate={calibrate}".lower()]
    done = CliRunner().invoke(cli.main, command(place, two, tmp_path / "out", *sets, *dry))
    assert done.exit_code == 2 and ("leaves no layer" in done.stderr or "nothing to calibrate" in done.stderr)
    assert not list(tmp_path.glob("out*/*"))


# stopping and going on


def stop_at(monkeypatch, step: int, title: str) -> None:
    whole = StageTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if (self.state.global_step, self.title) == (step, title):
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", interrupted)


def files_of(out) -> tuple[dict[str, torch.Tensor], str]:
    return load_file(out / "model.safetensors"), (out / "loss.jsonl").read_text()


def same(one, two) -> bool:
    (weights, log), (others, trace) = one, two
    return log == trace and weights.keys() == others.keys() and all(torch.equal(weights[n], others[n]) for n in weights)


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    """What the two stages give when nothing stops them."""
    path = tmp_path_factory.mktemp("straight")
    (path / "two.yaml").write_text(TWO)
    said: list[str] = []
    run(place, path / "two.yaml", path / "out", steps=6, say=said.append)
    assert len(said) == 3 and not [line for line in said if "warning" in line]
    return path


@pytest.mark.parametrize("stage", ["near", "far"])
def test_sigterm_in_a_stage_and_resume(place, straight, two, stage, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        sigterm_at(patch, 3, stage)
        run(place, two, out, steps=6)
    assert end.value.code == 143 and not out.exists()
    seen = []
    with monkeypatch.context() as patch:
        whole = StageTrainer.training_step

        def watched(self, *args, **kwargs):
            seen.append((self.title, self.state.global_step))
            return whole(self, *args, **kwargs)

        patch.setattr(StageTrainer, "training_step", watched)
        run(place, two, out, steps=6, resume=True)
    assert seen[0] == (stage, 4) and len(seen) == (8 if stage == "near" else 2)
    assert same(files_of(straight / "out"), files_of(out))


def test_a_kill_between_stages_and_resume(place, straight, two, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 0, "far")
        run(place, two, out, steps=6)
    assert {path.name for path in (tmp_path / "out.work").iterdir()} >= {"1-convert", "2-near", "recipe.json"}
    # killed after the folder, before the record of its hash
    state = json.loads((tmp_path / "out.work" / "recipe.json").read_text())
    del state["stages"]["2-near"]
    (tmp_path / "out.work" / "recipe.json").write_text(json.dumps(state))
    run(place, two, out, steps=6, resume=True)
    assert same(files_of(straight / "out"), files_of(out))


@pytest.fixture
def begun(place, straight, two, tmp_path):
    """A run whose first two folders are whole: the files, and where OUT goes."""
    shutil.copytree(straight / "out.work", tmp_path / "out.work")
    return tmp_path / "out"


def resumed(place, two, out, **options):
    return run(place, two, out, steps=6, resume=True, **options)


def test_a_missing_folder_is_refused(place, two, begun) -> None:
    shutil.rmtree(begun.with_name("out.work") / "1-convert")
    with pytest.raises(UserError, match=r"the folder of a stage is missing: .*1-convert"):
        resumed(place, two, begun)


def test_a_missing_folder_is_not_made_anew(place, two, begun) -> None:
    """Nothing lies behind it that tells; what was begun or had ended would go on from another student."""
    work = begun.with_name("out.work")
    shutil.rmtree(work / "2-near")
    with pytest.raises(UserError, match=r"the folder of a stage is missing: .*2-near"):
        resumed(place, two, begun)
    (work / "recipe.json").unlink()
    shutil.rmtree(work / "1-convert")
    (work / "2-near.work").mkdir()
    with pytest.raises(UserError, match=r"the folder of a stage is missing: .*1-convert"):
        resumed(place, two, begun)


def test_a_run_that_is_complete_says_so(place, two, begun, straight) -> None:
    shutil.copytree(straight / "out", begun)
    with pytest.raises(UsageError, match="its run is complete, and there is nothing to resume"):
        resumed(place, two, begun)


def test_another_teacher_is_refused(place, two, begun) -> None:
    with pytest.raises(UserError, match="another teacher"):
        resumed(place, two, begun, teacher="other")


def test_other_weights_are_refused(place, two, begun) -> None:
    folder = begun.with_name("out.work") / "2-near"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has been changed since"):
        resumed(place, two, begun)
    (begun.with_name("out.work") / "recipe.json").unlink()  # the chain of parents tells too
    tensors = load_file(begun.with_name("out.work") / "1-convert" / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, folder.with_name("1-convert") / "model.safetensors")
    with pytest.raises(UserError, match="from other weights than lie in the folder before"):
        resumed(place, two, begun)


def test_another_architecture_is_refused(place, two, begun) -> None:
    path = begun.with_name("out.work") / "2-near" / "config.json"
    config = json.loads(path.read_text())
    config["mixer_options"]["window"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="another architecture"):
        resumed(place, two, begun)


def test_a_stage_that_is_done_keeps_its_keys_and_one_that_is_not_may_change(place, two, begun, straight) -> None:
    with pytest.raises(UserError, match=r"2-near was made by other keys: learning_rate was 0.01 and is 0.5"):
        resumed(place, two, begun, settings={"stages.near.learning_rate": 0.5})
    with pytest.raises(UserError, match="stages of another recipe"):
        resumed(place, "radlads", begun)
    resumed(place, two, begun, settings={"stages.far.learning_rate": 0.01, "stages.near.save_steps": 7})
    assert not same(files_of(straight / "out"), files_of(begun))


def test_a_folder_that_no_recipe_left_is_not_taken_for_one_nor_removed(place, two, begun) -> None:
    folder = begun.with_name("out.work") / "2-near"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not left by a recipe"):
        resumed(place, two, begun)
    with pytest.raises(UserError, match="leaves it alone"):
        run(place, two, begun, steps=6, overwrite=True)
    assert (folder / "notes.txt").is_file() and (folder.parent / "1-convert").is_dir()


def test_overwrite_starts_anew(place, two, begun, straight) -> None:
    (begun.with_name("out.work") / "notes.txt").write_text("mine")
    shutil.copytree(straight / "out", begun)
    run(place, two, begun, steps=6, settings={"stages.near.learning_rate": 0.02}, overwrite=True)
    record = json.loads((begun / "linearize.json").read_text())
    assert record["history"][1]["recipe"]["spec"]["learning_rate"] == 0.02
    assert (begun.with_name("out.work") / "notes.txt").is_file() and not same(
        files_of(straight / "out"), files_of(begun)
    )


def test_what_comes_to_the_output_meanwhile_is_kept(place, two, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"

    def comes(*args):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"exists; .* lies in .*3-far"):
        run(place, two, out, say=comes)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert (tmp_path / "out.work" / "3-far" / "config.json").is_file()


def test_overwrite_spares_the_recipe_and_the_text_of_the_calibration(place, two, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("linearize.json", "two.yaml", "more.txt"):
        shutil.copyfile(two, out / name)
    with pytest.raises(UsageError, match=r"two\.yaml, which this reads"):
        run(place, out / "two.yaml", out, overwrite=True)
    with pytest.raises(UsageError, match=r"more\.txt, which this reads"):
        run(place, two, out, overwrite=True, settings={"convert.calibrate": str(out / "more.txt")})
    assert len(list(out.iterdir())) == 3


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_is_whole(place, two, tmp_path, monkeypatch) -> None:
    whole = StageTrainer.training_step

    def poisoned(self, *args, **kwargs):
        if self.title == "far" and self.state.global_step == 2:
            with torch.no_grad():
                self.student.model.norm.weight.fill_(float("nan"))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", poisoned)
    with pytest.raises(UserError, match=r"at step 3.*checkpoint is kept"):
        run(place, two, tmp_path / "out", settings={"stages.far.save_steps": 2})
    monkeypatch.setattr(StageTrainer, "training_step", whole)
    checkpoints = tmp_path / "out.work" / "3-far.work" / "far"
    assert (checkpoints / "checkpoint-2").is_dir()
    run(place, two, tmp_path / "out", settings={"stages.far.save_steps": 2}, resume=True)
    assert (tmp_path / "out" / "config.json").is_file()


# the first KL


def test_the_first_kl_is_held_against_the_last_or_the_start() -> None:
    said: list[str] = []
    watch = guards.first_kl_watch("far", last=0.1, start=9.0, warn=said.append)
    for line in ({"step": 1, "kl": 0.29}, {"step": 2, "kl": 5.0}, {"step": 1, "loss": 5.0}):
        watch(line)
    assert not said
    watch({"step": 1, "kl": 0.31})
    assert "stage far starts at a KL of 0.31" in said[0] and "3.1 times the last of the stage before (0.1)" in said[0]
    watch = guards.first_kl_watch("far", last=None, start=1.0, warn=said.append)
    watch({"step": 1, "kl": 1.9})
    assert len(said) == 1
    watch({"step": 1, "kl": 2.1})
    assert "before any training" in said[1]
    guards.first_kl_watch("far", last=1e-4, start=None, warn=said.append)({"step": 1, "kl": 0.01})
    guards.first_kl_watch("far", last=None, start=None, warn=said.append)({"step": 1, "kl": 50.0})
    assert len(said) == 2


def test_a_transfer_that_did_harm_is_warned_of(place, two, tmp_path) -> None:
    said: list[str] = []
    harm = {"stages.near.learning_rate": 100.0, "stages.near.train": "attention"}
    run(place, two, tmp_path / "out", settings=harm, say=said.append)
    assert [line for line in said if "warning: stage far starts at a KL of" in line]


def test_a_kill_leaves_no_output(place, two, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2, "near")
        run(place, two, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "1-convert").is_dir()
