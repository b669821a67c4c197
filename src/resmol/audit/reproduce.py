"""The whole job as one visible sequence, each part in a process of its own, each claim with its evidence.

    verify -> prepare -> train to N -> (a new process) train to N + M -> evaluate -> audit -> generate -> report

Every part can be repeated: what is done is found done, and training resumes, so an interrupted spec goes on
where it was when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resmol.audit.report import write_report
from resmol.checks import Check
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.loader import Batch
from resmol.data.resolve import is_prepared
from resmol.errors import CheckFailed, Interrupted
from resmol.model.flops import total_parameters
from resmol.run.checkpoint_manifest import checkpoint_name, list_checkpoints, step_of
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.system.atomic_io import write_durable
from resmol.system.host import release_freed_memory
from resmol.system.signals import StopSignal
from resmol.train.autotune import check_memory, resolve_auto
from resmol.train.build import new_state
from resmol.train.loop import train_step
from resmol.train.lr_schedule import lr_at
from resmol.train.parallel import open_runtime

logger = logging.getLogger(__name__)

ESTIMATE_STEPS = 4
POLL_SECONDS = 0.5
EVALUATION_TOKENS = 16_384  # a minute or less for the real model on two cores


@dataclass(frozen=True)
class ReproduceSpec:
    """What to reproduce.

    Attributes:
        run: The run directory.
        preset: The name of the preset.
        inputs: The user's own text; empty takes ``corpus``.
        corpus: The corpus to train on where there is no input.
        steps: Steps of the first process; a checkpoint is saved exactly there and kept for good.
        then: Further steps, of a second process.
        overrides: ``section.key=value``.
    """

    run: RunDir
    preset: str
    inputs: tuple[str, ...]
    corpus: str
    steps: int
    then: int
    overrides: tuple[str, ...]

    @classmethod
    def choose(
        cls,
        run: Path | None,
        preset: str | None,
        inputs: tuple[str, ...],
        corpus: str | None,
        steps: int,
        then: int,
        overrides: tuple[str, ...],
    ) -> ReproduceSpec:
        """Fill in what the user left open; the preset depends on whether there is a GPU."""
        chosen = preset or ("smollm2-135m" if torch.cuda.is_available() else "smollm2-135m-cpu")
        directory = run or Path("runs") / chosen
        bound = (f"checkpoint.permanent=[{steps}]", *overrides)
        return cls(RunDir(directory), chosen, inputs, corpus or "shakespeare", steps, then, bound)

    @property
    def last_step(self) -> int:
        """The step after which the second process ends."""
        return self.steps + self.then

    def config(self) -> RunConfig:
        """Return the configuration of the first process."""
        return load_preset(self.preset, [*self.overrides, f"train.steps={self.steps}"])


def reproduce(spec: ReproduceSpec) -> list[Check]:
    """Run the spec and return its claims.

    Raises:
        ResmolError: A part failed; what was done so far is kept, and the same command goes on from there.
    """
    run, config = spec.run, spec.config()
    run.evidence.mkdir(parents=True, exist_ok=True)
    logger.info(_headline(spec, config))
    options = [option for override in spec.overrides for option in ("--set", override)]
    preset = ["--preset", spec.preset]

    _part(spec, "verify", ["verify", *preset, "--json"])
    if not is_prepared(run.data):
        source = [part for path in spec.inputs for part in ("--input", path)] or [
            "--corpus",
            spec.corpus,
        ]
        _part(spec, "prepare", ["prepare", str(run.data), *source, "--json"])
    if _reached(run) < spec.steps:
        first = ["train", str(run.path), *preset, *options, "--steps", str(spec.steps)]
        _part(spec, "train", [*first, "--json"])
    if _reached(run) < spec.last_step:
        second = ["train", str(run.path), "--steps", str(spec.last_step)]
        _part(spec, "resume", [*second, "--json"])
    windows = str(max(1, EVALUATION_TOKENS // config.data.seq_len))
    _part(spec, "evaluate", ["evaluate", str(run.path), "--windows", windows, "--json"])
    _part(spec, "audit", ["audit", str(run.path), "--json"])
    prompt = config.sampling.prompt
    _part(spec, "generate", ["generate", str(run.path), "--prompt", prompt, "--json"])

    checks = claims(spec)
    evidence = {
        "passed": all(check.passed for check in checks),
        "checks": [check.to_dict() for check in checks],
    }
    write_durable(run.claims_file, json.dumps(evidence, indent=1).encode())
    logger.info(f"report: {write_report(run)}")
    return checks


def estimate_seconds(config: RunConfig, steps: int) -> float:
    """Time a few real training steps on made-up tokens and extrapolate; data, saving and evaluation come on top.

    They run in the precision that ``auto`` chooses here, but uncompiled: compiling takes longer than the estimate may.

    Raises:
        ConfigError: A step does not fit in memory.
    """
    settled, _ = resolve_auto(config)
    check_memory(settled)
    ids = torch.randint(
        config.model.vocab_size,
        (config.batch.micro_batch_size, config.data.seq_len),
        generator=torch.Generator().manual_seed(0),
    )
    batch = Batch(ids, ids, None, tuple(range(len(ids))), ids.numel())
    times = []
    with open_runtime(settled) as runtime:
        state = new_state(settled, runtime)
        for _ in range(ESTIMATE_STEPS):
            started = time.perf_counter()
            train_step(state, [batch] * config.grad_accum_steps, config.batch.global_batch_tokens, settled, runtime)
            times.append(time.perf_counter() - started)
    return min(times) * steps


def _headline(spec: ReproduceSpec, config: RunConfig) -> str:
    todo = max(0, spec.last_step - _reached(spec.run))
    seconds = estimate_seconds(config, todo)
    release_freed_memory()  # a model, its gradients and moments, which the parts need themselves
    begun = f", {spec.last_step - todo} of them done already" if todo < spec.last_step else ""
    return (
        f"reproduce: {spec.preset}, {total_parameters(config.model):,} parameters, {spec.last_step} steps of "
        f"{config.batch.global_batch_tokens:,} tokens{begun}\n"
        f"estimate: about {_duration(seconds)} of training on this machine, measured on {ESTIMATE_STEPS} steps just now"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _reached(run: RunDir) -> int:
    """Return the step of the newest checkpoint, 0 when there is none; whether it is whole is for `train` to find."""
    return next((step_of(path) for path in list_checkpoints(run.checkpoints)), 0)


def _part(spec: ReproduceSpec, name: str, arguments: Sequence[str]) -> None:
    """Run one command in a process of its own and keep what it printed as ``evidence/NAME.json``."""
    logger.info(f"--- resmol {' '.join(arguments)}")
    evidence = spec.run.evidence / f"{name}.json"
    evidence.unlink(missing_ok=True)  # that of an earlier time says nothing about this one
    with StopSignal() as stop:
        # A session of its own: Ctrl-C at a terminal reaches this process alone, which passes it on exactly once.
        command = [sys.executable, "-m", "resmol", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        output, code = _wait(process, stop), process.returncode
    if output.strip():
        write_durable(evidence, output)
    if code in (130, 143) or stop.number is not None:  # it may have come when the part was about to end by itself
        raise Interrupted(
            f"`{name}` was interrupted",
            fix="give the same command again to go on: what is done is kept",
            signal_number=code - 128 if code in (130, 143) else stop.number or signal.SIGTERM,
        )
    if code < 0:
        killer = signal.Signals(-code).name
        raise _PartFailed(f"`resmol {arguments[0]}` was ended by {killer}, perhaps for want of memory", 128 - code)
    if code and not (name == "audit" and code == 1 and output.strip()):  # that becomes a failed claim, with its table
        raise _PartFailed(f"`resmol {arguments[0]}` ended with exit code {code}", code)


def _wait(process: subprocess.Popen[bytes], stop: StopSignal) -> bytes:
    """Wait for a child and pass a stop signal on to it, so that it saves before both leave."""
    passed_on = False
    while True:
        try:
            return process.communicate(timeout=POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            if stop.number is not None and not passed_on:
                process.send_signal(stop.number)
                passed_on = True


class _PartFailed(CheckFailed):
    """A part of the spec failed; the exit code is that of the part."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, fix="see its message above; after that, the same command goes on from here")
        self.exit_code = code  # type: ignore[misc]


