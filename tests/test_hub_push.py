"""`push`: which files belong, what arrives on a Hub, and what is said of each thing that goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import CODE, REPO, TOKEN, TOLD, Hub, record_of, snapshot
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verbs import done, run, said

import linearize
from linearize.demo import teacher_folder, text_file
from linearize.errors import UsageError, UserError
from linearize.hub.card import MARK
from linearize.hub.files import collect

pytest_plugins = ["hub_server"]  # its fixtures


# -- the files


def test_only_what_belongs_goes_up(out, tmp_path):
    before = set(collect(out).files)
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "linearize.json"} <= before
    assert {"loss.jsonl", "evaluation.json", *CODE} <= before
    (tmp_path / "secret").write_text("secret")
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        "scores.pkl",
        ".env",
        "train.py",
        "notes.md",
        "trainer_state.json",
    ):
        (out / name).write_text("x")
    (out / "model-00001-of-00002.safetensors").write_text("x")
    (out / "eval-other.json").write_text("{}")
    (out / "LICENSE").write_text("terms")
    (out / "recipe.yaml").write_text("name: mine")
    for name in ("checkpoint-10", "__pycache__", ".cache", "x.work", "speed"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_text("x")
    (out / "merges.txt").symlink_to(tmp_path / "secret")
    (out / "vocab.txt").symlink_to(out / ".env")
    (out / "special_tokens_map.json").symlink_to("tokenizer_config.json")
    found = collect(out)
    assert set(found.files) - before == {"LICENSE", "recipe.yaml", "special_tokens_map.json"}
    why = found.left_out
    for name in ("optimizer.pt", "pytorch_model.bin", "scores.pkl"):
        assert "pickle" in why[name]
    assert why[".env"] == why[".cache"] == "hidden" and "import" in why["train.py"]
    assert "outside" in why["merges.txt"] and "outside" in why["vocab.txt"]
    assert why["checkpoint-10/"] == "a checkpoint" and why["x.work/"] == "a work folder"
    assert why["__pycache__/"] == "a cache" and "no index" in why["model-00001-of-00002.safetensors"]
    assert "speed/model.safetensors" in why and "linearize eval" in why["eval-other.json"]
    assert {"notes.md", "trainer_state.json"} <= set(why)


def test_shards_and_their_index(plain):
    weights = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        save_file({name: weights[name] for name in own}, plain / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    (plain / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert {*shards, "model.safetensors.index.json"} <= set(collect(plain).files)
    (plain / "model-00002-of-00002.safetensors").unlink()
    message = said("push", plain, REPO, "--dry-run")
    assert "model-00002-of-00002.safetensors" in message and "missing" in message


def test_folders_that_are_refused(plain, made, tmp_path):
    def refused(folder: Path, *parts: str) -> None:
        message = said("push", folder, REPO, "--dry-run")
        assert all(part in message for part in parts), message

    refused(tmp_path / "nowhere", "no folder", "linearize convert")
    refused(teacher_folder(), "no converted model", "llama", "linearize convert")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "adapter", "--merge")
    (tmp_path / "x.work").mkdir()
    refused(tmp_path / "x.work", "no config.json")
    (tmp_path / "x.work" / "recipe.json").write_text("{}")
    refused(tmp_path / "x.work", "work folder", "--resume")
    refused(Path(shutil.copytree(plain, tmp_path / ".plain.partial-12")), "half written")

    def changed(change) -> Path:
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        folder = Path(shutil.copytree(plain, tmp_path / "changed"))
        change(folder)
        return folder

    refused(changed(lambda f: (f / "mixer.py").unlink()), "lacks mixer.py", "half written")
    refused(changed(lambda f: (f / "model.safetensors").unlink()), "no weights", "nothing was pushed")
    refused(changed(lambda f: (f / "model.safetensors").write_bytes(b"x" * 9)), "corrupt")
    refused(changed(lambda f: (f / "config.json").write_text("{")), "config.json", "not valid JSON")
    refused(changed(lambda f: (f / "linearize.json").write_text("{")), "linearize.json", "not valid JSON")
    refused(changed(lambda f: (f / "loss.jsonl").write_text("{")), "loss.jsonl", "not valid JSON")
    refused(changed(lambda f: (f / "README.md").write_text("---\na: [\n---\n")), "README.md", "front matter")

    def said_otherwise(name: str, **changes: object) -> Path:
        def change(folder: Path) -> None:
            path = folder / name
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))

        return changed(change)

    refused(said_otherwise("linearize.json", history=["x"]), "does not write", "LINEARIZE_DEBUG")
    refused(said_otherwise("linearize.json", steps={"a": 1}, seconds={}, tokens="many"), "does not write")
    refused(said_otherwise("config.json", layers=[1]), "does not write")
    refused(said_otherwise("config.json", auto_map={"AutoModel": "../../x.Y"}), "code that the model needs")
    whole = {"perplexity": {"student": 1.0}, "recall": {}, "kl": None}
    refused(said_otherwise("evaluation.json", **whole, datasets="x"), "does not write")

    def linked(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(made / "plain" / "model.safetensors")

    refused(changed(linked), "link out of the folder", "cp -L")


def test_file_too_large(plain, monkeypatch):
    monkeypatch.setattr("linearize.hub.files.MOST_BYTES", 10**6)
    message = said("push", plain, REPO, "--dry-run")
    assert "model.safetensors is larger" in message and "--max-shard-size" in message


# -- the dry run


def test_dry_run_writes_nothing_and_opens_no_socket(out, monkeypatch):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = snapshot(out)
    text = done("push", out, REPO, "--dry-run")
    assert text.startswith("---\n") and "library_name: transformers" in text and "model.safetensors" in text
    assert "nothing pushed (--dry-run)" in text and "card: written from what was measured" in text
    told = json.loads(done("push", out, REPO, "--dry-run", "--json"))
    assert told["dry_run"] is True and told["card"] in text and told["commit"] is None
    sizes = {entry["path"]: entry["bytes"] for entry in told["files"]}
    assert sizes.pop("README.md") == len(told["card"].encode())
    assert any(name.startswith("pictures/") for name in sizes)
    same = [name for name in sizes if not name.startswith("pictures/") and name not in TOLD]
    assert "config.json" in same and all((out / name).stat().st_size == sizes[name] for name in same)
    assert snapshot(out) == before


def test_names_that_cannot_be(out):
    for repo in ("student", "a/b/c", "a//b", "me/x y", "me/-x", "me/a--b", "./x", "me/x.git"):
        assert "owner/name" in said("push", out, repo, "--dry-run", code=2)
    for branch in ("", "a b", "-x", "a..b"):
        assert "--revision" in said("push", out, REPO, "--revision", branch, "--dry-run", code=2)
    with pytest.raises(UsageError):
        linearize.push(out, "student")


# -- the upload


def test_what_arrives_is_what_lies_there(out, hub, tmp_path):
    (out / "optimizer.pt").write_bytes(b"x")
    result = run("push", out, REPO, "--message", "ten tokens", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    held = hub.holds()
    assert sorted(held) == sorted(entry["path"] for entry in told["files"])
    for name, data in held.items():
        if name not in TOLD:
            assert data == (out / name).read_bytes(), name  # card and pictures were written to the folder too
        for place in (tmp_path.parent, teacher_folder().parent):
            assert str(place).encode() not in data, name
    for name in TOLD:  # the same but for the places on this machine
        assert json.loads(held[name]).keys() == json.loads((out / name).read_text()).keys()
    assert "pictures/evaluation-positions.png" in held
    assert MARK in held["README.md"].decode() and told["card_from"] == "generated"
    assert hub.summaries == ["ten tokens"] and told["commit"] == "c0ffee" and told["url"] == f"{hub.url}/{REPO}"
    assert "optimizer.pt" not in held and hub.private[REPO] is False
    for name, data in held.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.layers[0]["mixer"] == "gla"
    again = linearize.push(out, REPO)  # our own card is replaced by our own
    assert again.card_from == "generated" and again.card == told["card"]


def test_private_and_a_branch(plain, hub):
    pushed = linearize.push(plain, REPO, private=True, revision="v2")
    assert hub.private[REPO] is True and hub.holds() == {}
    assert "model.safetensors" in hub.holds(branch="v2") and pushed.url == f"{hub.url}/{REPO}/tree/v2"
    assert 'revision="v2"' in pushed.card
    linearize.push(plain, REPO, private=True, revision="v2")  # both are there now
    hub.private[REPO] = False
    commits = len(hub.summaries)
    message = said("push", plain, REPO, "--private")
    assert "public" in message and len(hub.summaries) == commits


def test_a_persons_card_is_kept(plain, hub):
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (plain / "README.md").write_text(mine)
    assert "card: your own" in done("push", plain, REPO)
    assert hub.holds()["README.md"].decode() == mine == (plain / "README.md").read_text()
    (plain / "README.md").unlink()
    text = done("push", plain, REPO)  # now it is the one on the Hub that someone wrote
    assert "which someone wrote, is kept" in text and hub.holds()["README.md"].decode() == mine
    assert not (plain / "README.md").exists()
    hub.repos[REPO]["main"]["README.md"] = b"---\nlicense: mit\n---\n"  # fields alone, made on the site
    assert linearize.push(plain, REPO).card_from == "generated"
    assert MARK in hub.holds()["README.md"].decode()


def test_pictures_are_not_written_through_a_link(out, hub, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (out / "pictures").symlink_to(tmp_path / "elsewhere")
    pushed = linearize.push(out, REPO)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert any(name.startswith("pictures/") for name in hub.holds()) and (out / "README.md").read_text() == pushed.card
    [told] = [note for note in pushed.notes if "is a link" in note]
    assert str(out / "pictures") in told
    (out / "pictures").unlink()
    assert not any("is a link" in note for note in linearize.push(out, REPO).notes)
    assert any((out / "pictures").iterdir())


def test_another_base_model_is_warned_of(plain, hub):
    record_of(plain, teacher={"model": "org/base"}, parent_hash=None)
    hub.repos["org/base"] = {"main": {"README.md": b"---\nlicense: mit\nlanguage: de\n---\n# Base\n"}}
    hub.private["org/base"] = False
    hub.repos[REPO] = {"main": {"README.md": b"---\nbase_model: org/another\n---\n"}}
    hub.private[REPO] = False
    pushed = linearize.push(plain, REPO)
    assert any("org/another" in note and "org/base" in note for note in pushed.notes)
    data = ModelCard(hub.holds()["README.md"].decode()).data
    assert (data.base_model, data.license, data.language) == ("org/base", "mit", "de")  # the teacher's card was read


def test_old_weights_do_not_stay_in_the_way(plain, hub):
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "extra.txt": b"mine"}
    hub.repos[REPO], hub.private[REPO] = {"main": dict(stale)}, False
    pushed = linearize.push(plain, REPO)
    assert set(stale) & set(hub.holds()) == {"extra.txt"}
    [told] = [note for note in pushed.notes if "removed" in note]
    assert "model-00001-of-00002.safetensors, model.safetensors.index.json" in told


def test_what_an_earlier_push_left_of_another_model_goes(out, plain, hub):
    """Its adapter would be loaded in place of these weights, its figures would be read as this model's."""
    linearize.push(out, REPO)
    hub.repos[REPO]["main"] |= {"adapter_config.json": b"{}", "chat_template.jinja": b"", "eval-notes.json": b"{}"}
    linearize.push(plain, REPO)
    held = set(hub.holds())
    assert not held & {"adapter_config.json", "chat_template.jinja", "evaluation.json", "loss.jsonl"}
    assert not any(name.startswith("pictures/") for name in held) and "eval-notes.json" in held


