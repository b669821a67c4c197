"""Signatures with a plain Ed25519 key over a statement, as `openssl pkeyutl` and `ssh-keygen` know them."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.errors import CheckFailed, DataError
from resmol.system.installation import install_hint
from resmol.system.user_paths import user_path

_MAKE_ONE = "make one: openssl genpkey -algorithm ed25519 -out key.pem, or ssh-keygen -t ed25519 -N '' -f key"
_MAX_KEY_BYTES = 64 * 1024


@dataclass(frozen=True)
class KeySignature:
    """A signature and the public key that it fits.

    Attributes:
        signature: The 64 bytes of Ed25519 (RFC 8032) over the statement.
        public_key: The public key as PEM.
    """

    signature: bytes
    public_key: bytes


def sign(statement: bytes, key: Path) -> KeySignature:
    """Sign a statement.

    Args:
        statement: The bytes to sign.
        key: An Ed25519 private key without a passphrase, as PEM or in OpenSSH's form. Nothing of it is kept or shown.

    Raises:
        DataError: The file is no such key, or the library is not installed.
    """
    from_pem, from_ssh = _loaders("private")
    private = _load(key, lambda content: (from_ssh if b"OPENSSH" in content else from_pem)(content, password=None))
    return KeySignature(private.sign(statement), _pem(private.public_key()))


def read_public_key(path: Path) -> bytes:
    """Return an Ed25519 public key, PEM or a line of OpenSSH, as PEM (`DataError`)."""
    from_pem, from_ssh = _loaders("public")
    return _pem(_load(path, lambda content: (from_pem if content.startswith(b"-----") else from_ssh)(content)))


def signer_of(statement: bytes, signed: KeySignature) -> str:
    """Return the fingerprint of the key that signed a statement, as ``ssh-keygen -l`` shows it: ``SHA256:...``.

    Raises:
        CheckFailed: The signature does not fit the statement and the key, or there is no such key.
        DataError: The library is not installed.
    """
    from_pem, _ = _loaders("public")
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        key = from_pem(signed.public_key)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise _bad_signature("the key beside it is no Ed25519 public key")
    try:
        key.verify(signed.signature, statement)
    except InvalidSignature as error:
        raise _bad_signature("it does not fit the statement: one of the two was altered") from error
    blob = base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _loaders(kind: str) -> tuple[Any, Any]:
    """Return the functions that load a key of this kind as PEM and in OpenSSH's form."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise DataError("signatures need cryptography, which is not installed", fix=install_hint("anchor")) from error
    return getattr(serialization, f"load_pem_{kind}_key"), getattr(serialization, f"load_ssh_{kind}_key")


def _load(path: Path, load: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    try:
        with user_path(path).open("rb") as file:
            key = load(file.read(_MAX_KEY_BYTES))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # whose texts may quote what they read
        reason = "it has a passphrase" if isinstance(error, TypeError) else type(error).__name__
        raise DataError(f"{path} cannot be used as an Ed25519 key ({reason})", fix=_MAKE_ONE) from None
    if not isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        raise DataError(f"{path} is a key of another kind than Ed25519", fix=_MAKE_ONE)
    return key


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def _bad_signature(reason: str) -> CheckFailed:
    return CheckFailed(f"signature: {reason}", fix="see who made it; `resmol anchor` adds a new one")