# --- the claims ----------------------------------------------------------------------------------------------


def claims(spec: ReproduceSpec) -> list[Check]:
    """Read the evidence and state what it shows; every claim names the file to look into."""
    run = spec.run
    records = read_ledger(run.ledger).records
    steps = effective_steps(records)
    return [
        _evidence_claim(
            run,
            "verify",
            "architecture and parity with transformers",
            "the reverse-engineered model is wrong",
        ),
        _parameters(spec, run),
        _scratch(steps, spec.config(), run),
        _saved_exactly(spec, records),
        _resumed(spec, records),
        _continuous(spec, steps),
        _log(spec, run),
        _learned(records, run),
        _evidence_claim(run, "audit", "the record holds together", "a record that was edited or does not add up"),
        _sample(run),
    ]


def _evidence(run: RunDir, name: str) -> tuple[dict[str, Any], str]:
    path = run.evidence / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}, str(path)


def _evidence_claim(run: RunDir, name: str, title: str, guards: str) -> Check:
    content, path = _evidence(run, name)
    found = content.get("checks", [])
    passed = sum(1 for check in found if check["passed"])
    measured = f"{passed} of {len(found)} checks passed"
    return Check(title, bool(found) and passed == len(found), measured, "all of them", guards, path)


def _parameters(spec: ReproduceSpec, run: RunDir) -> Check:
    counted = total_parameters(spec.config().model)
    recorded = next(select(read_ledger(run.ledger).records, "start"))["parameters"]
    name, expected = "parameters", f"{counted:,} by the closed form"
    return Check(
        name,
        recorded == counted,
        f"{recorded:,} trained",
        expected,
        "an untied output layer",
        str(run.ledger),
    )


