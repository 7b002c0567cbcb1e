"""How large files travel: by Xet where the Hub has it, else by LFS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def large_files(api: Any, repo: str, branch: str | None) -> Iterator[None]:
    """Inside, huggingface_hub uploads to `repo` in a way that the Hub of `api` understands.

    With hf_xet installed, as it is by default, huggingface_hub takes Xet and nothing else, and on an endpoint that does
    not have it (a mirror, a Hub of one's own) ends with a network error. Such an endpoint is asked first, and gets LFS.

    Raises:
        HfHubHTTPError: the token may not write there.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if constants.HF_HUB_DISABLE_XET:
        yield
        return
    url = f"{api.endpoint}/api/models/{repo}/xet-write-token/{(branch or 'main').replace('/', '%2F')}"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    if answer.status_code not in (404, 405, 501):
        hf_raise_for_status(answer)
        yield
        return
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = False
