"""The claims of a run, as its report, its export and its page show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resmol.audit.claims import read_claims
from resmol.run.directory import RunDir


@pytest.mark.parametrize(
    ("evidence", "shown"),
    [
        ("/home/someone/runs/old-name/evidence/audit.json", "evidence/audit.json"),
        ("/home/someone/data/old-name/ledger.jsonl", "ledger.jsonl"),
        ("runs/old-name/checkpoints/step-00000010/manifest.json", "checkpoints/step-00000010/manifest.json"),
        ("/home/someone/runs/mine/notes/a.json", "notes/a.json"),
        ("/home/someone/elsewhere/a.json", "a.json"),
        ("../../elsewhere/a.json", "a.json"),
        ("evidence/audit.json", "evidence/audit.json"),
        ("", ""),
    ],
)
def test_evidence_is_named_without_a_folder_of_this_machine(evidence: str, shown: str, tmp_path: Path) -> None:
    """Also after the run was given another name, here ``mine``."""
    run = RunDir(tmp_path / "mine")
    run.evidence.mkdir(parents=True)
    claim = {"name": "n", "passed": True, "measured": "m", "expected": "e", "evidence": evidence}
    run.claims_file.write_text(json.dumps({"checks": [claim]}))
    assert read_claims(run) == [{**claim, "evidence": shown}]


@pytest.mark.parametrize("checks", [[{}], [1], {}, "x", None, [{"name": "n"}]])
def test_what_is_no_claim_is_left_out(checks: object, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.evidence.mkdir()
    run.claims_file.write_text(json.dumps({"checks": checks}))
    assert read_claims(run) == []
