"""What a Hub id is, and one file from the Hugging Face Hub, quickly or not at all.

The Hub's own client retries for 23 seconds and more when nothing answers, and a name server can hang longer. So the
Hub is asked once, with a short limit, before the client is let loose. HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE are honoured, since the client does the work.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from pathlib import Path

from resmol.errors import NetworkError

PROBE_SECONDS = 3.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def hub_file(hub_id: str, name: str, *, revision: str | None = None, fix: str) -> Path:
    """Return the path of a file of a Hub repository.

    What the Hub's cache holds of a commit is that commit's for ever. Of a branch it may be old: then the Hub is asked,
    and the cache is what is left when it does not answer.

    Args:
        hub_id: ``owner/name``.
        name: The file.
        revision: A commit, or a branch; None takes the newest.
        fix: What the user can do when it does not come.

    Raises:
        NetworkError: The Hub does not give it; or it is switched off or out of reach, and the file is not cached.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, name, revision=revision)
    kept = Path(cached) if isinstance(cached, str) else None
    if kept is not None and _COMMIT.fullmatch(revision or ""):
        return kept
    try:
        _require_hub(hub_id, hf_hub_url(hub_id, name, revision=revision), fix)
    except NetworkError:
        if kept is None:
            raise
        return kept
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except Exception as error:  # the client's errors come from several libraries, and differ between its versions
        raise NetworkError(f"the Hub did not give {hub_id}/{name} ({_reason(error)})", fix=fix) from error


def hub_names(hub_id: str, *, revision: str | None = None, fix: str) -> list[str]:
    """Return the names of the files of a Hub repository; without a connection, of those in the Hub's cache.

    Args:
        hub_id: ``owner/name``.
        revision: A commit, or a branch; None takes the newest.
        fix: What the user can do when they do not come.

    Raises:
        NetworkError: The Hub does not tell; or it is switched off or out of reach, and nothing is cached.
    """
    from huggingface_hub import HfApi, hf_hub_url, snapshot_download

    try:
        _require_hub(hub_id, hf_hub_url(hub_id, "config.json", revision=revision), fix)
    except NetworkError as error:
        try:
            # No patterns: the client calls a cached folder incomplete when a file that was never wanted is not there.
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=[]))
        except Exception:  # as below; the first error is the one to tell
            raise error from None
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        return sorted(HfApi().list_repo_files(hub_id, revision=revision))
    except Exception as error:  # as in `hub_file`
        raise NetworkError(f"the Hub did not list the files of {hub_id} ({_reason(error)})", fix=fix) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_password(lines[0])[:200]


def _require_hub(hub_id: str, url: str, fix: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"HF_HUB_OFFLINE is set and {hub_id} is not in the Hub's cache", fix=fix)
    require_answer(url, constants.ENDPOINT, fix)


def require_answer(url: str, endpoint: str, fix: str) -> None:
    """Ask the Hub once (`NetworkError` when it does not answer, or only to say that it cannot)."""
    from huggingface_hub import get_session

    status: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # any failure means the same: no answer
            status.append(get_session().head(url, timeout=PROBE_SECONDS).status_code)

    # A thread, because the time-out of a request does not cover the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    if not status or status[0] == 429 or status[0] >= 500:
        raise NetworkError(f"the Hub cannot be reached at {without_password(endpoint) or 'HF_ENDPOINT'}", fix=fix)


def without_password(text: str) -> str:
    """Leave out what stands before the @ of an address: HF_ENDPOINT may name a mirror with user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)
