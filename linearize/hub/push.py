"""`push`: the card and the files of a converted folder, to a repository on the Hub in one commit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import modeling, public
from ..errors import UsageError, UserError
from ..json_files import as_written
from ..paths import expanded
from ..version import __version__
from . import front_matter
from .card import card, is_generated
from .facts import Facts, gather
from .files import CARD, CONFIG, PICTURES, Belongings, collect, is_stale
from .pictures import available, drawn
from .said import hub_said
from .teacher import inherited, local_card
from .transfer import large_files

_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
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
    overwrite: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Uploads the converted model in `out` to the Hub, with a card written from what was measured and recorded.

    The token is the one of `HF_TOKEN` or of `hf auth login`, the Hub the one of `HF_ENDPOINT`. A README.md in `out`, or
    in the repository, that a person wrote is kept as it is. What an earlier push left and would be loaded in place of
    this model, or tells of another, is removed in the same commit. Paths of this machine are cut from records and
    results; a token in any file is refused.

    Large files go up by Xet where hf_xet is installed and the Hub has it, else by LFS; a push that was stopped sends
    only what is missing when it is run again.

    Args:
        out: a folder that convert, distill, finetune or run made.
        repo: `owner/name`; made where it is not there.
        private: make it private. A repository that is there and public is refused.
        revision: the branch, made where it is not there; main by default.
        message: the commit's.
        overwrite: replace a model of another kind in the repository, which is refused otherwise.
        dry_run: neither ask the Hub nor write anything.
        say: told the notes of the result as they come up.

    Raises:
        UserError: no whole converted model in `out`, no token or one that may not write, no Hub to be reached.
        UsageError: `repo` or `revision` cannot be a name.
    """
    folder = expanded(out)
    _check_names(folder, repo, revision)
    branch = None if revision in (None, "main") else revision
    with as_written(folder):
        belongings = collect(folder)
        facts = gather(folder, belongings)
        push = _Push(folder, repo, private, branch, belongings, facts, _own_card(belongings), say)
        push.text()  # what cannot be told is said before anything is asked of the Hub
    if dry_run:
        return push.result(dry_run=True)
    push.upload(message or f"Upload {folder.resolve().name}, converted by linearize", overwrite=overwrite)
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
        public.refuse_token(str(belongings.own_card), text.encode())
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
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.repo, self.private, self.branch = folder, repo, private, branch
        self.belongings, self.facts, self.own, self.say = belongings, facts, own, say
        self.teacher_card = local_card(facts.teacher)
        self.notes: list[str] = []
        self.remote_card: str | None = None
        self.url: str | None = None
        self.commit: str | None = None
        self.drawn = {} if own is not None else drawn(belongings.measured)
        self.files = self._contents()
        self._local_notes()

    def _contents(self) -> dict[str, Path | bytes]:
        """What goes up beside the card: files as they are, or in the words that others may read."""
        found: dict[str, Path | bytes] = {}
        cleaned = []
        for name, path in self.belongings.files.items():
            if name.startswith(PICTURES) and self.own is None:
                continue  # drawn anew
            cut = public.contents(name, path, told=name in self.belongings.told)
            found[name] = path if cut is None else cut
            cleaned += [name] if cut is not None else []
        if cleaned:
            self.note(f"{', '.join(cleaned)}: paths of this machine are cut to their last part in what goes up")
        return dict(sorted({**found, **self.drawn}.items()))

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def _local_notes(self) -> None:
        teacher = self.facts.teacher
        if teacher.hub_id is None:
            self.note(f"the teacher is not known by a Hub id, so the card names no base_model; add it to {CARD}")
        elif not teacher.sure:
            self.note(f"base_model {teacher.hub_id} is from config.json, no record names it: check that it is right")
        if not self.facts.tokenizer:
            self.note("there is no tokenizer in OUT: tokenizer.save_pretrained(OUT), and push again")
        ours = Path(modeling.__file__).parent
        for name in self.belongings.files:
            if name.endswith(".py") and not _same(self.belongings.files[name], ours / name):
                self.note(f"{name} is not the code of linearize {__version__}: read it, others will run it")
        if self.own is None and not self.drawn and not available():
            self.note("no pictures, matplotlib is not installed: pip install 'linearize[bench]', and push again")

    def text(self) -> tuple[str, str]:
        """The card, and whose it is."""
        if self.own is not None:
            return self.own, OWN
        if self.remote_card is not None:
            return self.remote_card, REMOTE
        known = {} if self.teacher_card is None else inherited(self.teacher_card, self.facts.teacher)
        pictures = [name for name in self.files if name.endswith(".png")]
        text = card(self.facts, self.repo, inherited=known, pictures=pictures, revision=self.branch)
        return text, GENERATED

    def result(self, *, dry_run: bool) -> Pushed:
        text, whose = self.text()
        if whose == GENERATED and self.teacher_card is None and self.facts.teacher.hub_id is not None:
            when = "is looked up when it is pushed" if dry_run else "could not be read: add license to the card"
            self.note(f"the licence of {self.facts.teacher.hub_id} {when}")
        sizes = {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }
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

    def upload(self, message: str, *, overwrite: bool) -> None:
        """Makes repository and branch where they are not there, and one commit."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

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
            made = info is None
            if made:
                api.create_repo(self.repo, private=True if self.private else None, exist_ok=True)
            elif self.branch is not None:
                try:
                    info = api.model_info(self.repo, revision=self.branch)
                except RevisionNotFoundError:
                    made = True
            there = {entry.rfilename for entry in info.siblings or ()} if info is not None else set()
            # A new branch holds what main does.
            if CONFIG in there and not overwrite and (self.branch is None or not made):
                self._refuse_another(_kind(_download(api, self.repo, CONFIG, info.sha)))
            if made and self.branch is not None:
                api.create_branch(self.repo, branch=self.branch, exist_ok=True)
            if CARD in there:
                self._look_at(_download(api, self.repo, CARD, info.sha))
            teacher = self.facts.teacher
            if self.teacher_card is None and teacher.hub_id is not None and self.own is None:
                self.teacher_card = _try_card(api, teacher.hub_id, teacher.commit or teacher.revision)
            self._commit(api, message, there, None if info is None else info.sha)
        self._keep_card()

    def _refuse_another(self, kind: str) -> None:
        """What lies in the repository must be a converted model, too, to be replaced by one."""
        if kind != "linearize":
            raise UserError(
                f"{self.repo} holds a model that linearize did not make (its model_type is {kind}): push to another "
                "REPO or --revision BRANCH, or pass --overwrite to put this in its place"
            )

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

    def _commit(self, api: Any, message: str, there: set[str], parent: str | None) -> None:
        """All in one commit upon `parent`: the repository is what it was, or whole."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        text, whose = self.text()
        operations: list[Any] = [
            CommitOperationAdd(name, what if isinstance(what, bytes) else str(what.resolve()))
            for name, what in self.files.items()
        ]
        if whose != REMOTE:
            operations.insert(0, CommitOperationAdd(CARD, text.encode()))
        stale = sorted(name for name in there - set(self.files) if is_stale(name))
        operations += [CommitOperationDelete(name) for name in stale]
        if stale:
            self.note(f"of an earlier push, removed from {self.repo}: {', '.join(stale)}")
        with large_files(api, self.repo, self.branch):
            done = api.create_commit(
                self.repo, operations, commit_message=message, revision=self.branch, parent_commit=parent
            )
        self.commit, self.url = done.oid, f"{api.endpoint}/{self.repo}"
        if self.branch is not None:
            self.url += f"/tree/{self.branch}"

    def _keep_card(self) -> None:
        """The card that we wrote and its pictures, in the folder too, so that a person can go on from them."""
        text, whose = self.text()
        if whose != GENERATED:
            return
        pictures = self.drawn
        if pictures and (self.folder / PICTURES).is_symlink():
            self.note(f"{self.folder / PICTURES} is a link: the pictures are pushed, and not written through it")
            pictures = {}
        try:
            for name, what in {CARD: text.encode(), **pictures}.items():
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                part = path.with_name(f".{path.name}.part-{os.getpid()}")
                try:
                    part.write_bytes(what)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            self.note(f"the card is pushed but could not be written to {self.folder}: {error.strerror or error}")


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _kind(text: str) -> str:
    """The model_type of a config.json."""
    try:
        return str(json.loads(text).get("model_type"))
    except (ValueError, AttributeError):
        return "not to be read"


def _download(api: Any, repo: str, name: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo, name, revision=revision)).read_text(encoding="utf-8", errors="replace")


def _try_card(api: Any, repo: str, revision: str | None) -> str | None:
    """The teacher's card, None where it has none or it may not be read: the upload goes on without."""
    try:
        return _download(api, repo, CARD, revision)
    except Exception:
        return None
