"""Read from the Hugging Face Hub, and fail within seconds when it is unreachable.

Its own client retries for 23 seconds and more when nothing answers, and a name server can hang longer. So one short
request asks whether the Hub is there before the client is used. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are
honored, since the client does the work.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from resmol.errors import CheckpointError, NetworkError
from resmol.system.progress import Background, ProgressLines, is_live
from resmol.system.safetensors_header import TensorInfo, tensor_info
from resmol.system.untrusted_text import without_password

PROBE_SECONDS = 3.0
HEADER_SECONDS = 10.0  # for one response of the server
ALL_HEADERS_SECONDS = 60.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Answer = TypeVar("Answer")


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def is_meant_to_be_local(path: Path) -> bool:
    """Return whether a path of the form of a Hub id was meant to be here: its first part is a folder, or ``runs``."""
    return path.parent.is_dir() or path.parent.name == "runs"


def hub_file(hub_id: str, name: str, *, revision: str | None = None, fix: str) -> Path:
    """Return the path of a file of a Hub repository, downloaded where the cache does not hold it.

    A file of a commit never changes, so the cache answers for it. A branch moves: the Hub is asked first, and the cache
    is the fallback when the Hub does not answer.

    Args:
        hub_id: ``owner/name``.
        name: The file.
        revision: A commit or a branch; None takes the newest commit.
        fix: What the user can do about a failure.

    Raises:
        NetworkError: The Hub refuses it; or the Hub is switched off or unreachable, and the file is not cached.
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
        return Path(
            _with_lines(f"downloading {hub_id}/{name}", lambda: hf_hub_download(hub_id, name, revision=revision))
        )
    except Exception as error:  # the client's errors come from several libraries, and differ between its versions
        raise NetworkError(f"the Hub did not give {hub_id}/{name} ({reason(error)})", fix=fix) from error


def hub_names(hub_id: str, *, revision: str | None = None, fix: str) -> list[str]:
    """Return the names of the files of a Hub repository; without a connection, of those in the cache.

    Args:
        hub_id: ``owner/name``.
        revision: A commit or a branch; None takes the newest commit.
        fix: What the user can do about a failure.

    Raises:
        NetworkError: The Hub refuses; or it is switched off or unreachable, and nothing is cached.
    """
    from huggingface_hub import HfApi, hf_hub_url, snapshot_download

    try:
        _require_hub(hub_id, hf_hub_url(hub_id, "config.json", revision=revision), fix)
    except NetworkError as error:
        try:
            # No patterns: the client calls a cached folder incomplete when a file that was never wanted is not there.
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=[]))
        except Exception:  # as in `hub_file`; the first error is the one to show
            raise error from None
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        return sorted(HfApi().list_repo_files(hub_id, revision=revision))
    except Exception as error:  # as in `hub_file`
        raise NetworkError(f"the Hub did not list the files of {hub_id} ({reason(error)})", fix=fix) from error


def hub_tensors(hub_id: str, *, revision: str | None = None, fix: str) -> dict[str, TensorInfo]:
    """Return what the headers of a model's safetensors files say; their data is not downloaded.

    Args:
        hub_id: ``owner/name``.
        revision: A commit or a branch; None takes the newest commit.
        fix: What the user can do about a failure.

    Raises:
        NetworkError: The Hub is unreachable or refuses, or the repository holds no safetensors model.
        CheckpointError: A header is malformed.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import SafetensorsParsingError

    _require_hub(hub_id, hf_hub_url(hub_id, "config.json", revision=revision), fix)
    try:
        found = _within(
            ALL_HEADERS_SECONDS,
            lambda: HfApi().get_safetensors_metadata(hub_id, revision=revision, timeout=HEADER_SECONDS),
        )
    except SafetensorsParsingError as error:
        raise _malformed(hub_id, error) from error
    except Exception as error:  # as in `hub_file`
        raise NetworkError(f"the Hub did not give the headers of {hub_id} ({reason(error)})", fix=fix) from error
    try:
        return {
            name: tensor_info(
                name, {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": list(entry.data_offsets)}
            )
            for header in found.files_metadata.values()
            for name, entry in header.tensors.items()
        }
    except (ValueError, TypeError) as error:
        raise _malformed(hub_id, error) from error


def _malformed(hub_id: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{hub_id} holds no sound safetensors file: {reason(error)}", fix="choose another model or revision"
    )


def require_answer(url: str, endpoint: str, fix: str) -> None:
    """Ask the Hub once (`NetworkError` when it does not answer, or answers that it cannot)."""
    from huggingface_hub import get_session

    status = 0
    with suppress(Exception):  # any failure means the same: no answer
        status = _within(PROBE_SECONDS + 1, lambda: get_session().head(url, timeout=PROBE_SECONDS).status_code)
    if status in (0, 429) or status >= 500:
        raise NetworkError(f"the Hub cannot be reached at {without_password(endpoint) or 'HF_ENDPOINT'}", fix=fix)


def _require_hub(hub_id: str, url: str, fix: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"HF_HUB_OFFLINE is set and {hub_id} is not in the Hub's cache", fix=fix)
    require_answer(url, constants.ENDPOINT, fix)


def _with_lines(title: str, download: Callable[[], Answer]) -> Answer:
    """Return what a download of the client returns; where it shows no bar of its own, lines say that it goes on."""
    if is_live():
        return download()
    lines = ProgressLines(title)
    return Background(download).wait(lambda: lines.advance(0, None, ""))


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """Return what ``ask`` returns, or raise what it raises, or `TimeoutError`.

    The request runs in a thread that is left behind at the end of the time: the limit of an HTTP request covers neither
    the lookup of a name nor a server that sends a byte now and then.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # raised again below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answers[0]


def reason(error: Exception) -> str:
    """Return the first line of what an error of the client says, without passwords."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_password(lines[0])[:200]
