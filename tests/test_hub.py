"""`push`: what a card says, which files belong, what arrives on a Hub, and what is said of each thing that goes wrong.

The Hub here is a server on this machine that answers the calls of huggingface_hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import linearize
from linearize.cli import main
from linearize.demo import teacher_folder, text_file
from linearize.errors import UsageError, UserError
from linearize.hub import front_matter
from linearize.hub.card import MARK
from linearize.hub.files import collect
from linearize.hub.teacher import Teacher, inherited, teacher_of

TOKEN = "hf_of_the_tests"
REPO = "someone/student"
CODE = ["modeling_linearize.py", "configuration_linearize.py", "mixer.py"]


class Hub:
    """What a Hub holds, and how it is told to fail: `fail[(method, path's start)] = (status, headers, body)`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.summaries: list[str] = []
        self.fail: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def handle_any(self) -> None:
                path, data = unquote(urlsplit(self.path).path), self.body()
                hub.calls.append(f"{self.command} {path}")
                for (method, start), (status, headers, body) in hub.fail.items():
                    if method == self.command and path.startswith(start):
                        return self.answer(status, body, headers)
                if path.startswith("/objects/"):
                    hub.objects[path.rpartition("/")[2]] = data
                    return self.answer(200, b"")
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials"})
                self.answer(*hub.reply(self.command, path, data))

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, method: str, path: str, data: bytes) -> tuple:
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "auth": {}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            hidden = asked.get("visibility") == "private" or asked.get("private") is True
            self.repos[repo], self.private[repo] = {"main": {".gitattributes": b""}}, hidden
            return 200, {"url": f"{self.url}/{repo}"}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            content = self.repos.get(found[1], {}).get(found[2].removeprefix("sha-"), {}).get(found[3])
            if content is None:
                return 404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"}
            etag = hashlib.sha1(content).hexdigest()
            return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": hashlib.sha1(content + b"commit").hexdigest()}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}}
                for entry in json.loads(data)["objects"]
            ]
            return 200, {"objects": objects, "transfer": "basic"}
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|branch|preupload|commit)/(.+))?", path)
        if found is None:
            return 404, {"error": "no such address"}
        repo, what, branch = found.groups()
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        branches = self.repos[repo]
        if what == "branch":
            if branch in branches:
                return 409, {"error": "exists"}
            branches[branch] = dict(branches["main"])
            return 200, {}
        if branch is not None and branch not in branches:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        if what == "preupload":
            listed = json.loads(data)["files"]
            large = (".safetensors", ".png")
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"} for f in listed
            ]
            return 200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}
        if what == "commit":
            self.commit(branches[branch], [json.loads(line) for line in data.splitlines()])
            return 200, {"success": True, "commitUrl": f"{self.url}/{repo}/commit/c0ffee", "commitOid": "c0ffee"}
        siblings = [{"rfilename": name} for name in branches[branch or "main"]]
        return 200, {
            "id": repo,
            "modelId": repo,
            "sha": f"sha-{branch or 'main'}",
            "private": self.private[repo],
            "siblings": siblings,
            "tags": [],
        }

    def commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.summaries.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def holds(self, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
        return {name: data for name, data in self.repos[repo][branch].items() if name != ".gitattributes"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, its token in the environment, and an empty cache."""
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def run(*args: object):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def done(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def said(*args: object, code: int = 1) -> str:
    """The one message of a verb that failed."""
    result = run(*args)
    assert result.exit_code == code, (result.exit_code, result.stderr)
    assert result.stdout == "" and "Traceback" not in result.stderr
    *_, last = result.stderr.replace("\r", "\n").rstrip("\n").split("\n")
    assert last.startswith("Error: "), result.stderr
    return last


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The embedded teacher converted, trained for two steps, evaluated; and as a hybrid."""
    folder = tmp_path_factory.mktemp("made")
    teacher, text = teacher_folder(), text_file("train")
    done("convert", teacher, "--to", "gla", "-o", folder / "plain")
    done(
        *("distill", folder / "plain", "--teacher", teacher, "--dataset", text, "--stage", "transfer"),
        *("--tokens", 512, "--max-length", 128, "--batch-size", 2, "-o", folder / "trained"),
    )
    judged = done(
        *("eval", folder / "trained", "--teacher", teacher, "--dataset", text_file("heldout"), "--context", 128),
        *("--sequences", 2, "--recall-length", 32, "--recall-passages", 2, "--retrieval-contexts", 0),
        *("--agreement-prompts", 0, "--json"),
    )
    (folder / "trained" / "evaluation.json").write_text(judged)
    done(
        *("convert", teacher, "--to", "linear", "--keep-softmax", "heads:5.2,7.6", "--keep-window", 128),
        *("--window", 32, "--sinks", 4, "--feature-map", "elu", "-o", folder / "hybrid"),
    )
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "trained", tmp_path / "trained"))


@pytest.fixture
def plain(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "plain", tmp_path / "plain"))


