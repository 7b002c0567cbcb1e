"""A Hub on this machine that answers the calls of huggingface_hub, and what there is to push to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from verbs import done

from linearize.demo import teacher_folder, text_file

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
