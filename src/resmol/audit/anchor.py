"""`resmol anchor`: what others can vouch for. A statement names a head of the ledger; authorities and keys sign it.

Each anchor is a folder ``RUN/anchors/line-<number>-<digest>``, written whole or not at all:

- ``manifest.json``, the statement: the head after a line, the number of lines and steps, the digest of the certificate;
- ``1.tsr``, ...: answers of RFC 3161 authorities about these bytes, as ``openssl ts -verify`` reads them;
- ``1.sig`` and ``1.pub``, ...: Ed25519 signatures over these bytes and their public keys, for ``openssl pkeyutl``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resmol.audit.key_signature import KeySignature, read_public_key, sign, signer_of
from resmol.audit.time_stamp import TimeStamp, UnknownAuthority, read_certificates, read_time_stamp, request_time_stamp
from resmol.checks import Check, check_problems
from resmol.errors import CheckFailed, DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import GENESIS, LedgerContent, Record, canonical, effective_steps, read_ledger
from resmol.system.atomic_io import commit_directory, file_sha256, fsync_path, make_directory
from resmol.system.untrusted_text import parse_json, quoted
from resmol.system.wording import counted

STATEMENT = "manifest.json"  # the file that `commit_directory` writes last
FORMAT = 1
MAX_FILE_BYTES = 256 * 1024
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str, "head": str, "lines": int, "steps": int, "time": str, "certificate_sha256": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """Whom an auditor knows: who is not named here is not trusted, only shown.

    Attributes:
        tsa_roots: Root certificates of time-stamping authorities.
        public_keys: Ed25519 public keys.
    """

    tsa_roots: tuple[Path, ...] = ()
    public_keys: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Anchor:
    """An anchor as an audit sees it.

    Attributes:
        folder: Where it lies.
        lines: The line after which the head was taken; 0 where the statement cannot be read.
        steps: The steps of the run's history up to that line.
        stamps: The time stamps that hold.
        keys: Fingerprint of each key whose signature holds -> whether the auditor named it.
        claimed: When it was made, by the clock of whoever made it.
        problems: What is wrong with it.
        unchecked: What could not be checked here, or is by somebody whom the auditor did not name.
        certificate: Whether it also binds a certificate, and whether that is the one in the run.
    """

    folder: Path
    lines: int
    steps: int
    stamps: tuple[TimeStamp, ...]
    keys: dict[str, bool]
    claimed: str
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]
    certificate: str

    @property
    def is_trusted(self) -> bool:
        """Whether nothing is wrong with it, and somebody whom the auditor named vouches for it."""
        return not self.problems and (any(stamp.verified for stamp in self.stamps) or any(self.keys.values()))

    @property
    def summary(self) -> str:
        """Who vouches for what, since when, and how far that was checked."""
        what = f"steps 1 to {self.steps}"
        said = [
            f"{what} existed before {stamp.time:%Y-%m-%d %H:%M:%S} UTC, by {quoted(stamp.authority)}"
            for stamp in self.stamps
        ]
        said += [f"{what} signed with the key {key}" for key in self.keys]
        return "; ".join([*said, *self.unchecked, *([self.certificate] if self.certificate else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return who signed what, and when, as a JSON object."""
        return {
            "folder": f"{self.folder.parent.name}/{self.folder.name}",
            "lines": self.lines,
            "steps": self.steps,
            "time_stamps": [
                {"time": stamp.time.isoformat(), "authority": stamp.authority, "verified": stamp.verified}
                for stamp in self.stamps
            ],
            "signatures": [{"key": key, "key_was_named": known} for key, known in self.keys.items()],
            "claimed_time": self.claimed,
            "certificate": self.certificate,
        }


