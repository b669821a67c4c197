"""One file from the Hugging Face Hub, quickly or not at all.

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


def hub_file(hub_id: str, name: str, *, revision: str | None = None, fix: str) -> Path:
    """Return the path of a file of a Hub repository, from the Hub's cache if it is there.

    Args:
        hub_id: ``owner/name``.
        name: The file.
        revision: A commit; None takes the newest.
        fix: What the user can do when it does not come.

    Raises:
        NetworkError: It is not cached, and the Hub is switched off, out of reach, or does not give it.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"HF_HUB_OFFLINE is set and {hub_id} is not in the Hub's cache", fix=fix)
    require_answer(hf_hub_url(hub_id, name, revision=revision), constants.ENDPOINT, fix)
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except Exception as error:  # the client's errors come from several libraries, and differ between its versions
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = without_password(lines[0])[:200]
        raise NetworkError(f"the Hub did not give {hub_id}/{name} ({reason})", fix=fix) from error


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