def test_another_model_is_not_replaced(plain, hub):
    theirs = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"theirs"}
    hub.repos[REPO], hub.private[REPO] = {"main": dict(theirs)}, False
    message = said("push", plain, REPO)
    assert "model_type is llama" in message and "--overwrite" in message and hub.holds() == theirs
    linearize.push(plain, REPO, revision="converted")  # a new branch takes nothing away
    assert hub.holds() == theirs and hub.holds(branch="converted")["model.safetensors"] != b"theirs"
    linearize.push(plain, REPO, overwrite=True)
    assert hub.holds()["model.safetensors"] == (plain / "model.safetensors").read_bytes()


def test_paths_of_this_machine_stay(plain, hub):
    home = "/home/me/s3cret"
    record_of(
        plain,
        command=f"linearize convert {home}/teacher --dataset=a.txt,{home}/b.txt -o '../x y/out'",
        teacher={"model": f"{home}/teacher"},
        parent=f"~{home}/teacher",
        recipe={"name": "mine", "source": f"{home}/mine.yaml", "spec": {"dataset": "org/data:x:train"}},
        note=f"see {home}/log and https://example.org/a/b",
    )
    config = json.loads((plain / "config.json").read_text())
    config["parent_config"]["_name_or_path"] = f"{home}/teacher"  # as an earlier version left it
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "recipe.yaml").write_text(f"name: mine\ndataset: {home}/text.jsonl\nmodel: org/base\n")
    linearize.push(plain, REPO)
    held = hub.holds()
    assert [name for name, data in held.items() if b"s3cret" in data] == []
    record = json.loads(held["linearize.json"])
    assert record["command"] == "linearize convert teacher --dataset=a.txt,b.txt -o out"
    assert record["note"] == "see log and https://example.org/a/b" and record["recipe"]["source"] == "mine.yaml"
    assert record["recipe"]["spec"]["dataset"] == "org/data:x:train" and record["teacher"]["model"] == "teacher"
    assert held["recipe.yaml"] == b"name: mine\ndataset: text.jsonl\nmodel: org/base\n"
    assert json.loads(held["config.json"])["parent_config"]["_name_or_path"] == "teacher"
    assert "(source: mine.yaml)" in held["README.md"].decode()
    assert home in (plain / "linearize.json").read_text()  # the folder's own record stays


