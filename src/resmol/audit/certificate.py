"""`resmol audit --certify`: a run's record, its checks, its restarts and crashes, and the limits of the proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from resmol.audit.anchor import Trust, read_anchors
from resmol.checks import Check, all_passed
from resmol.errors import CheckFailed
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, last_fact, read_ledger, select
from resmol.system.atomic_io import write_durable
from resmol.version import __version__

COMPLETE = "complete replay"  # the check that says that everything was made again
REPLAYED = {
    "complete": "Everything was made again: text, tokens, initial weights, every step and every checkpoint.",
    "in part": "Replayed segments prove the recorded bits on this kind of machine; the chain binds the others to them.",
    "nothing": "No step was executed again: the numbers are those that the record states.",
}
LIMITS = (
    "The chain proves that the record was not changed after its head was known; keep the head somewhere else.",
    "It does not prove that the data is what its name says, nor that nobody trained twice and kept the better run.",
    "Bits are the same on the same kind of processor, with the same versions and threads; elsewhere they may differ.",
)
LIMITS_OF_ANCHORS = (
    "A time stamp proves that the record up to its line existed before its time, by the authority's clock and word; "
    "not when training took place, nor by whom.",
    "A signature proves that the holder of the key vouches for the record; its time is the holder's own word.",
)


def write_certificate(run: RunDir, checks: Sequence[Check], trust: Trust | None = None) -> str:
    """Write ``certificate.json`` into a run and return its path.

    Args:
        run: The run directory.
        checks: The checks of an audit of it.
        trust: Whom that audit knew; who is not named there is listed as not verified.

    Raises:
        CheckFailed: A check failed.
    """
    if not all_passed(checks):
        raise CheckFailed("the audit failed: there is nothing to certify", fix="see the table of `resmol audit`")
    content = json.dumps(certificate(run, checks, trust), indent=1, ensure_ascii=False) + "\n"
    write_durable(run.certificate, content.encode())
    return str(run.certificate)


def certificate(run: RunDir, checks: Sequence[Check], trust: Trust | None = None) -> dict[str, Any]:
    """Return the content of a certificate as a JSON object."""
    content = read_ledger(run.ledger)
    records, steps = content.records, effective_steps(content.records)
    start = next(select(records, "start"))
    executed = sum(1 for _ in select(records, "step"))
    anchors = read_anchors(run, content, trust or Trust())
    extent = _replayed(checks)
    environments = [record["environment"] for record in records if "environment" in record]
    return {
        "format": 1,
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "resmol": __version__,
        "run": run.path.resolve().name,
        "ledger": {"head": content.head, "lines": len(records)},
        "config_sha256": start["config_sha256"],
        "data_fingerprint": last_fact(records, "data_fingerprint"),
        "steps": max(steps, default=0),
        "tokens": max((record["tokens_seen"] for record in steps.values()), default=0),
        "survived": {
            "restarts": sum(1 for _ in select(records, "resume")),
            "crashes": sum(1 for _ in select(records, "rewind")),
            "steps_executed_again": executed - len(steps),
            "signals": [record["reason"] for record in select(records, "stop") if record["reason"] != "finished"],
            "warnings": [record["what"] for record in select(records, "warn")],
        },
        "machines": [facts for number, facts in enumerate(environments) if facts not in environments[:number]],
        "checks": [{"name": check.name, "measured": check.measured} for check in checks],
        "anchors": [anchor.to_dict() for anchor in anchors],
        "limits": [*LIMITS[:2], REPLAYED[extent], *LIMITS[2:], *(LIMITS_OF_ANCHORS if anchors else ())],
        "replay": extent,
    }


def _replayed(checks: Sequence[Check]) -> str:
    """Return how much was executed again, one of `REPLAYED`."""
    passed = [check.name for check in checks if check.measured.startswith("PASS")]
    if COMPLETE in passed:
        return "complete"
    return "in part" if any(name.startswith("replay of ") for name in passed) else "nothing"


def current_certificate(run: RunDir) -> dict[str, Any] | None:
    """Return the certificate of a run if it is about the current head of the ledger, else None."""
    try:
        found: dict[str, Any] = json.loads(run.certificate.read_text(encoding="utf-8"))
        return found if found["ledger"]["head"] == read_ledger(run.ledger).head else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
