"""An audit passes on an honest run and finds every way of tampering with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny, rewrite

from resmol.audit.audit import audit
from resmol.checks import Check, all_passed
from resmol.errors import CheckFailed, DataError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished: Path, train_tiny: TrainTiny, tmp_path: Path) -> RunDir:
    """A copy of a run with one resume."""
    if not finished.exists():
        for steps in (20, 25):
            train_tiny(finished, steps, "checkpoint.permanent=[20]")
    shutil.copytree(finished, tmp_path / "run")
    return RunDir(tmp_path / "run")


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_an_honest_run_passes(run: RunDir) -> None:
    checks = audit(run)
    assert all_passed(checks), failed(checks)
    assert {"hash chain", "continuity", "resumption", "data order", "learning rate"} <= {check.name for check in checks}
    assert "recomputed for every step" in next(c.measured for c in checks if c.name == "data order")


def test_every_edited_byte_breaks_the_chain(run: RunDir) -> None:
    content = run.ledger.read_bytes()
    for position in range(0, content[:-1].rindex(b"\n"), 397):  # of the last line, only a head that was kept tells
        changed = bytearray(content)
        changed[position] ^= 1
        run.ledger.write_bytes(changed)
        assert failed(audit(run)), f"byte {position}"


def _is(kind: str, step: int) -> Callable[[Record], bool]:
    return lambda record: record["kind"] == kind and record["step"] == step


FORGERIES: dict[str, tuple[Callable[[list[Record]], list[Record]], str]] = {
    "a step dropped": (lambda rs: [r for r in rs if not _is("step", 7)(r)], "continuity"),
    "a step doubled": (
        lambda rs: [x for r in rs for x in ([r, r] if _is("step", 7)(r) else [r])],
        "continuity",
    ),
    "two steps swapped": (
        lambda rs: [
            next(filter(_is("step", {7: 8, 8: 7}[r["step"]]), rs)) if _is("step", 7)(r) or _is("step", 8)(r) else r
            for r in rs
        ],
        "continuity",
    ),
    "tokens inflated": (
        lambda rs: [{**r, "tokens_seen": r["tokens_seen"] * 2} if r["kind"] == "step" else r for r in rs],
        "tokens",
    ),
    "another learning rate": (
        lambda rs: [{**r, "lr": 0.5} if _is("step", 9)(r) else r for r in rs],
        "learning rate",
    ),
    "other windows": (
        lambda rs: [{**r, "windows": "0" * 16} if _is("step", 9)(r) else r for r in rs],
        "data order",
    ),
    "a resume that skips": (
        lambda rs: [{**r, "next_step": 23} if r["kind"] == "resume" else r for r in rs],
        "resumption",
    ),
    "a second start": (lambda rs: [*rs, {**rs[0]}], "beginning"),
    "another data set": (
        lambda rs: [{**r, "data_fingerprint": "0" * 64} if r["kind"] == "start" else r for r in rs],
        "data order",
    ),
    "a step executed twice, with other bits": (
        lambda rs: [
            x
            for r in rs
            for x in (
                [r, {"kind": "rewind", "from_step": 9, "to_step": 8}, {**r, "loss_bits": "3f800000"}]
                if _is("step", 9)(r)
                else [r]
            )
        ],
        "executions",
    ),
    "another checkpoint": (
        lambda rs: [{**r, "manifest_sha256": "0" * 64} if _is("save", 25)(r) else r for r in rs],
        "checkpoint step-00000025",
    ),
}


@pytest.mark.parametrize(("kind", "field"), [("step", "loss"), ("step", "windows"), ("save", "permanent"),
                                             ("resume", "next_step")])  # fmt: skip
def test_a_chain_without_a_field_is_a_failed_check_and_no_crash(run: RunDir, kind: str, field: str) -> None:
    rewrite(run, lambda records: [{k: v for k, v in r.items() if (r["kind"], k) != (kind, field)} for r in records])
    assert failed(audit(run)) == {"record fields"}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_and_rechained_ledger(run: RunDir, name: str) -> None:
    change, expected = FORGERIES[name]
    rewrite(run, change)
    assert expected in failed(audit(run))


def test_a_damaged_checkpoint_is_named(run: RunDir) -> None:
    victim = run.checkpoints / "step-00000015" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[1000] ^= 1
    victim.write_bytes(content)
    checks = audit(run)
    assert failed(checks) == {"checkpoint step-00000015"}
    assert "model.safetensors" in next(c.measured for c in checks if not c.passed)


def test_a_lost_permanent_checkpoint(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints / "step-00000020")
    assert failed(audit(run)) == {"checkpoints kept"}


def test_an_edited_configuration(run: RunDir) -> None:
    run.config.write_text(run.config.read_text().replace("lr = 0.01", "lr = 0.02"))
    (check,) = [check for check in audit(run) if not check.passed]
    assert (check.name, check.measured) == ("configuration", "config.toml: optimizer.lr is 0.02, not 0.01")


def test_a_change_without_a_drift_record(run: RunDir) -> None:
    """The digest that a resume states is that of another configuration, and nothing says which field changed."""
    rewrite(run, lambda rs: [{**r, "config_sha256": "0" * 64} if r["kind"] == "resume" else r for r in rs])
    (check,) = [check for check in audit(run) if not check.passed]
    assert (check.name, "another configuration, and no drift" in check.measured) == ("configuration", True)


@pytest.mark.parametrize("forged", [{"config": 1}, {"config": {"optimizer.lr": -1}}, {"config": {"no.such": 1}}])
def test_a_made_up_configuration_in_the_ledger(run: RunDir, forged: dict[str, Any]) -> None:
    rewrite(run, lambda rs: [{**rs[0], **forged}, *rs[1:]])
    assert failed(audit(run)) == {"configuration"}


def test_a_torn_tail_is_reported_and_not_repaired(run: RunDir) -> None:
    torn = run.ledger.read_bytes() + b'{"seq":'
    run.ledger.write_bytes(torn)
    checks = audit(run)
    assert all_passed(checks)
    assert "torn end of 7 bytes" in checks[0].measured
    assert run.ledger.read_bytes() == torn


def test_without_the_data_the_order_is_said_to_be_unchecked(run: RunDir) -> None:
    text = run.config.read_text()
    path = next(line for line in text.splitlines() if line.startswith("path = "))
    run.config.write_text(text.replace(path, f"path = {json.dumps(str(run.path / 'nowhere'))}"))
    assert "not recomputed" in next(c.measured for c in audit(run) if c.name == "data order")


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        audit(RunDir(tmp_path))


def test_lines_behind_zeros_fail_the_audit(run: RunDir) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:5]) + b"\0" * len(lines[5]) + b"".join(lines[6:]))
    assert not audit(run)[0].passed


def test_a_checkpoint_behind_zeros_is_not_gone_on_from(run: RunDir, train_tiny: TrainTiny) -> None:
    """A zero byte in the middle takes the later lines away; what was saved after them is then ahead of its record."""
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:5]) + b"\0" * len(lines[5]) + b"".join(lines[6:]))
    with pytest.raises(CheckFailed, match="older copy"):
        train_tiny(run.path, 40)
