"""`resmol reproduce`: a training run from nothing to its report, each part in a process of its own.

    verify -> prepare -> train to N -> (a new process) train to N + M -> evaluate -> audit -> generate -> report

An interrupted reproduction continues when the same command is given again: finished training and prepared data are
kept, and the other parts are repeated.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import join
from typing import Any

import torch

from resmol.audit.claims import make_claims, write_claims
from resmol.audit.report import write_report
from resmol.checks import Check
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.loader import Batch, StepBatch
from resmol.data.resolve import is_prepared
from resmol.errors import CheckFailed, Interrupted, UsageError
from resmol.model.flops import total_parameters
from resmol.run.checkpoint_manifest import list_checkpoints, step_of
from resmol.run.directory import RunDir
from resmol.system.atomic_io import write_durable
from resmol.system.host import release_freed_memory
from resmol.system.processes import ask_to_stop, start_apart
from resmol.system.signals import STOP_SIGNALS, StopSignal
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.train.autotune import check_memory, resolve_auto
from resmol.train.build import new_state
from resmol.train.devices import find_device
from resmol.train.lr_schedule import decay_over
from resmol.train.parallel import open_runtime
from resmol.train.step import train_step

logger = logging.getLogger(__name__)

ESTIMATE_STEPS = 4
POLL_SECONDS = 0.5
SPECIFICATION = "reproduce.json"
_FIELDS = ("preset", "inputs", "corpus", "steps", "then", "overrides")
_OPTIONS = {"inputs": "input", "overrides": "set"}
EVALUATION_TOKENS = 16_384  # a minute or less for the real model on two cores


@dataclass(frozen=True)
class ReproduceSpec:
    """What to reproduce.

    Attributes:
        run: The run directory.
        preset: The name of the preset.
        inputs: Paths of the user's own text; empty takes ``corpus``.
        corpus: The corpus to train on if there are no inputs.
        steps: Steps of the first process; its last checkpoint is permanent.
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
        preset: str | None = None,
        inputs: tuple[str, ...] = (),
        corpus: str | None = None,
        steps: int | None = None,
        then: int | None = None,
        overrides: tuple[str, ...] = (),
    ) -> ReproduceSpec:
        """Return the specification that a directory was begun with, or fill in the defaults for a new one.

        The default of the preset depends on whether there is a GPU.

        Raises:
            UsageError: The directory was begun with another value of something that is given, or by `train`.
        """
        given = {"preset": preset, "inputs": inputs, "corpus": corpus, "steps": steps, "then": then}
        stated = {name: value for name, value in given.items() if value not in (None, ())}
        stated |= {"overrides": overrides} if overrides else {}
        default = "smollm2-135m-cpu" if find_device("auto").type == "cpu" else "smollm2-135m"
        directory = RunDir(user_path(run or Path("runs") / (preset or default)))
        begun = _begun_with(directory)
        for name, value in stated.items():
            if begun and begun[name] != value:
                raise UsageError(
                    f"{directory.path} was begun with {name} {_shown(begun[name])}, and {_shown(value)} is given now",
                    fix=f"leave --{_OPTIONS.get(name, name)} out to continue it, or name another directory",
                )
        defaults = {
            "preset": default,
            "inputs": (),
            "corpus": "shakespeare",
            "steps": 5000,
            "then": 50,
            "overrides": (),
        }
        return cls(directory, **{**defaults, **stated, **begun})

    def write(self) -> None:
        """Keep the specification in the run, for the next call."""
        fields = {name: value for name, value in asdict(self).items() if name != "run"}
        self.run.evidence.mkdir(parents=True, exist_ok=True)
        write_durable(self.run.evidence / SPECIFICATION, json.dumps(fields, indent=1).encode())

    @property
    def last_step(self) -> int:
        """The last step of the second process."""
        return self.steps + self.then

    def config(self) -> RunConfig:
        """Return the configuration of the first process; once the run has begun, its own: presets change."""
        if self.run.has_begun() and self.run.exists():
            return self.run.load_config()
        return load_preset(self.preset, [*self.all_overrides, f"train.steps={self.steps}"])

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """Those of the user, the permanent checkpoint between the two processes, and a decay that ends with them."""
        return (f"checkpoint.permanent=[{self.steps}]", *self._decay(), *self.overrides)

    def _decay(self) -> tuple[str, ...]:
        """Return the decay of the preset for this length, unless the user planned one."""
        schedule = load_preset(self.preset).schedule
        if not schedule.decay_steps or any("schedule." in override for override in self.overrides):
            return ()
        start, length = decay_over(schedule, self.last_step)
        return (f"schedule.decay_start={start}", f"schedule.decay_steps={length}") if length > 0 else ()


