"""Output folders that are whole or not there: written beside their final name, renamed when complete."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UsageError, UserError
from .paths import expanded

# A folder with neither was not made by this package: --overwrite will not delete it.
_OURS = ("linearize.json", "config.json of a converted model")
_FOLDERS = ("pictures", "speed", "bench", "additional_chat_templates")  # the card's, what bench measured, a tokenizer's
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_SAID = (
    "os error 28",  # safetensors
    "No space left on device",
    "PytorchStreamWriter failed",  # torch.save, while writing and while closing
    ". unexpected pos ",
)


def check_new(out: str | Path, *, overwrite: bool = False, reads: Iterable[object] = ()) -> Path:
    """`out` as a path with `~` expanded, when a folder may be made there; call it before hours of work.

    `reads` are the models, text and files that the work is made from, those among them that are paths: `out` must hold
    none of them.

    Raises:
        UsageError: `out` exists and `overwrite` is off, or it is something that must not be replaced.
        UserError: its parent cannot be written to.
    """
    path = expanded(out)
    if not path.name or path.name == "..":
        raise UsageError(f"-o/--out: {str(out)!r} names no new folder; give it a name, as -o {path / 'student'}")
    if os.path.lexists(path):
        if not path.is_dir() or path.is_symlink():
            raise UsageError(f"-o/--out: {path} exists and is not a folder; choose another name")
        if not overwrite:
            raise UsageError(f"-o/--out: {path} exists; choose another name, or pass --overwrite to replace it")
        where = path.resolve()
        if where == Path.home() or where in (Path.cwd(), *Path.cwd().parents):
            raise UsageError(f"-o/--out: {path} is the home folder or the one you stand in, and is not overwritten")
        for source in (expanded(read) for read in reads if isinstance(read, str | Path)):
            if os.path.lexists(source) and where in (source.resolve(), *source.resolve().parents):
                raise UsageError(f"-o/--out: {path} holds {source}, which this reads; choose another name")
        if any(path.iterdir()) and not _is_ours(path):
            raise UsageError(
                f"-o/--out: {path} holds no model that linearize made ({' or '.join(_OURS)}), so --overwrite leaves it "
                "alone; choose another name, or remove it yourself"
            )
        others = [entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in _FOLDERS]
        if others:
            raise UsageError(
                f"-o/--out: {path} holds folders that linearize did not make ({', '.join(sorted(others)[:3])}), so "
                "--overwrite leaves it alone; move them away, or choose another name"
            )
    ancestor = _nearest(path)
    if not ancestor.is_dir():
        raise UsageError(f"-o/--out: {ancestor} is a file, so {path} cannot be made; choose another name")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"-o/--out: no permission to write in {ancestor}; choose another folder")
    return path


def _is_ours(folder: Path) -> bool:
    if (folder / _OURS[0]).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "linearize"


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; it becomes `out` when the body ends well and is removed when it
    raises.

    With `overwrite`, a folder that is at `out` already stays as it is until the new one is whole.

    Raises:
        UsageError: `out` exists and `overwrite` is off (before the body runs), see `check_new`; or it came while the
            body ran, see `settle`.
        UserError: the disk is full, or `out` cannot be written to.
    """
    path = check_new(out, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    made = _absent_parents(path)
    try:
        with _said(path):
            _remove(partial)  # left by a killed process of the same id
            partial.mkdir(parents=True)
            yield partial
            settle(partial, path, overwrite=overwrite, spare=_free_name(path))
    finally:
        _remove(partial)
        _remove_empty(made)


@contextmanager
def resumed_folder(out: str | Path, key: str, *, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """As `new_folder`, but what a kill or Ctrl-C leaves is given again to the next call with the same `out` and `key`.

    Gives the folder that becomes `out`, and one in it for what is needed on the way alone. `key` says all that decides
    what is written, in letters that a file's name may have; leftovers of other keys are removed, and so is everything
    where the body fails.

    Raises:
        UsageError, UserError: as `new_folder`, and where another process writes the same just now.
    """
    path = check_new(out, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.unfinished-{key}")
    work = partial / ".work"
    made = _absent_parents(path)
    done = False
    try:
        with _said(path):
            work.mkdir(parents=True, exist_ok=True)
            with _locked(work) as mine:
                if not mine:
                    raise UserError(f"-o/--out: another process is writing {path}; wait for it, or choose another name")
                try:
                    _remove_leftovers(path, partial)
                    yield partial, work
                    done = True
                except Exception:
                    _remove(partial)
                    raise
            _remove(work)
            settle(partial, path, overwrite=overwrite, spare=_free_name(path))
    finally:
        if done:
            _remove(partial)
        _remove_empty(made)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process alone has `folder` for the body; the system lets go of it when a process ends."""
    try:
        import fcntl
    except ImportError:  # Windows does not let a folder be removed whose files are open
        yield True
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # some file systems have no locks
            return
        yield True


def _remove_leftovers(path: Path, partial: Path) -> None:
    """What killed calls with other keys left; what a running one writes stays."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.unfinished-*"):
        if other != partial and (other / ".work").is_dir():
            with _locked(other / ".work") as free:
                if free:
                    _remove(other)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Says in one message where the body fails because `path` cannot be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(_full_message(path)) from error
        if isinstance(error, PermissionError):
            raise UserError(f"-o/--out: cannot write {path}: {error}") from error
        raise


def _absent_parents(path: Path) -> list[Path]:
    return [parent for parent in path.absolute().parents if not os.path.lexists(parent)]


def _remove_empty(made: list[Path]) -> None:
    for parent in made:  # innermost first; one that holds OUT, or anything else, stays
        with suppress(OSError):
            parent.rmdir()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is the disk being full: OSError, or what safetensors and torch make
    of it."""
    while error is not None:
        said = str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(sign in said for sign in _FULL_SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full_message(path: Path) -> str:
    there = _nearest(path)
    free = shutil.disk_usage(there).free
    return (
        f"the disk is full: {path} could not be written ({free / 2**20:.0f} MiB are free in {there}); what was "
        "written of it is removed; free some space, or give -o a folder on another disk"
    )


def _nearest(path: Path) -> Path:
    """The innermost folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def settle(made: Path, path: Path, *, overwrite: bool, spare: Path, reads: Iterable[object] = ()) -> None:
    """Puts the whole folder `made` at `path`, or, where someone else was quicker, at `spare`.

    Raises:
        UsageError: as `check_new`; it says where `made` lies now.
    """
    try:
        check_new(path, overwrite=overwrite, reads=reads)
    except UsageError as error:
        made.rename(spare)
        raise UsageError(f"{error}. What was made is whole, and lies in {spare}") from error
    put_in_place(made, path)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}-{count}") for count in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def put_in_place(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`, replacing a folder there; a failure leaves the old folder in place."""
    if not os.path.lexists(path):
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    _remove(old)
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)
