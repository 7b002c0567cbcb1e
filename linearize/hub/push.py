"""`push`: the card and the files of a converted folder, to a repository on the Hub in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError, UserError
from . import front_matter
from .card import card, is_generated
from .facts import Facts, gather
from .files import CARD, INDEX, WEIGHTS, Belongings, collect
from .said import hub_said
from .teacher import inherited, local_card

_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_LOCAL_PATH = re.compile(r"(?<=[\s\"'=,])(?:~|/[\w.@+-]+)(?:/[\w.@+-]+)+")
GENERATED, OWN, REMOTE = "generated", "OUT", "REPO"


@dataclass
class Pushed:
    """What was pushed, or with `dry_run` would be.

    `card_from` says whose the card is: "generated" here, the person's own in "OUT", or one that someone wrote in the
    "REPO". `files` has sizes in bytes by path, `left_out` the reason by path, `notes` what a person should know.
    """

    repo: str
    revision: str | None
    private: bool
    dry_run: bool
    card: str
    card_from: str
    files: dict[str, int]
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        listed = [{"path": path, "bytes": count} for path, count in self.files.items()]
        stay = [{"path": path, "why": why} for path, why in self.left_out.items()]
        rest = {name: value for name, value in vars(self).items() if name not in ("files", "left_out")}
        return {**rest, "files": listed, "left_out": stay}


def push(
    out: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Uploads the converted model in `out` to the Hub, with a card written from what was measured and recorded.

    The token is the one of `HF_TOKEN` or of `hf auth login`, the Hub the one of `HF_ENDPOINT`. A README.md in `out`, or
    in the repository, that a person wrote is kept as it is. What an earlier push left of the weights and would be
    loaded in place of these is removed in the same commit.

    Args:
        out: a folder that convert, distill, finetune or run made.
        repo: `owner/name`; made where it is not there.
        private: make it private. A repository that is there and public is refused.
        revision: the branch, made where it is not there; main by default.
        message: the commit's.
        dry_run: neither ask the Hub nor write anything.
        say: told the notes of the result as they come up.

    Raises:
        UserError: no whole converted model in `out`, no token or one that may not write, no Hub to be reached.
        UsageError: `repo` or `revision` cannot be a name.
    """
    folder = Path(out).expanduser()
    _check_names(folder, repo, revision)
    belongings = collect(folder)
    facts = gather(folder, belongings)
    branch = None if revision in (None, "main") else revision
    own = _own_card(belongings)
    known = local_card(facts.teacher)
    push = _Push(folder, repo, private, branch, belongings, facts, own, known, say)
    if dry_run:
        return push.result(dry_run=True)
    push.upload(message or f"Upload {folder.resolve().name}, converted by linearize")
    return push.result(dry_run=False)


def _check_names(folder: Path, repo: str, revision: str | None) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not _REPO.fullmatch(repo):
            raise HFValidationError("it has no owner and name")
        validate_repo_id(repo)
    except HFValidationError as error:
        name = re.sub(r"[^\w.-]+|-{2,}", "-", folder.resolve().name).strip("-.") or "student"
        why = str(error).split("\n")[0].rstrip(".")
        raise UsageError(f"REPO: {repo!r} is no name on the Hub ({why}); give owner/name, as YOU/{name}") from error
    if revision is not None and (not revision or re.search(r"[\s~^:?*\[\\]|\.\.|^[-/]|/$|\.lock$", revision)):
        raise UsageError(f"--revision: {revision!r} cannot be a branch's name; give one such as main or v2")


def _own_card(belongings: Belongings) -> str | None:
    """The README.md in the folder, where a person wrote it. Raises UserError for one whose head no one can read."""
    if CARD in belongings.left_out:
        raise UserError(f"{CARD} is {belongings.left_out[CARD]}: put the file itself there, or remove it")
    if belongings.own_card is None:
        return None
    try:
        text = belongings.own_card.read_text(encoding="utf-8")
        if is_generated(text):
            return None
        front_matter.split(text)
    except ValueError as error:
        raise UserError(f"{belongings.own_card}: {error}; repair it, or remove the file for a card of ours") from error
    return text


