"""One clear message, with the next command, from whatever the Hub's client raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError, causes, one_line

_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_SETTINGS = "https://huggingface.co/settings/tokens"


@contextmanager
def hub_said(repo: str, endpoint: str) -> Iterator[None]:
    """Turns any error of the body into one UserError that says what to do about the push to `repo`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _end_bars()
        raise UserError(_message(error, repo, endpoint)) from error


def _end_bars() -> None:
    """The client leaves the bar of a failed upload open, and the message would stand on its line."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _message(error: Exception, repo: str, endpoint: str) -> str:
    chain = causes(error)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    status = next((code for link in chain if (code := _status(link)) is not None), None)
    said = next((text for link in chain if (text := getattr(link, "server_message", None))), None) or _first(chain[-1])
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, and run the same command again"
    if "GatedRepoError" in kinds:
        return f"{repo} is gated, and your token may not read it: ask its owner, or push to another REPO"
    if "RevisionNotFoundError" in kinds:
        return f"--revision: {repo} has no such branch and it cannot be made; give the name of a branch"
    if status == 401:
        return f"the Hub does not know this token (401): run hf auth login, or set HF_TOKEN to one of {_SETTINGS}"
    if status == 402:
        return f"the Hub asks for payment for {repo} (402: {said}); free some space, or push to another REPO"
    if status == 403:
        return (
            f"the token may not write to {repo} (403: {said}): make one with the role write at {_SETTINGS}, run "
            "hf auth login, or push to a REPO of your own"
        )
    if status == 404:
        what = f"{repo} is not there or your token may not see it" if "RepositoryNotFoundError" in kinds else said
        return f"{endpoint} does not have what a Hub has (404: {what}): check HF_ENDPOINT and REPO"
    if status in (409, 412):
        return f"{repo} changed meanwhile ({status}: {said}): run the same command again"
    if status == 413:
        return f"a file is too large for {endpoint} (413: {said}): write smaller ones with --max-shard-size 5GB"
    if status == 429:
        return f"the Hub asks for a pause (429: {said}): run the same command again later"
    if status is not None and status >= 500:
        return f"{endpoint} has a trouble of its own ({status}): run the same command again; what has arrived is kept"
    if status is not None:
        return f"the Hub refuses ({status}): {said}; change that, and run the same command again"
    if kinds & {"UnsupportedProtocol", "InvalidURL", "LocalProtocolError"}:
        return f"HF_ENDPOINT: {endpoint!r} is no address; give one such as https://huggingface.co, or unset it"
    if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:
        return f"{endpoint} cannot be reached ({_first(chain[-1])}): check the connection, or HF_ENDPOINT"
    if "JSONDecodeError" in kinds:
        return f"{endpoint} does not answer as a Hub does: check HF_ENDPOINT, or unset it"
    if "LFS batch API" in str(error) or "Invalid metadata" in str(error):
        return f"the Hub refuses: {one_line(error, 400)}"
    return f"pushing to {repo} failed: {type(error).__name__}: {_first(error)}"


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    # hf_xet, which is no Python, says it in words alone
    told = _XET_STATUS.search(str(error)) if code is None else None
    return int(told[1]) if told else code


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