def record_of(folder: Path, **changes: object) -> None:
    """Says another teacher in the conversion's record."""
    path = folder / "linearize.json"
    record = json.loads(path.read_text())
    (record["history"][0] if "history" in record else record).update(changes)
    path.write_text(json.dumps(record))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the card


def test_card_of_a_trained_student(out):
    card = linearize.push(out, REPO, dry_run=True).card
    fields = ModelCard(card).data.to_dict()
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["linearize", "linear-attention", "gla"],
    }
    judged = json.loads((out / "evaluation.json").read_text())
    ratio = f"{judged['perplexity']['ratio']:.4g}"
    assert f"| **this model** | {judged['perplexity']['student']:.4g} | {ratio} | {judged['kl']:.4g} |" in card
    assert "| linear branch off |" in card and "| window off |" in card
    assert "| transfer | train.jsonl.gz | 512 | 2 | 0.01 |" in card
    assert "of heldout.jsonl.gz in sequences of 128" in card
    assert "| mixer `gla` | layers 0-7 |" in card and "| window, keys of exact softmax | 64 |" in card
    assert "| stays softmax | nothing beside the window |" in card
    assert "Not measured: retrieval, agreement of greedy text, tasks, speed." in card
    assert "trust_remote_code=True" in card and "import linearize" in card
    assert f"linearize {linearize.__version__}" in card
    assert str(out) not in card and str(teacher_folder()) not in card  # nothing of the machine that made it