@pytest.mark.parametrize("name", ["linearize.json", "README.md", "mixer.py", "tokenizer_config.json"])
def test_a_token_is_refused(plain, hub, name):
    key = "hf_" + "a1B2" * 8
    if name.endswith(".json"):
        (plain / name).write_text(json.dumps({**json.loads((plain / name).read_text()), "note": key}))
    else:
        with (plain / name).open("a") as file:
            file.write(f"\n# {key}\n")
    message = said("push", plain, REPO)
    assert name in message and "token" in message and "a1B2a1B2" not in message and not hub.repos


def test_code_that_is_not_ours_is_told(plain):
    with (plain / "mixer.py").open("a") as file:
        file.write("\n")
    notes = [note for note in linearize.push(plain, REPO, dry_run=True).notes if "is not the code" in note]
    assert len(notes) == 1 and notes[0].startswith("mixer.py")


# -- on the way


def test_large_files_by_xet(out, hub):
    """As huggingface_hub sends them to the real Hub."""
    pytest.importorskip("hf_xet")
    hub.xet = True
    linearize.push(out, REPO)
    weights = (out / "model.safetensors").read_bytes()
    assert hub.holds()["model.safetensors"] == hashlib.sha256(weights).hexdigest().encode()
    assert hub.xet_bytes > 0.5 * len(weights) and not hub.objects
    assert not any("/info/lfs/" in call for call in hub.calls)
    assert huggingface_hub.constants.HF_HUB_DISABLE_XET is False