def anchor_run(
    run: str | Path,
    *,
    tsa: Sequence[str] = (),
    keys: Sequence[str | Path] = (),
    tsa_roots: Sequence[str | Path] = (),
    allow_http: bool = False,
) -> Anchor:
    """Have the head of a run's record signed, as `resmol anchor` does, and return the anchor as an audit sees it.

    A run that is being trained can be anchored, and any number of times: each anchor binds what was recorded by then.

    Args:
        run: The run directory.
        tsa: Addresses of RFC 3161 authorities; each is sent one digest.
        keys: Files with Ed25519 private keys.
        tsa_roots: Root certificates by which the answers are verified before they are kept; none keeps them unverified.
        allow_http: Also ask authorities over unencrypted HTTP.

    Raises:
        UsageError: There is neither an authority nor a key, or an address is not private.
        DataError: This is no run, it has no record yet, or a key cannot be read.
        NetworkError: An authority gave no time stamp. Nothing was written.
        CheckFailed: The chain is broken (`LedgerTampered`), or a time stamp does not hold.
    """
    if not tsa and not keys:
        raise UsageError(
            "nothing would vouch for the record", fix="name an authority (--tsa URL), a key (--key FILE), or both"
        )
    directory = RunDir(Path(run))
    directory.require()
    content, roots = read_ledger(directory.ledger), [Path(root) for root in tsa_roots]
    fsync_path(directory.ledger)  # or a power cut could take back lines that the world has a time stamp of
    statement = canonical(_statement(directory, content))
    signed = [sign(statement, Path(key)) for key in keys]
    stamps = [request_time_stamp(url, statement, allow_http=allow_http) for url in tsa]
    for stamp in stamps:
        read_time_stamp(stamp, statement, roots)
    files = {f"{number}.tsr": stamp for number, stamp in enumerate(stamps, start=1)}
    for number, one in enumerate(signed, start=1):
        files |= {f"{number}.sig": one.signature, f"{number}.pub": one.public_key}
    own = [one.public_key for one in signed]
    return _read_anchor(directory, content, _write(directory, statement, files), roots, own)


