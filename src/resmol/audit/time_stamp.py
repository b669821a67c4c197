"""Time stamps of RFC 3161: an authority signs the digest of a statement together with the time.

The library `rfc3161-client` makes the request and verifies the answer. The one HTTP request is made here, and only if
`resmol anchor --tsa` asks for it; verification needs no network.
"""

from __future__ import annotations

import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from resmol.errors import CheckFailed, DataError, NetworkError, UsageError
from resmol.system.installation import install_hint
from resmol.system.progress import Background
from resmol.system.untrusted_text import quoted, without_password
from resmol.system.user_paths import user_path

MAX_ANSWER_BYTES = 256 * 1024  # answers with a chain of certificates have 2 to 8 KiB
SILENCE_SECONDS = 10.0  # without a byte
ANSWER_SECONDS = 30.0  # in all
_SHA256 = "2.16.840.1.101.3.4.2.1"


class UnknownAuthority(CheckFailed):
    """A time stamp is signed by somebody who is not under the root certificates that the auditor named."""


@dataclass(frozen=True)
class TimeStamp:
    """What an authority stated about a statement.

    Attributes:
        time: When it existed, by the authority's clock.
        authority: The subject of the certificate that signed, as the certificate has it.
        verified: Whether the signature leads to a root certificate that the auditor named.
    """

    time: datetime
    authority: str
    verified: bool


def request_time_stamp(url: str, statement: bytes, *, allow_http: bool = False) -> bytes:
    """Ask an authority for a time stamp; return its answer, a DER ``TimeStampResp``.

    The answer is about the statement's SHA-256 and this request (nonce); `read_time_stamp` checks whose it is.

    Args:
        url: Address of the authority, such as ``https://freetsa.org/tsr``.
        statement: The bytes to stamp; only their digest is sent.
        allow_http: Also ask over unencrypted HTTP. The answer is signed in any case.

    Raises:
        UsageError: The address is neither HTTPS nor on this machine.
        NetworkError: The authority cannot be reached, refuses, or answers with something else.
        DataError: The library is not installed.
    """
    library = _library()
    _require_private(url, allow_http)
    request = library.TimestampRequestBuilder(data=statement, hash_algorithm=library.HashAlgorithm.SHA256).build()
    deadline = time.monotonic() + ANSWER_SECONDS

    def give_up() -> None:
        if time.monotonic() > deadline:
            raise _no_stamp(url, f"no whole answer within {ANSWER_SECONDS:.0f} s")

    answer = Background(lambda: _post(url, request.as_bytes())).wait(give_up)
    try:
        info = _decoded(answer, library).tst_info
    except CheckFailed as error:
        raise _no_stamp(url, error.what) from error
    if info.nonce != request.nonce or info.message_imprint.message != request.message_imprint.message:
        raise _no_stamp(url, "its answer is about another request")
    return answer


def read_time_stamp(answer: bytes, statement: bytes, roots: Sequence[Path]) -> TimeStamp:
    """Return what a time stamp says, verified as far as the root certificates allow.

    Args:
        answer: A DER ``TimeStampResp``.
        statement: The bytes that it has to be about.
        roots: PEM or DER files of root certificates that the auditor trusts; none verifies no signature.

    Raises:
        UnknownAuthority: It is by an authority under another root, so nothing more can be said of it.
        CheckFailed: It is malformed, about other bytes, or altered.
        DataError: A certificate cannot be read, or the library is not installed.
    """
    library = _library()
    response = _decoded(answer, library)
    trusted = [certificate for path in roots for certificate in read_certificates(path)]
    try:
        authority, at = _signer_name(response.signed_data), response.tst_info.gen_time.astimezone(UTC)
        imprint = response.tst_info.message_imprint
    except (ValueError, TypeError) as error:
        raise _bad_stamp("who made it, and when, cannot be read") from error
    if (imprint.hash_algorithm.dotted_string, imprint.message) != (_SHA256, hashlib.sha256(statement).digest()):
        raise _bad_stamp("it is about other bytes than this statement")
    try:
        if trusted:
            library.VerifierBuilder(roots=trusted).build().verify_message(response, statement)
    except (library.VerificationError, ValueError) as error:
        raise _unverified(str(error), authority) from error
    return TimeStamp(at, authority, bool(trusted))


