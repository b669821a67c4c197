"""The reproduction: separate processes, an exact boundary, claims that can fail."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TrainTiny
from waiting import until

from resmol.audit import reproduce as module
from resmol.audit.claims import make_claims
from resmol.audit.reproduce import ReproduceSpec, estimate_seconds, reproduce
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, Interrupted, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger
from resmol.train import autotune as auto
from resmol.train.lr_schedule import end_of_decay


@pytest.fixture
def spec(
    tmp_path: Path,
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> ReproduceSpec:
    """A reproduction of 20 and 5 steps whose parts run in this process, on the tiny configuration."""
    monkeypatch.setattr(module, "load_preset", lambda _name, _overrides=(): tiny_config)
    return ReproduceSpec(RunDir(tmp_path / "run"), "tiny", (), "shakespeare", 20, 5, ())


def in_this_process(calls: list[list[str]], train_tiny: TrainTiny) -> Any:
    from resmol.__main__ import run as resmol

    def part(spec: ReproduceSpec, name: str, arguments: list[str]) -> None:
        calls.append(list(arguments))
        path = spec.run.evidence / f"{name}.json"
        if name in ("train", "resume"):
            steps = int(arguments[arguments.index("--steps") + 1])
            train_tiny(spec.run.path, steps, "checkpoint.permanent=[20]", progress=True)
        elif name == "verify":
            path.write_text(json.dumps({"checks": [{"passed": True}]}))
        elif name != "prepare":
            import contextlib
            import io

            with contextlib.redirect_stdout(io.StringIO()) as out:
                resmol(arguments, debug=True)
            path.write_text(out.getvalue())

    return part


def test_the_sequence_and_the_claims(
    spec: ReproduceSpec, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(module, "_part", in_this_process(calls, train_tiny))
    checks = {check.name: check for check in reproduce(spec)}
    assert [call[0] for call in calls] == [
        "verify",
        "prepare",
        "train",
        "train",
        "evaluate",
        "audit",
        "generate",
    ]
    assert "estimate: about" in messages[0]
    failed = {name for name, check in checks.items() if not check.passed}
    assert failed <= {"it learned: held-out text"}, checks
    assert checks["a new process resumed at step 21"].measured == "resumed from step-00000020, next step 21"
    assert all(Path(check.evidence).exists() for check in checks.values())
    assert spec.run.report.exists()

    calls.clear()
    reproduce(spec)
    assert "train" not in [call[0] for call in calls], "what is done is not done again"


def test_what_has_begun_goes_on_with_its_own_configuration(
    spec: ReproduceSpec, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset may have changed since: with another version it would be another run."""
    calls: list[list[str]] = []
    train_tiny(spec.run.path, 10, "optimizer.lr=0.005")
    monkeypatch.setattr(module, "_part", lambda _spec, _name, arguments: calls.append(list(arguments)))
    reproduce(spec)
    assert spec.config().optimizer.lr == 0.005
    first = next(call for call in calls if call[0] == "train")
    assert first == ["train", str(spec.run.path), "--steps", "20", "--json"]