def _statement(run: RunDir, content: LedgerContent) -> Record:
    if not content.records:
        raise DataError(f"{run.path} has no record yet", fix="anchor it once it has trained")
    return {
        "kind": "resmol anchor",
        "format": FORMAT,
        "head": content.head,
        "lines": len(content.records),
        "steps": max(effective_steps(content.records), default=0),
        "certificate_sha256": file_sha256(run.certificate) if run.certificate.exists() else None,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _write(run: RunDir, statement: bytes, files: dict[str, bytes]) -> Path:
    make_directory(run.anchors)
    lines = parse_json(statement)["lines"]
    folder = run.anchors / f"line-{lines:08d}-{hashlib.sha256(statement).hexdigest()[:8]}"

    def write_files(temporary: Path) -> None:
        for name, content in files.items():
            (temporary / name).write_bytes(content)

    commit_directory(folder, write_files, lambda _: statement)
    return folder


def read_anchors(run: RunDir, content: LedgerContent, trust: Trust) -> list[Anchor]:
    """Return the anchors of a run, each looked at, in the order of their lines.

    Args:
        run: The run directory.
        content: Its ledger, verified.
        trust: Whom the auditor knows.

    Raises:
        DataError: A certificate or key that the auditor named cannot be read.
    """
    for root in trust.tsa_roots:
        read_certificates(root)
    known = [read_public_key(path) for path in trust.public_keys]
    if not run.anchors.is_dir():
        return []
    folders = sorted(path for path in run.anchors.iterdir() if path.is_dir() and path.name.startswith("line-"))
    return [_read_anchor(run, content, folder, trust.tsa_roots, known) for folder in folders]


def check_anchors(anchors: Sequence[Anchor], content: LedgerContent, trust: Trust, *, strict: bool) -> Iterator[Check]:
    """Yield a check for each anchor, and one for what the auditor's trust demands of all of them.

    Args:
        anchors: What `read_anchors` returned.
        content: The ledger.
        trust: Whom the auditor knows.
        strict: What cannot be checked here is a failure.
    """
    expected = "its head is in the chain; what signs it is whole, and by whom the auditor named"
    for anchor in anchors:
        problems = [*anchor.problems, *(anchor.unchecked if strict else ())]
        guards = "a record that was rewritten, and chained anew, after its head was signed"
        yield check_problems(
            f"anchor {anchor.folder.name}", problems, anchor.summary, expected, guards, str(anchor.folder)
        )
    if trust.tsa_roots or trust.public_keys:
        bound = max((anchor.lines for anchor in anchors if anchor.is_trusted), default=0)
        measured = f"lines 1 to {bound} of {len(content.records)}" if bound else "none by whom the auditor named"
        yield Check(
            "anchored", bound > 0, measured, "an anchor that holds, by an authority or key that the auditor named",
            guards="anchors that were removed, to rewrite the record",
        )  # fmt: skip


def _read_anchor(
    run: RunDir, content: LedgerContent, folder: Path, roots: Sequence[Path], known: list[bytes]
) -> Anchor:
    try:
        statement, fields = _read_statement(folder)
    except CheckFailed as error:
        return Anchor(folder, 0, 0, (), {}, "", (error.what,), (), "")
    problems = list(_not_in_chain(fields, content))
    unchecked, foreign, stamps, keys = list[str](), list[str](), list[TimeStamp](), dict[str, bool]()
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".tsr":
                stamps.append(read_time_stamp(_read(path), statement, roots))
            elif path.suffix == ".sig":
                signed = KeySignature(_read(path), _read(path.with_suffix(".pub")))
                keys[signer_of(statement, signed)] = signed.public_key in known
        except UnknownAuthority as error:
            foreign.append(f"{path.name}: {error.what}")
        except CheckFailed as error:
            problems.append(f"{path.name}: {error.what}")
        except DataError as error:  # the library is not installed
            unchecked.append(f"{path.name} not read: {error.what}; {error.fix}")
    (unchecked if stamps else problems).extend(foreign)
    if known and keys and not any(keys.values()):
        problems += [f"the key {key} was not named (--public-key)" for key in keys]
    elif not all(keys.values()):
        unchecked.append("who holds the key was not checked (--public-key)")
    if not roots and stamps:
        unchecked.append("signature of the time stamp not checked: name the authority's root certificate (--tsa-root)")
    if not (stamps or keys or unchecked or problems):
        problems.append("nothing signs it")
    return Anchor(
        folder, fields["lines"], fields["steps"], tuple(stamps), keys, fields["time"], tuple(problems),
        tuple(unchecked), _certificate_of(run, fields),
    )  # fmt: skip


def _read_statement(folder: Path) -> tuple[bytes, dict[str, Any]]:
    statement = _read(folder / STATEMENT)
    try:
        fields = parse_json(statement)
    except (ValueError, RecursionError):
        fields = None
    if not (isinstance(fields, dict) and all(isinstance(fields.get(name), kind) for name, kind in _FIELDS.items())):
        raise CheckFailed("its statement is no statement of an anchor", fix="remove what is not an anchor")
    return statement, fields


def _read(path: Path) -> bytes:
    """Return a small file (`CheckFailed`)."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckFailed(f"{path.name} cannot be read ({error.strerror})", fix="restore it from a copy") from error
    if len(content) > MAX_FILE_BYTES:
        raise CheckFailed(f"{path.name} is longer than {MAX_FILE_BYTES:,} bytes", fix="restore it from a copy")
    return content


def _not_in_chain(fields: dict[str, Any], content: LedgerContent) -> Iterator[str]:
    """Yield why a statement's head is not that of its line; the next line holds the hash of a line."""
    lines, records = fields["lines"], content.records
    heads = [*(record["prev"] for record in records), content.head] if records else [GENESIS]
    if not 1 <= lines < len(heads):
        yield f"it is about {counted(lines, 'line')}, the ledger has {len(records)}: lines were cut off since"
    elif heads[lines] != fields["head"]:
        yield f"the chain has another head after line {lines}: it was rewritten since"
    elif fields["steps"] != max(effective_steps(records[:lines]), default=0):
        yield f"it states {counted(fields['steps'], 'step')}, which the record does not have up to line {lines}"


def _certificate_of(run: RunDir, fields: dict[str, Any]) -> str:
    if fields["certificate_sha256"] is None:
        return ""
    try:
        same = file_sha256(run.certificate) == fields["certificate_sha256"]
    except OSError:
        same = False
    return "with the certificate in this run" if same else "with a certificate that is not the one in this run"