def test_card_of_a_conversion_alone(plain):
    card = linearize.push(plain, REPO, dry_run=True).card
    assert "Not measured: this folder has no evaluation" in card
    assert "Converted, and not trained since" in card
    assert "Not measured: perplexity, KL from the teacher, recall, retrieval" in card
    weights = load_file(plain / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    new = sum(tensor.numel() for name, tensor in weights.items() if ".mixer." in name)
    assert f"{total:,}, of them new {new:,}; bfloat16" in card


def test_card_of_a_hybrid(made):
    pushed = linearize.push(made / "hybrid", REPO, dry_run=True)
    assert "query heads 5.2, 7.6 (layer.head), which see the last 128 keys: 2 of 32 key groups" in pushed.card
    assert "| sinks, first tokens always visible | 4 |" in pushed.card and "feature_map elu" in pushed.card
    assert ModelCard(pushed.card).data.tags == ["linearize", "linear-attention", "linear"]


def test_card_names_a_teacher_on_the_hub(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    record_of(plain, teacher={"model": "org/base", "revision": "v1"}, parent_hash=None)
    pushed = linearize.push(plain, REPO, dry_run=True)
    data = ModelCard(pushed.card).data
    assert data.base_model == "org/base" and data.to_dict()["base_model_relation"] == "finetune"
    assert data.license is None and data.language is None  # not known, so not said
    assert "[org/base](https://huggingface.co/org/base), revision v1" in pushed.card
    assert any("licence of org/base" in note for note in pushed.notes)


def test_teacher_is_not_guessed():
    config = {"parent_config": {"_name_or_path": ""}}
    assert teacher_of([], config) == Teacher()
    relative = {"teacher": {"model": "models/mine"}, "parent_hash": "abc"}
    found = teacher_of([relative], config)
    assert found.hub_id is None and found.name == "mine"
    commit = "0123456789" * 4
    cached = {"teacher": {"model": f"/c/models--org--base-1/snapshots/{commit}"}, "parent_hash": "abc"}
    found = teacher_of([cached], config)
    assert (found.hub_id, found.revision) == ("org/base-1", commit)
    named = teacher_of([], {"parent_config": {"_name_or_path": "org/base"}})
    assert named.hub_id == "org/base" and not named.sure


def test_licence_and_language_are_the_teachers():
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [x]\n---\ntext"
    found = inherited(card, Teacher(name="org/base", hub_id="org/base"))
    link = "https://huggingface.co/org/base/blob/main/LICENSE"
    assert found == {"license": "other", "license_name": "own", "license_link": link, "language": ["en", "de"]}
    assert "license_link" not in inherited(card, Teacher(name="base"))
    assert inherited("no head", Teacher()) == {} and inherited("---\n[\n---\n", Teacher()) == {}


def test_card_has_what_benchmarks_and_recipes_left(out):
    header = {"hardware": "a <machine>", "dtype": "bfloat16", "versions": {"torch": "2.0"}}
    row = {"model": "student", "batch": 1, "context": 64, "prefill_tokens_per_second": 1234.0, "decode_ms": 2.5}
    row |= {"decode_tokens_per_second": 400.0, "decode_peak_gib": None, "state_bytes": 2048, "kv_bytes": 0}
    ahead = [{"batch": 1, "decode": 64.0, "cache": None}]
    results = {**header, "rows": [row], "overtakes": ahead, "student": "x", "teacher": "y"}
    (out / "speed").mkdir()
    (out / "speed" / "model.json").write_text(json.dumps(results))
    (out / "speed" / "model.png").write_bytes(b"png")
    row = {"op": "gla", "provider": "linearize", "tokens": 64, "forward_ms": 0.5, "forward_backward_ms": None}
    row |= {"forward_peak_gib": 0.25, "forward_backward_peak_gib": None}
    kernels = {**header, "rows": [row], "decode": [], "cold_start": [], "heads": 4}
    (out / "kernels.json").write_text(json.dumps(kernels))
    (out / "keep_scores.json").write_text(json.dumps({"method": "gradient"}))
    (out / "keep_scores.png").write_bytes(b"png")
    record = json.loads((out / "linearize.json").read_text())
    (out / "linearize.json").write_text(json.dumps({**record, "recipe": {"name": "mine|own", "source": "linearize"}}))
    pushed = linearize.push(out, REPO, dry_run=True)
    assert "| student | 1 | 64 | 1234 | 2.5 | 400 | - | 2.0 KiB | 0 bytes |" in pushed.card
    assert (
        "Measured on a &lt;machine>, bfloat16, torch 2.0. Where this model is ahead: batch 1: decoding" in pushed.card
    )
    assert "| gla, linearize | 64 | 0.5 | - | 0.25 | - |" in pushed.card
    assert "](keep_scores.png)" in pushed.card and "](speed/model.png)" in pushed.card
    assert "Recipe `mine|own` (source: linearize)" in pushed.card and "speed." not in pushed.card
    assert {"speed/model.json", "speed/model.png", "kernels.json", "keep_scores.png"} <= set(pushed.files)


def test_time_that_drowned_in_noise_is_no_figure(out):
    row = {"model": "student", "batch": 1, "context": 64, "decode_ms": 1e-6, "decode_tokens_per_second": 1e9}
    results = {"hardware": "x", "dtype": "y", "versions": {}, "student": "x", "teacher": "y"}
    results |= {"rows": [row], "overtakes": [{"batch": 1, "decode": 1.0}]}
    (out / "model.json").write_text(json.dumps(results))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "| student | 1 | 64 | - | - | - | - | - | - |" in card and "is ahead" not in card


def test_own_result_among_several_students(out):
    judged = json.loads((out / "evaluation.json").read_text())
    other = {**judged, "perplexity": {"student": 777.25}}
    (out / "evaluation.json").unlink()
    both = {"students": {str(out): judged, "elsewhere/other": other}, "teacher": None}
    (out / "eval-both.json").write_text(json.dumps(both))
    (out / "eval-other.json").write_text(json.dumps({"students": {"elsewhere/other": other}}))
    pushed = linearize.push(out, REPO, dry_run=True)
    assert f"{judged['perplexity']['student']:.4g}" in pushed.card and "777.2" not in pushed.card
    assert "eval-both.json" in pushed.files and "eval-other.json" in pushed.left_out


def test_folder_that_python_saved(plain, tmp_path):
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["parent_config"]["_name_or_path"] = "org/base"  # as a teacher loaded from the Hub leaves it
    path.write_text(json.dumps(config))
    pushed = linearize.push(tmp_path / "saved", REPO, dry_run=True)
    assert "Not recorded: the folder has no `linearize.json`." in pushed.card and "| mixer `gla` |" in pushed.card
    assert any("no tokenizer" in note for note in pushed.notes)
    assert ModelCard(pushed.card).data.base_model == "org/base"
    assert any("is from config.json" in note for note in pushed.notes)


def test_front_matter():
    assert front_matter.split("no head") == ({}, "no head")
    assert front_matter.split("---\na: 1\n---\nbody") == ({"a": 1}, "body")
    assert front_matter.split("---\n---\nbody") == ({}, "body")
    assert front_matter.split(front_matter.join({"a": "ü", "b": ["c"]}, "x")) == ({"a": "ü", "b": ["c"]}, "\nx")
    for broken in ("---\na: [\n---\n", "---\n- a\n---\n"):
        with pytest.raises(ValueError, match="front matter"):
            front_matter.split(broken)


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
    assert text.startswith("---\nlibrary_name: transformers") and "model.safetensors" in text
    assert "nothing pushed (--dry-run)" in text and "card: written from what was measured" in text
    told = json.loads(done("push", out, REPO, "--dry-run", "--json"))
    assert told["dry_run"] is True and told["card"] in text and told["commit"] is None
    sizes = {entry["path"]: entry["bytes"] for entry in told["files"]}
    assert sizes["README.md"] == len(told["card"].encode())
    assert all((out / name).stat().st_size == size for name, size in sizes.items() if name != "README.md")
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
        assert data == (out / name).read_bytes(), name  # the card was written to the folder too
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
    assert sum("is removed" in note for note in pushed.notes) == 2


def test_paths_of_this_machine_are_told(plain, hub):
    record_of(plain, command="linearize convert /home/me/teacher")
    [told] = [note for note in linearize.push(plain, REPO).notes if "paths of this machine" in note]
    assert "linearize.json" in told


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
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "linearize.cli", "push", str(plain), REPO]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/{REPO} at c0ffee" in result.stdout and TOKEN not in result.stdout + result.stderr
    assert hub.holds()["model.safetensors"] == (plain / "model.safetensors").read_bytes()
