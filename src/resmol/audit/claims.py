"""The claims of `resmol reproduce`: derived from a run and the evidence of its parts, written, and read back."""

from __future__ import annotations

import json
import math
from pathlib import PurePosixPath
from typing import Any

from resmol.checks import Check, all_passed
from resmol.config.run_config import RunConfig
from resmol.model.flops import total_parameters
from resmol.run.checkpoint_manifest import checkpoint_name
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.system.atomic_io import write_durable
from resmol.system.wording import counted
from resmol.train.lr_schedule import lr_at


def make_claims(run: RunDir, config: RunConfig, saved_step: int, last_step: int) -> list[Check]:
    """Return the claims that the evidence supports or refutes; each names the file to look into.

    Args:
        run: The run directory.
        config: The configuration that the first process was given.
        saved_step: The last step of the first process.
        last_step: The last step of the second process.
    """
    records = read_ledger(run.ledger).records
    steps = effective_steps(records)
    return [
        _all_checks_passed(
            run, "verify", "architecture and parity with transformers", "the reverse-engineered model is wrong"
        ),
        _parameters(run, config, records),
        _from_scratch(run, config, steps),
        _saved_exactly(run, saved_step, records),
        _resumed(run, saved_step + 1, records),
        _continuous(run, last_step, steps),
        _logged(run, saved_step, last_step),
        _learned(run, steps),
        _all_checks_passed(run, "audit", "the record holds together", "a record that was edited or does not add up"),
        _generated(run),
        *_published(run),
    ]


def write_claims(run: RunDir, claims: list[Check]) -> None:
    """Write the claims to ``evidence/claims.json``."""
    content = {"passed": all_passed(claims), "checks": [claim.to_dict() for claim in claims]}
    write_durable(run.claims_file, json.dumps(content, indent=1).encode())


def read_claims(run: RunDir) -> list[dict[str, Any]]:
    """Return the claims that were written, with evidence named relative to the run; [] if there are none.

    A claim has a name, a verdict and a measurement; anything else in the file is ignored.
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


def _evidence(run: RunDir, name: str) -> tuple[dict[str, Any], str]:
    path = run.evidence / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}, str(path)


def _all_checks_passed(run: RunDir, name: str, title: str, guards: str) -> Check:
    content, path = _evidence(run, name)
    found = content.get("checks", [])
    passed = sum(1 for check in found if check["passed"])
    measured = f"{passed} of {len(found)} checks passed"
    return Check(title, bool(found) and passed == len(found), measured, "all of them", guards, path)


def _parameters(run: RunDir, config: RunConfig, records: list[Record]) -> Check:
    counted, recorded = total_parameters(config.model), next(select(records, "start"))["parameters"]
    measured, expected = f"{recorded:,} trained", f"{counted:,} by the closed form"
    return Check("parameters", recorded == counted, measured, expected, "an untied output layer", str(run.ledger))


def _from_scratch(run: RunDir, config: RunConfig, steps: dict[int, Record]) -> Check:
    uniform, first = math.log(config.model.vocab_size), steps[1]["loss"]
    expected = f"near ln {config.model.vocab_size} = {uniform:.2f}; a trained model would be far below"
    measured = f"loss {first:.3f} at step 1"
    return Check("from scratch", abs(first - uniform) < 1.5, measured, expected, "pretrained weights", str(run.ledger))


def _saved_exactly(run: RunDir, step: int, records: list[Record]) -> Check:
    name = checkpoint_name(step)
    path = run.checkpoints / name / "manifest.json"
    # After a crash between the checkpoint and its record, only the resume from it records the checkpoint.
    saved = [record for record in records if record["kind"] in ("save", "resume") and record["checkpoint"] == name]
    measured = f"manifest {saved[-1]['manifest_sha256'][:16]}" if saved else "not in the ledger"
    title = f"checkpoint at exactly step {step}"
    return Check(title, bool(saved) and path.is_file(), measured, "saved, recorded and still there", evidence=str(path))


def _resumed(run: RunDir, next_step: int, records: list[Record]) -> Check:
    resumes = [record for record in select(records, "resume") if record["next_step"] == next_step]
    follows = [r["step"] for r in records if resumes and r["kind"] == "step" and r["seq"] > resumes[-1]["seq"]][:1]
    measured = f"resumed from {resumes[-1]['checkpoint']}, next step {follows[0]}" if follows else "no such resume"
    title, expected = f"a new process resumed at step {next_step}", f"step {next_step} follows"
    guards = "training that starts over"
    return Check(title, follows == [next_step], measured, expected, guards, str(run.ledger))


def _continuous(run: RunDir, last: int, steps: dict[int, Record]) -> Check:
    config = run.load_config()
    whole = sorted(steps) == list(range(1, last + 1))
    jumps = [s for s, r in steps.items() if r["lr"] != lr_at(s, config.schedule, config.optimizer.lr)]
    measured = f"steps 1 to {max(steps)}, learning rate at {last}: {steps[max(steps)]['lr']:.3g}"
    guards = "a horizon that moves with the last step"
    expected = f"every step to {last} once, each at the schedule's learning rate"
    return Check("one continuous run", whole and not jumps, measured, expected, guards, str(run.ledger))


def _logged(run: RunDir, saved_step: int, last_step: int) -> Check:
    text = run.log.read_text(encoding="utf-8") if run.log.exists() else ""
    expected_steps = [1, *range(500, saved_step + 1, 500), saved_step, saved_step + 1, last_step]
    logged = {int(line.split()[1].partition("/")[0]) for line in text.splitlines() if line.startswith("step ")}
    missing = sorted(set(expected_steps) - logged)
    measured = f"missing: {missing}" if missing else f"lines for {counted(len(logged), 'step')}"
    expected = f"steps 1, every 500, {saved_step}, {saved_step + 1} and {last_step}"
    return Check("the log is kept", not missing, measured, expected, evidence=str(run.log))


def _learned(run: RunDir, steps: dict[int, Record]) -> Check:
    content, path = _evidence(run, "evaluate")
    first, now = steps[1]["loss"], content.get("loss", math.nan)
    measured = f"{now:.3f} nats, {content.get('bits_per_byte', math.nan):.3f} bits per byte (step 1: {first:.3f} nats)"
    expected = "well below the first loss"
    return Check("it learned: held-out text", now < first - 1.0, measured, expected, "a loss of 0 or of ln V", path)


def _generated(run: RunDir) -> Check:
    content, path = _evidence(run, "generate")
    text = " ".join(str(content.get("text", "")).split())
    shown = text[:60] + ("..." if len(text) > 60 else "")
    return Check("generates text", bool(text), shown or "nothing", "some text", "a demo of other weights", path)


def _published(run: RunDir) -> list[Check]:
    """Return what came of a published run that was made again beside this one, if one was."""
    content, path = _evidence(run, "published")
    checks = content.get("checks", [])[-1:]
    title, expected = "the bits that others published", "every step as in the record, which anybody can make again"
    return [Check(title, check["passed"], check["measured"], expected, "bits of one machine", path) for check in checks]