def _scratch(steps: dict[int, Record], config: RunConfig, run: RunDir) -> Check:
    uniform, first = math.log(config.model.vocab_size), steps[1]["loss"]
    expected = f"near ln {config.model.vocab_size} = {uniform:.2f}; a trained model would be far below"
    measured = f"loss {first:.3f} at step 1"
    return Check("from scratch", abs(first - uniform) < 1.5, measured, expected, "pretrained weights", str(run.ledger))


def _saved_exactly(spec: ReproduceSpec, records: list[Record]) -> Check:
    name = checkpoint_name(spec.steps)
    path = spec.run.checkpoints / name / "manifest.json"
    # A crash between the checkpoint and its record leaves the resumption from it as the only witness.
    saved = [record for record in records if record["kind"] in ("save", "resume") and record["checkpoint"] == name]
    measured = f"manifest {saved[-1]['manifest_sha256'][:16]}" if saved else "not in the ledger"
    title = f"checkpoint at exactly step {spec.steps}"
    return Check(title, bool(saved) and path.is_file(), measured, "saved, recorded and still there", evidence=str(path))


def _resumed(spec: ReproduceSpec, records: list[Record]) -> Check:
    wanted = spec.steps + 1
    resumes = [record for record in select(records, "resume") if record["next_step"] == wanted]
    follows = [r["step"] for r in records if resumes and r["kind"] == "step" and r["seq"] > resumes[-1]["seq"]][:1]
    measured = f"resumed from {resumes[-1]['checkpoint']}, next step {follows[0]}" if follows else "no such resume"
    title = f"a new process resumed at step {wanted}"
    ledger = str(spec.run.ledger)
    return Check(title, follows == [wanted], measured, f"step {wanted} follows", "training that starts over", ledger)


def _continuous(spec: ReproduceSpec, steps: dict[int, Record]) -> Check:
    config, last = spec.run.load_config(), spec.last_step
    whole = sorted(steps) == list(range(1, last + 1))
    jumps = [s for s, r in steps.items() if r["lr"] != lr_at(s, config.schedule, config.optimizer.lr)]
    measured = f"steps 1 to {max(steps)}, learning rate at {last}: {steps[max(steps)]['lr']:.3g}"
    guards = "a horizon that moves with the last step"
    expected = f"every step to {last} once, each at the schedule's learning rate"
    return Check("one continuous run", whole and not jumps, measured, expected, guards, str(spec.run.ledger))


def _log(spec: ReproduceSpec, run: RunDir) -> Check:
    text = run.log.read_text(encoding="utf-8") if run.log.exists() else ""
    wanted = [1, *range(500, spec.steps + 1, 500), spec.steps, spec.steps + 1, spec.last_step]
    logged = {int(line.split()[1].partition("/")[0]) for line in text.splitlines() if line.startswith("step ")}
    missing = sorted(set(wanted) - logged)
    measured = f"missing: {missing}" if missing else f"lines for {len(logged)} steps"
    expected = f"steps 1, every 500, {spec.steps}, {spec.steps + 1} and {spec.last_step}"
    return Check("the log is kept", not missing, measured, expected, evidence=str(run.log))


def _learned(records: list[Record], run: RunDir) -> Check:
    content, path = _evidence(run, "evaluate")
    first, now = effective_steps(records)[1]["loss"], content.get("loss", math.nan)
    measured = f"{now:.3f} nats, {content.get('bits_per_byte', math.nan):.3f} bits per byte (step 1: {first:.3f} nats)"
    expected = "well below the first loss"
    return Check("it learned: held-out text", now < first - 1.0, measured, expected, "a loss of 0 or of ln V", path)


def _sample(run: RunDir) -> Check:
    content, path = _evidence(run, "generate")
    text = " ".join(str(content.get("text", "")).split())
    shown = text[:60] + ("..." if len(text) > 60 else "")
    return Check("it speaks", bool(text), shown or "nothing", "some text", "a demo of other weights", path)
