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
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
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
TOLD = ("evaluation.json", "linearize.json")  # records and results, which name places on this machine
CODE = ["modeling_linearize.py", "configuration_linearize.py", "mixer.py"]


class Hub:
    """What a Hub holds, and how it is told to fail: `fail[(method, path's start)] = (status, headers, body)`.

    Large files come by LFS, or where `xet` is on by Xet, whose storage answers here too: what hf_xet sends there is
    counted and not unpacked, so that of such a file the Hub holds the sha256 that the commit names.
    """

    def __init__(self) -> None:
        self.xet = False
        self.xet_bytes = 0
        self.at: dict[str, dict[str, bytes]] = {}  # the files of each commit that was asked for
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
                if path.startswith("/v"):  # Xet's storage, with its own token
                    assert self.headers["Authorization"] == "Bearer of-xet"
                    return self.answer(*hub.store(path, data))
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

    def store(self, path: str, data: bytes) -> tuple:
        """Xet's storage: knows no chunk, takes all."""
        if "/xorbs/" in path:
            self.xet_bytes += len(data)
            return 200, {"was_inserted": True}
        return (200, {"result": 1}) if path == "/v1/shards" else (404, {})

    def sha(self, files: dict[str, bytes]) -> str:
        """The commit that `files` are."""
        digest = hashlib.sha1()
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0".encode() + hashlib.sha1(content).digest())
        self.at[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def files_at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repos.get(repo, {})
        return branches[revision] if revision in branches else self.at.get(revision) if branches else None

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
            files = self.files_at(found[1], found[2])
            if files is None:
                return 404, {"error": "no such"}, {"X-Error-Code": "RevisionNotFound" if self.repos else "RepoNotFound"}
            commit = {"X-Repo-Commit": self.sha(files)}
            if found[3] not in files:
                return 404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound", **commit}
            return 200, files[found[3]], {"ETag": f'"{hashlib.sha1(files[found[3]]).hexdigest()}"', **commit}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(data)["objects"]
            for entry in objects:
                if entry["oid"] not in self.objects:  # else it arrived before
                    entry["actions"] = {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}
            return 200, {"objects": objects, "transfer": "basic"}
        found = re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|branch|preupload|commit|tree|xet-write-token)/(.+))?", path
        )
        if found is None:
            return 404, {"error": "no such address"}
        repo, what, branch = found.groups()
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        branches = self.repos[repo]
        if what == "xet-write-token":
            if not self.xet:
                return 404, {"error": "no such address"}
            until = int(time.time()) + 3600
            given = {"X-Xet-Cas-Url": self.url, "X-Xet-Access-Token": "of-xet", "X-Xet-Token-Expiration": str(until)}
            return 200, {"casUrl": self.url, "accessToken": "of-xet", "exp": until}, given
        if what in ("revision", "tree", None):
            branch, _, under = (branch or "main").partition("/")
            files = self.files_at(repo, branch)
            if files is None:
                return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
            if under:
                return 404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"}
            if what == "tree":
                kinds = {"type": "file", "size": 0, "oid": "0" * 40}
                return 200, [{"path": name, **kinds} for name in files]
            siblings = [{"rfilename": name} for name in files]
            told = {"id": repo, "modelId": repo, "private": self.private.get(repo, False), "tags": []}
            return 200, {**told, "sha": self.sha(files), "siblings": siblings}
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
            lines = [json.loads(line) for line in data.splitlines()]
            if lines[0]["value"].get("parentCommit") not in (None, self.sha(branches[branch])):
                return 412, {"error": "A commit has happened since"}
            self.commit(branches[branch], lines)
            return 200, {"success": True, "commitUrl": f"{self.url}/{repo}/commit/c0ffee", "commitOid": "c0ffee"}
        return 404, {"error": "no such address"}

    def commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.summaries.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if self.xet:
                    files[value["path"]] = value["oid"].encode()
                    continue
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
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
    [index] = fields.pop("model-index")
    [measured] = index["results"]
    assert index["name"] == "student" and measured["metrics"][0]["type"] == "perplexity"
    assert measured["dataset"] == {"name": "heldout.jsonl.gz", "type": "text"}
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
    record = json.loads((out / "linearize.json").read_text())
    took = f"{record['seconds']['transfer']:.0f} s | {record['hardware']}"
    assert re.search(rf"\| transfer \| train.jsonl.gz \| 512 \| 2 \| 0.01 \| [\d.]+ \| {took} \|", card)
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
    assert "| this model | 1 | 64 | 1234 | 2.5 | 400 | - | 2.0 KiB | 0 bytes |" in pushed.card
    assert (
        "Measured on a &lt;machine>, bfloat16, torch 2.0. Where this model is ahead: batch 1: decoding" in pushed.card
    )
    assert "| gla, linearize | 64 | 0.5 | - | 0.25 | - |" in pushed.card
    assert "](keep_scores.png)" in pushed.card and "](speed/model.png)" in pushed.card
    assert "Recipe `mine|own` (source: linearize)" in pushed.card and "speed." not in pushed.card
    assert {"speed/model.json", "speed/model.png", "kernels.json", "keep_scores.png"} <= set(pushed.files)


def test_figures_that_are_none_are_dashes(out):
    row = {"model": "student", "batch": 1, "context": 64, "decode_ms": None, "decode_tokens_per_second": None}
    row["error"] = "decoding by generate: a token's time is lost in the noise; raise --new-tokens above 2"
    results = {"hardware": "x", "dtype": "y", "versions": {}, "student": "x", "teacher": "y"}
    results |= {"rows": [row], "overtakes": [{"batch": 1}]}
    (out / "model.json").write_text(json.dumps(results))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "| this model | 1 | 64 | - | - | - | - | - | - |" in card and "is ahead" not in card
    assert "lost in the timer's noise" in card


def test_card_says_what_brought_nothing(out):
    """A reader who judges the model is told where something simpler is as near to the teacher."""
    path = out / "evaluation.json"
    judged = json.loads(path.read_text())
    judged |= {"kl": 0.2, "recall_length": 64, "recall": {"student": 3.0, "teacher": 1.0}}
    judged |= {"linear_off": {**judged["linear_off"], "kl": 0.1}, "window_alone": None}
    path.write_text(json.dumps(judged))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "the linear branch brings nothing" in card and "a KL of 0.1 nats" in card
    assert "training brought nothing" not in card
    assert "The window of 64 tokens reaches the first copy" in card and "Measured on passages" not in card
    path.write_text(json.dumps({**judged, "recall_length": 65, "kl": 0.05}))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "the linear branch brings nothing" not in card
    assert "Measured on passages of 65 tokens: a loss of 3 nats a token on the second copy, the teacher's 1." in card


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
    assert front_matter.split("---\n\n---\nbody") == ({}, "body")
    fields = ModelCardData(language="ü", tags=["c"])
    assert front_matter.split(front_matter.join(fields, "x")) == ({"language": "ü", "tags": ["c"]}, "\nx")
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