def test_large_files_where_there_is_no_xet(out, hub):
    linearize.push(out, REPO)
    assert any("/info/lfs/" in call for call in hub.calls)
    assert huggingface_hub.constants.HF_HUB_DISABLE_XET is False  # others of the process are as before


@pytest.mark.parametrize(
    ("call", "status", "part"),
    [
        (("GET", "/api/models/someone/student/xet-write-token"), 403, "may not write"),
        (("POST", "/v1/xorbs"), 403, "may not write"),
        (("POST", "/v1/xorbs"), 413, "too large"),
    ],
)
def test_what_xet_refuses(plain, hub, call, status, part):
    pytest.importorskip("hf_xet")
    hub.xet = True
    hub.fail[call] = (status, {}, b"{}")
    assert part in said("push", plain, REPO) and not hub.summaries


def test_a_push_that_was_stopped_goes_on(plain, hub):
    """What arrived is not sent again, and until the commit the repository is what it was."""
    hub.fail["POST", "/api/models/someone/student/commit"] = (400, {}, b"{}")
    said("push", plain, REPO)
    assert hub.holds() == {} and len(hub.objects) == 1
    hub.fail.clear()
    hub.calls.clear()
    linearize.push(plain, REPO)
    assert hub.holds()["model.safetensors"] == (plain / "model.safetensors").read_bytes()
    assert not any(call.startswith("PUT") for call in hub.calls)