def read_certificates(path: Path) -> list[Any]:
    """Return the X.509 certificates of a PEM or DER file (`DataError` if it holds none)."""
    _library()
    from cryptography import x509

    try:
        content = user_path(path).read_bytes()
        if b"-----BEGIN" in content:
            return list(x509.load_pem_x509_certificates(content))
        return [x509.load_der_x509_certificate(content)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} holds no certificate ({type(error).__name__})",
            fix="name the authority's root certificate, a PEM or DER file from its own pages",
        ) from error


def _library() -> Any:
    try:
        import rfc3161_client
    except ImportError as error:
        raise DataError(
            "time stamps need rfc3161-client, which is not installed", fix=install_hint("anchor")
        ) from error
    return rfc3161_client


def _require_private(url: str, allow_http: bool) -> None:
    parts = urlsplit(url)
    try:
        local = parts.hostname == "localhost" or ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = False
    if not (parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and (local or allow_http)))):
        raise UsageError(
            f"--tsa {without_password(url)} is not an https:// address",
            fix="give one; for an authority that has only http:// add --allow-http (answers are signed in any case)",
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the address was chosen, and checked."""

    def redirect_request(self, *_: Any) -> None:
        """Return nothing, which makes the answer an `HTTPError`."""


def _post(url: str, body: bytes) -> bytes:
    headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
    request = urllib.request.Request(url, body, headers)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=SILENCE_SECONDS) as response:
            answer = bytes(response.read(MAX_ANSWER_BYTES + 1))
    except urllib.error.HTTPError as error:
        with error:
            raise _no_stamp(url, f"HTTP {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise _no_stamp(url, without_password(str(cause) or type(cause).__name__)) from error
    if len(answer) > MAX_ANSWER_BYTES:
        raise _no_stamp(url, f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes")
    return answer


def _no_stamp(url: str, reason: str) -> NetworkError:
    return NetworkError(
        f"{without_password(url)} gave no time stamp: {reason}", fix="try again, or name another authority with --tsa"
    )


def _decoded(answer: bytes, library: Any) -> Any:
    try:
        response = library.decode_timestamp_response(answer)
        if response.status != library.PKIStatus.GRANTED:
            raise _bad_stamp(f"the authority refused it (status {response.status})")
        response.tst_info, response.signed_data.certificates, response.signed_data.signer_infos  # noqa: B018 - parses them
    except ValueError as error:
        raise _bad_stamp("it is not a whole RFC 3161 response") from error
    return response


def _signer_name(signed_data: Any) -> str:
    """Return the subject of the certificate that signed; its issuer where the certificate is not enclosed."""
    from cryptography import x509

    (signer,) = signed_data.signer_infos
    enclosed = [x509.load_der_x509_certificate(der) for der in signed_data.certificates]
    names = [
        one.subject for one in enclosed if (one.issuer, one.serial_number) == (signer.issuer, signer.serial_number)
    ]
    return str((names[0] if names else signer.issuer).rfc4514_string())


def _unverified(problem: str, authority: str) -> CheckFailed:
    """Return what a verification failed at, without OpenSSL's places in its own sources."""
    about_certificate = re.search('Verify error: ([^"]*)', problem)
    if about_certificate and re.search("issuer|self-signed", about_certificate[1]):
        reason = f"{quoted(authority)} is not under the root certificate that was named"
        return UnknownAuthority(reason, fix="name that authority's root certificate, if you trust it")
    if about_certificate:
        reason = about_certificate[1].partition(" or ")[0]
        return _bad_stamp(f"the certificate of {quoted(authority)} does not hold at its time ({reason})")
    if "verifying certificates" in problem:
        return _bad_stamp("it was altered: its signature does not fit")
    return _bad_stamp(f"it was not made as RFC 3161 demands ({quoted(problem)})")


def _bad_stamp(reason: str) -> CheckFailed:
    return CheckFailed(f"time stamp: {reason}", fix="see who made it; `resmol anchor` adds a new one")
