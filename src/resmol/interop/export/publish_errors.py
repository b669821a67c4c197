"""Turn errors of the Hub's client into two lines: what happened and which state it left, and what to do."""

from __future__ import annotations

import re
from http import HTTPStatus

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from resmol.errors import CheckFailed, NetworkError, ResmolError, UsageError
from resmol.system.installation import program
from resmol.system.untrusted_text import without_password

MAX_REASON = 240


def login(repo_id: str) -> str:
    """Return how to give the Hub a token that may write to a repository."""
    how = f"run `{program('hf')} auth login`, or set HF_TOKEN, with a token that may write to {repo_id}"
    return f"{how}; then repeat the command"


def explained(error: Exception, repo_id: str, state: str, advice: str) -> ResmolError:
    """Return the error for the user.

    Args:
        error: What the client raised.
        repo_id: The repository.
        state: Its known state.
        advice: Further advice, appended to the fix.
    """
    reason = readable(error)
    cause = _cause(error)
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    repeat = f"the same command can be repeated: what has arrived is not sent again{advice}"
    if status == HTTPStatus.UNAUTHORIZED:
        return UsageError(f"the Hub does not accept the token ({reason}); {state}", fix=login(repo_id))
    if status == HTTPStatus.FORBIDDEN:
        return UsageError(
            f"the token may not write to {repo_id} ({reason}); {state}",
            fix=login(repo_id),
        )
    if status == HTTPStatus.PAYMENT_REQUIRED:
        return UsageError(
            f"the Hub requires a paid plan for this ({reason}); {state}", fix="see the account's billing page"
        )
    if status in (HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED):
        return NetworkError(f"{repo_id} was changed by somebody else meanwhile ({reason}); {state}", fix=repeat)
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return CheckFailed(
            f"the Hub does not accept the card's metadata ({reason}); {state}", fix="report this as a bug"
        )
    return NetworkError(f"publishing to {repo_id} broke off ({reason}); {state}", fix=repeat)


def readable(error: BaseException) -> str:
    """Return the reason in a line, without passwords, signatures, tokens and control characters."""
    cause = _cause(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", without_password(text))
    if token := get_token():
        text = text.replace(token, "…")
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _cause(error: BaseException) -> BaseException:
    """Return the original error: the client wraps those of its upload threads and of its cache."""
    while type(error) in (RuntimeError, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error
