"""Anchors: OpenSSL's authority stamps, OpenSSL and the audit verify, and every forgery is found and said."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from time_stamping import Authority, make_authority, openssl, served
from tiny import TrainTiny, rewrite, step_record

from resmol.__main__ import run as command
from resmol.audit.anchor import Trust, anchor_run, read_anchors
from resmol.audit.audit import audit
from resmol.audit.certificate import write_certificate
from resmol.audit.time_stamp import MAX_ANSWER_BYTES
from resmol.checks import Check, all_passed
from resmol.errors import DataError, NetworkError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, read_ledger


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tsa") / "ours", "Test Authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tsa") / "other", "Other Authority")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        openssl("genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.pem")
        openssl("pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub")
    return folder / "key.pem"


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anchored") / "run"


@pytest.fixture
def run(anchored: Path, authority: Authority, key: Path, train_tiny: TrainTiny, tmp_path: Path) -> RunDir:
    """A copy of a run that was stamped after 6 steps, went on, and was signed after 9."""
    if not anchored.exists():
        train_tiny(anchored, 6)
        with served(lambda query: (200, {}, authority.answer(query))) as url:
            anchor_run(anchored, tsa=[url], tsa_roots=[authority.root])
        train_tiny(anchored, 9)
        anchor_run(anchored, keys=[key])
    shutil.copytree(anchored, tmp_path / "run")
    return RunDir(tmp_path / "run")


def anchors_of(run: RunDir) -> tuple[Path, Path]:
    """The folders of the stamped and of the signed anchor."""
    first, second = sorted(run.anchors.iterdir())
    return first, second


def failures(run: RunDir, *roots: Path, keys: tuple[Path, ...] = (), strict: bool = False) -> dict[str, str]:
    checks = audit(run, trust=Trust(tuple(roots), keys), strict=strict)
    return {check.name.split()[0]: check.measured for check in checks if not check.passed}


def test_each_anchor_binds_a_prefix_of_the_run(run: RunDir, authority: Authority, key: Path) -> None:
    checks = audit(run, strict=True, trust=Trust((authority.root,), (key.with_suffix(".pub"),)))
    assert all_passed(checks), [check for check in checks if not check.passed]
    stamped, signed, summary = checks[-3:]
    assert "steps 1 to 6 existed before 20" in stamped.measured
    assert "UTC, by 'CN=Test Authority'" in stamped.measured
    assert "steps 1 to 9 signed with the key SHA256:" in signed.measured
    lines = len(read_ledger(run.ledger).records)
    assert summary.measured == f"lines 1 to {lines} of {lines}"


def test_openssl_agrees(run: RunDir, authority: Authority, stranger: Authority) -> None:
    stamped, signed = anchors_of(run)
    verify = ["ts", "-verify", "-data", stamped / "manifest.json", "-in", stamped / "1.tsr", "-CAfile"]
    assert openssl(*verify, authority.root).returncode == 0
    assert openssl(*verify, stranger.root).returncode != 0
    statement, signature, public = (signed / name for name in ("manifest.json", "1.sig", "1.pub"))
    done = openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", statement, "-sigfile", signature)
    assert done.returncode == 0, done.stderr


def test_an_auditor_who_knows_nobody_is_told_so_and_a_strict_one_fails(run: RunDir) -> None:
    checks = {check.name.split()[0]: check for check in audit(run)}
    assert all_passed(list(checks.values()))
    assert failures(run, strict=True).keys() == {"anchor"}
    stamped, _ = (check for check in audit(run) if check.name.startswith("anchor"))
    assert "signature of the time stamp not checked" in stamped.measured


def test_without_the_libraries_anchors_are_said_to_be_unread(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rfc3161_client", "cryptography.hazmat.primitives.serialization", "cryptography.hazmat.primitives"):
        monkeypatch.setitem(sys.modules, name, None)
    assert failures(run) == {}
    assert (
        "1.sig not read: signatures need cryptography, which is not installed" in failures(run, strict=True)["anchor"]
    )


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def another_time(run: RunDir, year: bytes | None) -> None:
    """Change the time that the authority signed, to another year or by a second."""
    stamp = anchors_of(run)[0] / "1.tsr"
    content = stamp.read_bytes()
    at = content.index(b"\x18\x0f20") + 2  # the type and length of a GeneralizedTime, then its year
    if year is None:  # a later one: an earlier one may lie before the authority's certificate
        digits = ((12, ord("5")), (11, ord("9")), (10, ord("5")), (9, ord("9")))
        place = at + next(number for number, largest in digits if content[at + number] < largest)
        stamp.write_bytes(content[:place] + bytes([content[place] + 1]) + content[place + 1 :])
    else:
        stamp.write_bytes(content[:at] + year + content[at + 4 :])


def another_statement(run: RunDir) -> None:
    path = anchors_of(run)[0] / "manifest.json"
    path.write_text(path.read_text().replace('"time":"20', '"time":"19'))


def rechained(run: RunDir) -> None:
    rewrite(run, lambda rs: [{**r, "seconds": 0.5} if r["kind"] == "step" else r for r in rs])


def cut(run: RunDir) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:8]))


FORGERIES: dict[str, tuple[Callable[[RunDir], None], str]] = {
    "the record chained anew": (rechained, "it was rewritten since"),
    "lines cut off": (cut, "lines were cut off since"),
    "another second": (lambda run: another_time(run, None), "it was altered: its signature does not fit"),
    "another year": (lambda run: another_time(run, b"2019"), "does not hold at its time (certificate is not yet"),
    "another signature of the time": (
        lambda run: flip(anchors_of(run)[0] / "1.tsr", -20), "it was altered: its signature does not fit",
    ),
    "another statement": (another_statement, "it is about other bytes than this statement"),
    "half a time stamp": (
        lambda run: (anchors_of(run)[0] / "1.tsr").write_bytes(b"0\x82"), "it is not a whole RFC 3161 response",
    ),
    "another signature": (lambda run: flip(anchors_of(run)[1] / "1.sig", 3), "it does not fit the statement"),
    "no public key": (lambda run: (anchors_of(run)[1] / "1.pub").unlink(), "1.pub cannot be read"),
    "nothing that signs": (lambda run: (anchors_of(run)[1] / "1.sig").unlink(), "nothing signs it"),
    "a made-up statement": (
        lambda run: (anchors_of(run)[1] / "manifest.json").write_text("{}"), "no statement of an anchor",
    ),
    "a statement too long": (
        lambda run: (anchors_of(run)[1] / "manifest.json").write_text(" " * 300_000), "longer than 262,144 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_anchor_or_a_forged_record_is_found(run: RunDir, authority: Authority, key: Path, name: str) -> None:
    change, expected = FORGERIES[name]
    change(run)
    checks = audit(run, trust=Trust((authority.root,), (key.with_suffix(".pub"),)))
    assert expected in " ".join(check.measured for check in checks if check.name.startswith("anchor "))
    assert any(check.name.startswith("anchor ") and not check.passed for check in checks)


def test_foreign_authorities_and_keys_are_named(
    run: RunDir, authority: Authority, stranger: Authority, key: Path
) -> None:
    found = failures(run, stranger.root, keys=(key.with_suffix(".pub"),))
    assert found == {"anchor": "1.tsr: 'CN=Test Authority' is not under the root certificate that was named"}
    found = failures(run, authority.root, keys=(key.with_name("other.pub"),))
    assert found.keys() == {"anchor"}
    assert found["anchor"].endswith("was not named (--public-key)")


def test_anchors_that_were_removed_are_missed_by_who_knows_of_them(run: RunDir, authority: Authority) -> None:
    shutil.rmtree(run.anchors)
    assert failures(run) == {}
    assert failures(run, authority.root) == {"anchored": "none by whom the auditor named"}


def test_a_certificate_names_who_signed_and_an_anchor_binds_it(run: RunDir, authority: Authority, key: Path) -> None:
    trust = Trust((authority.root,))
    write_certificate(run, [Check("x", True, "", "")], trust)
    content = json.loads(run.certificate.read_text())
    stamped, signed = content["anchors"]
    assert stamped["time_stamps"][0]["authority"] == "CN=Test Authority"
    assert stamped["time_stamps"][0]["verified"] is True
    assert signed["signatures"][0]["key_was_named"] is False
    assert any("not when training took place" in limit for limit in content["limits"])
    made = anchor_run(run.path, keys=[key])
    assert made.certificate == "with the certificate in this run"
    write_certificate(run, [Check("y", True, "", "")], trust)
    (last,) = (one for one in read_anchors(run, read_ledger(run.ledger), trust) if one.folder == made.folder)
    assert last.certificate == "with a certificate that is not the one in this run"


def refusing(status: int, headers: dict[str, str], body: bytes) -> Callable[[bytes], Any]:
    return lambda query: (status, headers, body)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusing(500, {}, b""), "HTTP 500"),
        (refusing(302, {"Location": "http://127.0.0.1:1/"}, b""), "HTTP 302"),
        (refusing(200, {}, b"x" * (MAX_ANSWER_BYTES + 2)), "longer than 262,144 bytes"),
        (refusing(200, {}, b"<html>"), "not a whole RFC 3161 response"),
        (refusing(200, {"Content-Length": "100"}, b"short"), "not a whole RFC 3161 response"),
        (refusing(200, {}, bytes.fromhex("30053003020102")), "the authority refused it (status 2)"),
    ],
)
def test_an_authority_that_gives_no_stamp(run: RunDir, answer: Callable[[bytes], Any], expected: str) -> None:
    before = sorted(run.anchors.iterdir())
    with served(answer) as url, pytest.raises(NetworkError) as caught:
        anchor_run(run.path, tsa=[url])
    assert expected in caught.value.what
    assert sorted(run.anchors.iterdir()) == before


def test_an_answer_to_another_request_is_none(run: RunDir, authority: Authority) -> None:
    """About other bytes; or about these, with another nonce: its last byte stands before the BOOLEAN at the end."""
    old = (anchors_of(run)[0] / "1.tsr").read_bytes()
    for answer in (lambda _: old, lambda query: authority.answer(query[:-4] + bytes([query[-4] ^ 1]) + query[-3:])):
        reply = lambda query, give=answer: (200, {}, give(query))  # noqa: E731
        with served(reply) as url, pytest.raises(NetworkError, match="about another request"):
            anchor_run(run.path, tsa=[url])


@pytest.mark.parametrize("url", ["http://tsa.example/tsr", "file:///etc/passwd", "https://", "ftp://localhost/", "tsa"])
def test_addresses_that_are_not_asked(run: RunDir, url: str) -> None:
    with pytest.raises(UsageError, match="is not an https:// address"):
        anchor_run(run.path, tsa=[url])


def test_a_key_in_openssh_form_and_files_that_are_none(run: RunDir, tmp_path: Path, capsys: Any, caplog: Any) -> None:

    private = Ed25519PrivateKey.generate()
    for name, secret in (("plain", NoEncryption()), ("locked", BestAvailableEncryption(b"word"))):
        form = PrivateFormat.OpenSSH if name == "plain" else PrivateFormat.PKCS8
        (tmp_path / name).write_bytes(private.private_bytes(Encoding.PEM, form, secret))
    (tmp_path / "none").write_text("not a key")
    assert anchor_run(run.path, keys=[tmp_path / "plain"]).keys
    with pytest.raises(DataError, match="it has a passphrase"):
        anchor_run(run.path, keys=[tmp_path / "locked"])
    with pytest.raises(DataError, match="cannot be used as an Ed25519 key"):
        anchor_run(run.path, keys=[tmp_path / "none"])
    assert "not a key" not in capsys.readouterr().err + caplog.text


def test_the_command_says_what_comes_next(run: RunDir, authority: Authority, key: Path, capsys: Any) -> None:
    assert command(["anchor", str(run.path)], debug=False) == 2
    assert command(["anchor", str(run.path), "--key", str(key)], debug=False) == 0
    said = capsys.readouterr().out
    assert "signed with the key SHA256:" in said
    assert "not checked" not in said
    assert command(["audit", str(run.path), "--tsa-root", str(authority.root), "--json"], debug=False) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_nothing_is_anchored_before_there_is_a_record(tmp_path: Path, run: RunDir, key: Path) -> None:
    run.ledger.unlink()
    with pytest.raises(DataError, match="there is no ledger"):
        anchor_run(run.path, keys=[key])
    run.ledger.write_bytes(b"")
    with pytest.raises(DataError, match="no record yet"):
        anchor_run(run.path, keys=[key])
    ledger = Ledger(run.ledger)
    ledger.append("step", **step_record(1))
    ledger.close()
    assert anchor_run(run.path, keys=[key]).lines == 1