def reproduce(spec: ReproduceSpec, published: Path | None = None) -> list[Check]:
    """Run all parts and return the claims.

    Args:
        spec: What to reproduce.
        published: A published run to make again beside it; None makes none.

    Raises:
        ResmolError: A part failed. The results so far are kept, and the same command continues from there.
    """
    run, config = spec.run, spec.config()
    spec.write()
    logger.info(_announcement(spec, config))
    options = [option for override in spec.all_overrides for option in ("--set", override)]
    preset = ["--preset", spec.preset]

    _part(spec, "verify", ["verify", *preset, "--json"])
    if not is_prepared(run.data):
        source = [part for path in spec.inputs for part in ("--input", path)] or ["--corpus", spec.corpus]
        _part(spec, "prepare", ["prepare", str(run.data), *source, "--json"])
    if _reached(run) < spec.steps:
        begin = [] if run.has_begun() else [*preset, *options]
        _part(spec, "train", ["train", str(run.path), *begin, "--steps", str(spec.steps), "--json"])
    if _reached(run) < spec.last_step:
        second = ["train", str(run.path), "--steps", str(spec.last_step)]
        _part(spec, "resume", [*second, "--json"])
    windows = str(max(1, EVALUATION_TOKENS // config.data.seq_len))
    _part(spec, "evaluate", ["evaluate", str(run.path), "--windows", windows, "--json"])
    _part(spec, "audit", ["audit", str(run.path), "--json"])
    if published is not None:
        _part(spec, "published", ["audit", "--record", str(published), "--json"])
    prompt = run.load_config().sampling.prompt
    _part(spec, "generate", ["generate", str(run.path), "--prompt", prompt, "--json"])

    checks = make_claims(run, config, spec.steps, spec.last_step)
    write_claims(run, checks)
    logger.info(f"report: {write_report(run)}")
    return checks


def _begun_with(run: RunDir) -> dict[str, Any]:
    """Return the specification that a directory was begun with; empty for a new one.

    Raises:
        UsageError: `resmol train` began it, and its evidence would be of something else.
    """
    try:
        stored = json.loads((run.evidence / SPECIFICATION).read_bytes())
        return {name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name] for name in _FIELDS}
    except FileNotFoundError:
        if run.exists():
            raise UsageError(
                f"{run.path} is a run that `resmol train` began; reproduce makes one of its own, from nothing",
                fix="name a directory that does not exist yet",
            ) from None
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{run.evidence / SPECIFICATION} cannot be read", fix="restore the file, or name another directory"
        ) from None


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def estimate_seconds(config: RunConfig, steps: int) -> float:
    """Return the estimated seconds of ``steps`` training steps, without data loading, saving and evaluation.

    A few real steps on random tokens are timed. They run in the precision that ``auto`` chooses here, but uncompiled,
    since compiling would take longer than the estimate may.

    Raises:
        ConfigError: A step does not fit in memory.
    """
    resolved, _ = resolve_auto(config)
    check_memory(resolved)
    ids = torch.randint(
        config.model.vocab_size,
        (config.batch.micro_batch_size, config.data.seq_len),
        generator=torch.Generator().manual_seed(0),
    )
    micro_batch = Batch(ids, ids, None, tuple(range(len(ids))), ids.numel())
    micro_batches = [micro_batch] * config.grad_accum_steps
    batch = StepBatch(micro_batches, config.batch.global_batch_tokens, window_digest="", windows_seen=0, epoch=0.0)
    times = []
    with open_runtime(resolved) as runtime:
        state = new_state(resolved, runtime)
        for _ in range(ESTIMATE_STEPS):
            started = time.perf_counter()
            train_step(state, batch, resolved, runtime)
            times.append(time.perf_counter() - started)
    return min(times) * steps


def _announcement(spec: ReproduceSpec, config: RunConfig) -> str:
    todo = max(0, spec.last_step - _reached(spec.run))
    seconds = estimate_seconds(config, todo)
    release_freed_memory()  # the memory of a model, its gradients and moments, which the parts need
    done = f", {spec.last_step - todo} of them already done" if todo < spec.last_step else ""
    return (
        f"reproduce: {spec.preset}, {total_parameters(config.model):,} parameters, "
        f"{counted(spec.last_step, 'step')} of {counted(config.batch.global_batch_tokens, 'token')}{done}\n"
        f"estimate: about {_duration(seconds)} of training on this machine, measured on {ESTIMATE_STEPS} steps just now"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _reached(run: RunDir) -> int:
    """Return the step of the newest checkpoint, 0 if there is none; `train` checks whether it is corrupt."""
    return next((step_of(path) for path in list_checkpoints(run.checkpoints)), 0)


def _part(spec: ReproduceSpec, name: str, arguments: Sequence[str]) -> None:
    """Run one command in a process of its own and write its standard output to ``evidence/NAME.json``."""
    logger.info(f"--- resmol {join(arguments)}")
    evidence = spec.run.evidence / f"{name}.json"
    evidence.unlink(missing_ok=True)  # evidence of an earlier attempt proves nothing
    with StopSignal() as stop:
        # So that Ctrl-C at a terminal reaches this process alone, which forwards it once.
        command = [sys.executable, "-m", "resmol", *arguments]
        process = start_apart(command, stdout=subprocess.PIPE)
        output, code = _wait(process, stop), process.returncode
    if output.strip():
        write_durable(evidence, output)
    stopped_by = code - 128 if code - 128 in STOP_SIGNALS else stop.number
    if stopped_by is not None:  # the signal may have come when the part was just ending
        raise Interrupted(
            f"`{name}` was interrupted",
            fix="give the same command again to continue: the results so far are kept",
            signal_number=stopped_by,
        )
    if code < 0:
        killer = signal.Signals(-code).name
        raise _PartFailed(f"`resmol {arguments[0]}` was killed by {killer}; memory may have been short", 128 - code)
    if code and not (
        name in ("audit", "published") and code == 1 and output.strip()
    ):  # a failed audit becomes a failed claim
        raise _PartFailed(f"`resmol {arguments[0]}` ended with exit code {code}", code)


def _wait(process: subprocess.Popen[bytes], stop: StopSignal) -> bytes:
    """Wait for a child, and forward a stop signal to it, so that it saves before both exit."""
    forwarded = False
    while True:
        try:
            return process.communicate(timeout=POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            if stop.number is not None and not forwarded:
                ask_to_stop(process, stop.number)
                forwarded = True


class _PartFailed(CheckFailed):
    """A part failed; the exit code is that of the part."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, fix="see its message above; then give the same command again to continue")
        self.exit_code = code  # type: ignore[misc]