def test_another_push_meanwhile_is_not_undone(plain, hub, monkeypatch):
    linearize.push(plain, REPO)
    usual = hub.reply

    def reply(method: str, path: str, data: bytes) -> tuple:
        if "/preupload/" in path:
            hub.repos[REPO]["main"]["theirs.txt"] = b"new"
        return usual(method, path, data)

    monkeypatch.setattr(hub, "reply", reply)
    assert "changed meanwhile" in said("push", plain, REPO)
    linearize.push(plain, REPO)
    assert hub.holds()["theirs.txt"] == b"new"


def test_no_token(plain, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = said("push", plain, REPO)
    assert "hf auth login" in message and "HF_TOKEN" in message and hub.calls == []


@pytest.mark.parametrize(
    ("call", "status", "headers", "parts"),
    [
        (("GET", "/api/whoami-v2"), 401, {}, ["401", "hf auth login"]),
        (("GET", "/api/whoami-v2"), 404, {}, ["404", "HF_ENDPOINT"]),
        (("POST", "/api/repos/create"), 403, {"X-Error-Message": "not yours"}, ["may not write", "not yours", "role"]),
        (("POST", "/api/models/someone/student/commit"), 403, {}, ["may not write"]),
        (("POST", "/api/models/someone/student/commit"), 412, {}, ["changed meanwhile", "again"]),
        (("POST", "/api/models/someone/student/commit"), 413, {}, ["too large", "--max-shard-size"]),
        (("POST", "/api/models/someone/student/commit"), 400, {"X-Error-Message": "bad name"}, ["refuses", "bad name"]),
        (("POST", "/api/models/someone/student/commit"), 500, {}, ["trouble of its own", "again"]),
        (("POST", "/api/repos/create"), 429, {}, ["429", "later"]),
        (("POST", "/api/repos/create"), 402, {}, ["payment"]),
        (("PUT", "/objects/"), 403, {}, ["may not write"]),
    ],
)
def test_what_the_hub_refuses(plain, hub, call, status, headers, parts):
    hub.fail[call] = (status, headers, b"{}")
    message = said("push", plain, REPO)
    assert all(part in message for part in parts), message
    assert not (plain / "README.md").exists() and not hub.summaries


def test_metadata_that_the_hub_refuses(plain, hub):
    hub.fail["POST", "/api/validate-yaml"] = (400, {}, b'{"errors": [{"message": "license is unknown"}]}')
    (plain / "README.md").write_text("---\nlicense: none\n---\nmine\n")
    assert "license is unknown" in said("push", plain, REPO)


def test_what_is_no_hub(plain, hub, monkeypatch):
    hub.fail["GET", "/api/whoami-v2"] = (200, {}, b"<html>")
    assert "does not answer as a Hub" in said("push", plain, REPO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    assert f"{closed} cannot be reached" in said("push", plain, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "hub.example")
    assert "HF_ENDPOINT" in said("push", plain, REPO)
    with pytest.raises(UserError):
        linearize.push(plain, REPO)


def test_offline(plain, hub, monkeypatch):
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert "HF_HUB_OFFLINE" in said("push", plain, REPO)
    close_session()


def test_hf_endpoint_of_the_environment(plain, hub, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "linearize.cli", "push", str(plain), REPO]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/{REPO} at c0ffee" in result.stdout and TOKEN not in result.stdout + result.stderr
    assert hub.holds()["model.safetensors"] == (plain / "model.safetensors").read_bytes()


# -- what lies on the Hub


def elsewhere(hub: Hub, tmp_path: Path, *command: str) -> str:
    """What `command` prints in a process of its own, to which this Hub is the only one, with an empty cache."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
        environment.pop(name, None)
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


VERBS = """
import json, sys
from click.testing import CliRunner
from linearize.cli import main

for args in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, args)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


def test_every_verb_takes_a_hub_id_with_its_revision(made, hub, tmp_path):
    """The models are on branches: without the revision there is nothing to load."""
    teacher = {path.name: path.read_bytes() for path in teacher_folder().iterdir() if path.is_file()}
    student = {path.name: path.read_bytes() for path in (made / "plain").iterdir() if path.is_file()}
    hub.repos["org/teacher"] = {"main": {"README.md": b"moved"}, "v2": teacher}
    hub.repos["org/student"] = {"main": {"README.md": b"moved"}, "gla": student}
    short = ["--tokens", "256", "--max-length", "128", "--batch-size", "1"]
    text, few = str(text_file("heldout")), ["--context", "128", "--sequences", "1", "--recall-passages", "0"]
    few += ["--retrieval-contexts", "0", "--agreement-prompts", "0", "--no-branches", "--json"]
    at = "org/teacher@v2"
    verbs = [
        ["plan", at, "--to", "gla", "--json"],
        ["convert", at, "--to", "gla", "-o", "converted"],
        ["convert", "org/teacher", "--revision", "v2", "--to", "gla", "--dry-run", "-o", "other"],
        ["distill", "org/student@gla", "--teacher", at, "--dataset", text, "--stage", "transfer", *short, "-o", "mine"],
        ["finetune", "org/student@gla", "--dataset", text, *short, "--merge", "-o", "tuned"],
        ["eval", "org/student@gla", "--teacher", at, "--dataset", text, *few],
        ["eval", "org/student", "converted", "--revision", "gla", "--dataset", text, *few],
        ["eval", "org/student@gla", at, "--dataset", text, *few],
        ["generate", "org/student@gla", "The", "--max-new-tokens", "2", "--json"],
        ["eval", "org/student", "--dataset", text, *few],
        ["convert", at, "--revision", "v3", "--to", "gla", "-o", "other"],
    ]
    said = [json.loads(line) for line in elsewhere(hub, tmp_path, "-c", VERBS, json.dumps(verbs)).splitlines()]
    assert [code for code, _, _ in said] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2], said
    assert json.loads(said[5][1])["kl"] > 0
    assert list(json.loads(said[6][1])["students"]) == ["org/student@gla", "converted"]
    assert list(json.loads(said[7][1])["students"]) == ["org/student@gla", at]
    assert "v3" in said[10][2] and "leave one of them out" in said[10][2]
    commits = {name: hub.sha(files) for name, files in (("teacher", teacher), ("student", student))}
    record = json.loads((tmp_path / "converted" / "linearize.json").read_text())
    assert record["teacher"] == {"model": "org/teacher", "revision": "v2", "commit": commits["teacher"]}
    for folder in ("mine", "tuned"):  # the student's own history was fetched with it
        record = json.loads((tmp_path / folder / "linearize.json").read_text())
        assert [entry["stage"] for entry in record["history"]] == ["convert"] and record["parent"] == "org/student"
        assert record["parent_revision"] == commits["student"] and record["parent_hash"]
    card = linearize.push(tmp_path / "converted", REPO, dry_run=True).card
    assert f"org/teacher), revision v2 (commit {commits['teacher']})" in card
    assert ModelCard(card).data.base_model == "org/teacher"


def test_the_cards_own_lines_load_what_was_pushed(plain, hub, tmp_path):
    """Where linearize is not installed, and where it is."""
    card = linearize.push(plain, REPO).card
    without, with_it = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shown = elsewhere(hub, tmp_path, "-c", f"import sys\nsys.modules['linearize'] = None\n{without}")
    assert "Once upon a time" in shown
    told = elsewhere(hub, tmp_path, "-c", f"{with_it}\nprint(type(model).__module__)")
    assert told.strip() == "linearize.modeling.modeling_linearize"