def test_the_decay_ends_with_the_reproduction(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    schedule = ReproduceSpec(run, "nano", (), "shakespeare", 1950, 50, ()).config().schedule
    assert end_of_decay(schedule) == 2000
    of_the_user = ("schedule.decay_start=1000", "schedule.decay_steps=500")
    schedule = ReproduceSpec(run, "nano", (), "shakespeare", 1950, 50, of_the_user).config().schedule
    assert (schedule.decay_start, end_of_decay(schedule)) == (1000, 1500)


def test_claims_fail_when_the_evidence_does(
    spec: ReproduceSpec, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(spec.run.path, 25)
    spec.run.evidence.mkdir()
    checks = {check.name: check.passed for check in make_claims(spec.run, spec.config(), 20, 25)}
    assert not checks["architecture and parity with transformers"]
    assert not checks["a new process resumed at step 21"], "one process went through"
    assert not checks["generates text"]
    assert checks["one continuous run"]
    steps = [r for r in read_ledger(spec.run.ledger).records if r["kind"] == "step"]
    assert len(steps) == 25


def test_estimate_is_a_positive_number(tiny_config: RunConfig) -> None:
    assert 0 < estimate_seconds(tiny_config, 100) < 600


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_estimate_times_the_precision_that_auto_will_choose(
    precision: str, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(auto, "_choose_precision", lambda *_: (precision, ""))
    monkeypatch.setattr(module, "train_step", lambda *args: seen.append(args[-1].autocast_dtype))
    estimate_seconds(with_overrides(tiny_config, ["runtime.precision=auto"]), 100)
    assert set(seen) == {torch.bfloat16 if precision == "bfloat16" else None}


def test_evidence_of_an_earlier_time_proves_nothing(spec: ReproduceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, ends = module.subprocess.Popen, "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda *_, **options: genuine([sys.executable, "-c", ends], **options)
    )
    spec.run.evidence.mkdir(parents=True)
    evidence = spec.run.evidence / "audit.json"
    evidence.write_text('{"checks": []}')
    with pytest.raises(CheckFailed, match="was killed by SIGKILL") as failed:
        module._part(spec, "audit", ["audit", "x"])
    assert (failed.value.exit_code, evidence.exists()) == (137, False)


CHILD = """
import pathlib, signal, sys, time
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append(1))
pathlib.Path(sys.argv[1]).touch()
print(flush=True)
while not came:
    time.sleep(0.1)
time.sleep(1.5)  # saving takes its time, and a second signal on the way out would kill it
print('{"signals": %d}' % len(came))
sys.exit(143)
"""


def test_a_stop_signal_reaches_the_part_that_runs(spec: ReproduceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this process gets the signal, as from a job scheduler; the child must save and leave first."""
    genuine = module.subprocess.Popen
    spec.run.evidence.mkdir(parents=True)
    ready = spec.run.path / "ready"
    command = [sys.executable, "-c", CHILD, str(ready)]
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **options: genuine(command, **options))

    def stop_when_ready() -> None:
        until(ready.exists, "the part begins")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        module._part(spec, "train", ["train", "x"])
    assert stopped.value.signal_number == signal.SIGTERM
    assert json.loads((spec.run.evidence / "train.json").read_text()) == {"signals": 1}


# --- what a directory was begun with -----------------------------------------------------------------------------


def test_a_directory_supplies_what_it_was_begun_with(tmp_path: Path) -> None:
    begun = ReproduceSpec.choose(tmp_path / "run", "nano", ("a.txt",), None, 20, 5, ("optimizer.lr=0.01",))
    begun.write()
    assert ReproduceSpec.choose(tmp_path / "run") == begun
    assert (
        ReproduceSpec.choose(tmp_path / "run", "nano", ("a.txt",), steps=20, overrides=("optimizer.lr=0.01",)) == begun
    )


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"preset": "smollm2-135m-cpu"}, "preset"),
        ({"steps": 10}, "steps"),
        ({"then": 50}, "then"),
        ({"inputs": ("b.txt",)}, "input"),
        ({"corpus": "stdlib"}, "corpus"),
        ({"overrides": ("optimizer.lr=0.02",)}, "set"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_touched(
    tmp_path: Path, given: dict[str, Any], option: str
) -> None:
    ReproduceSpec.choose(tmp_path / "run", "nano", (), None, 20, 5).write()
    (tmp_path / "run" / "evidence" / "verify.json").write_text("the old one")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as refused:
        ReproduceSpec.choose(tmp_path / "run", **given)
    assert f"leave --{option} out" in refused.value.fix
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_of_train_is_not_reproduced(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 2)
    with pytest.raises(UsageError, match="`resmol train` began"):
        ReproduceSpec.choose(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "[]", '{"preset": "nano"}'])
def test_a_damaged_specification_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run" / "evidence").mkdir(parents=True)
    (tmp_path / "run" / "evidence" / "reproduce.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        ReproduceSpec.choose(tmp_path / "run")