class _Push:
    """One push on its way: what is known here, and what the Hub told."""

    def __init__(
        self,
        folder: Path,
        repo: str,
        private: bool,
        branch: str | None,
        belongings: Belongings,
        facts: Facts,
        own: str | None,
        teacher_card: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.repo, self.private, self.branch = folder, repo, private, branch
        self.belongings, self.facts, self.own, self.teacher_card, self.say = belongings, facts, own, teacher_card, say
        self.notes: list[str] = []
        self.remote_card: str | None = None
        self.url: str | None = None
        self.commit: str | None = None
        self._local_notes()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def _local_notes(self) -> None:
        teacher, names = self.facts.teacher, set(self.belongings.files)
        if teacher.hub_id is None:
            self.note(f"the teacher is not known by a Hub id, so the card names no base_model; add it to {CARD}")
        elif not teacher.sure:
            self.note(f"base_model {teacher.hub_id} is from config.json, no record names it: check that it is right")
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}:
            self.note("there is no tokenizer in OUT: tokenizer.save_pretrained(OUT), and push again")
        if told := self._local_paths():
            files, path = ", ".join(told), next(iter(told.values()))
            self.note(f"{files} go up as they are and name paths of this machine, as {path}")

    def _local_paths(self) -> dict[str, str]:
        """Files that anyone will be able to read and that tell of this machine."""
        found = {}
        for name, path in self.belongings.files.items():
            if name.endswith((".json", ".jsonl", ".yaml")) and not name.startswith("tokenizer"):
                first = _LOCAL_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
                if first:
                    found[name] = first[0]
        return found

    def text(self) -> tuple[str, str]:
        """The card, and whose it is."""
        if self.own is not None:
            return self.own, OWN
        if self.remote_card is not None:
            return self.remote_card, REMOTE
        known = {} if self.teacher_card is None else inherited(self.teacher_card, self.facts.teacher)
        return card(self.facts, self.repo, inherited=known, revision=self.branch), GENERATED

    def result(self, *, dry_run: bool) -> Pushed:
        text, whose = self.text()
        if whose == GENERATED and self.teacher_card is None and self.facts.teacher.hub_id is not None:
            when = "is looked up when it is pushed" if dry_run else "could not be read: add license to the card"
            self.note(f"the licence of {self.facts.teacher.hub_id} {when}")
        sizes = {name: path.stat().st_size for name, path in self.belongings.files.items()}
        if whose != REMOTE:
            sizes = {CARD: len(text.encode()), **sizes}
        return Pushed(
            repo=self.repo,
            revision=self.branch,
            private=self.private,
            dry_run=dry_run,
            card=text,
            card_from=whose,
            files=sizes,
            left_out=dict(self.belongings.left_out),
            notes=self.notes,
            url=self.url,
            commit=self.commit,
        )

    def upload(self, message: str) -> None:
        """Makes repository and branch where they are not there, and one commit."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import RepositoryNotFoundError

        token = get_token()
        if token is None:
            raise UserError("there is no token for the Hub: run hf auth login, or set HF_TOKEN; --dry-run does without")
        api = HfApi(token=token, library_name="linearize")
        with hub_said(self.repo, api.endpoint):
            api.whoami()
            try:
                info: Any = api.model_info(self.repo)
            except RepositoryNotFoundError:
                info = None
            if info is not None and self.private and not info.private:
                raise UserError(
                    f"{self.repo} is there and public, so --private would not hide this: make it private at "
                    f"{api.endpoint}/{self.repo}/settings, or push to another REPO"
                )
            api.create_repo(self.repo, private=True if self.private else None, exist_ok=True)
            if self.branch is not None and not self.branch.startswith("refs/"):
                api.create_branch(self.repo, branch=self.branch, exist_ok=True)
            if info is not None and self.branch is not None:
                info = api.model_info(self.repo, revision=self.branch)
            there = {entry.rfilename for entry in info.siblings or ()} if info is not None else set()
            if CARD in there:
                self._look_at(_download(api, self.repo, info.sha))
            if self.teacher_card is None and self.facts.teacher.hub_id is not None and self.own is None:
                self.teacher_card = _try_download(api, self.facts.teacher.hub_id, self.facts.teacher.revision)
            self._commit(api, message, there)
        self._keep_card()

    def _look_at(self, text: str) -> None:
        """What the repository's card says: whose it is, and of which model."""
        try:
            fields, body = front_matter.split(text)
        except ValueError:
            fields, body = {}, text
        theirs, ours = fields.get("base_model"), self.facts.teacher.hub_id
        named = [theirs] if isinstance(theirs, str) else list(theirs or [])
        if named and ours is not None and ours not in named:
            self.note(
                f"{self.repo} holds a model whose base_model is {', '.join(map(str, named))}; this one's is {ours}"
            )
        # A repository that was made on the site may have a card of fields alone: that is no one's text.
        if body.strip() and not is_generated(text) and self.own is None:
            self.remote_card = text

    def _commit(self, api: Any, message: str, there: set[str]) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        text, whose = self.text()
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path.resolve()))
            for name, path in self.belongings.files.items()
        ]
        if whose != REMOTE:
            operations.insert(0, CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()))
        # What from_pretrained would take in place of these weights, or that no index names any more.
        for name in sorted(there - set(self.belongings.files)):
            if name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name):
                operations.append(CommitOperationDelete(path_in_repo=name))
                self.note(f"{name}, of an earlier push, is removed from {self.repo}")
        done = api.create_commit(self.repo, operations, commit_message=message, revision=self.branch)
        self.commit, self.url = done.oid, f"{api.endpoint}/{self.repo}"
        if self.branch is not None:
            self.url += f"/tree/{self.branch}"

    def _keep_card(self) -> None:
        """The card that we wrote, in the folder too, so that a person can go on from it."""
        text, whose = self.text()
        if whose != GENERATED:
            return
        part = self.folder / f".{CARD}.part-{os.getpid()}"
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.folder / CARD)
        except OSError as error:
            part.unlink(missing_ok=True)
            self.note(f"the card is pushed but could not be written to {self.folder}: {error.strerror or error}")


def _download(api: Any, repo: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8", errors="replace")


def _try_download(api: Any, repo: str, revision: str | None) -> str | None:
    """The teacher's card, None where it has none or it may not be read: the upload goes on without."""
    try:
        return _download(api, repo, revision)
    except Exception:
        return None
