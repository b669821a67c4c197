"""The claims of `resmol reproduce`, as a run keeps them beside their evidence."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from resmol.run.directory import RunDir


def read_claims(run: RunDir) -> list[dict[str, Any]]:
    """Return the claims of `reproduce`, if it ran here, with evidence named relative to the run.

    A claim has a name, a verdict and what was measured; anything else in the file is left out.
    """
    try:
        found = json.loads(run.claims_file.read_bytes())["checks"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    checks = [check for check in found if isinstance(check, dict)] if isinstance(found, list) else []
    checks = [check for check in checks if {"name", "passed", "measured"} <= check.keys()]
    return [
        {"expected": "", **check, "evidence": _relative_to_run(run, str(check.get("evidence", "")))} for check in checks
    ]


def _relative_to_run(run: RunDir, evidence: str) -> str:
    """Return a path relative to the run, or only the file's name: no folder of the machine it was made on.

    The paths were relative to wherever the claims were made, or absolute, and the run may have another name since.
    So a path begins at the last part that names something in a run, else after the run's own name.
    """
    own = (run.config, run.ledger, run.log, run.checkpoints, run.tokenizer, run.data, run.evidence)
    names = {path.name for path in (*own, run.certificate, run.report)}
    parts = PurePosixPath(evidence).parts
    starts = [start for start, part in enumerate(parts) if part in names]
    starts = starts or [start for start in range(1, len(parts)) if parts[start - 1] == run.path.resolve().name]
    return "/".join(parts[starts[-1] :] if starts else parts[-1:])
