"""Resuming is bitwise the uninterrupted run: weights, moments, losses, window ids, learning rate."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.loader import StepBatch
from resmol.data.shards import Dataset
from resmol.data.shuffle import WindowShuffle
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, CheckpointError, ConfigError, DataError, Interrupted, UsageError
from resmol.model.llama import CausalLM
from resmol.run import checkpoint_manifest, retention
from resmol.run.checkpoint import allocate_moments
from resmol.run.checkpoint_manifest import Checkpoint, Manifest, file_entry, open_checkpoint, read_manifest
from resmol.run.directory import RunDir
from resmol.run.fingerprint import Fingerprint
from resmol.run.ledger import Ledger, Record, effective_steps, read_ledger, select
from resmol.run.log_writers import describe
from resmol.system import host
from resmol.train import resume
from resmol.train import step as module
from resmol.train.start import train_model
from resmol.train.step_result import REPRODUCIBLE_FIELDS


def bits(run: Path, step: int) -> dict[str, dict[str, str]]:
    """The digest of every weight and moment in the checkpoint of a step."""
    manifest = read_manifest(run / "checkpoints" / f"step-{step:08d}")
    return {name: entry.tensors for name, entry in manifest.files.items() if entry.tensors}


def history(run: Path) -> dict[int, dict[str, Any]]:
    """What every step of a run recorded that must be reproducible."""
    steps = effective_steps(read_ledger(run / "ledger.jsonl").records)
    return {step: {name: record[name] for name in REPRODUCIBLE_FIELDS} for step, record in steps.items()}


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    assert history(one) == history(other)
    assert bits(one, step) == bits(other, step)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def sixty(straight: Path, train_tiny: TrainTiny) -> Path:
    """An uninterrupted run of 60 steps."""
    if not straight.exists():
        train_tiny(straight, 60)
    return straight


def test_fifty_then_sixty_is_sixty(sixty: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 50)
    train_tiny(tmp_path / "run", 60)
    assert_equal_runs(tmp_path / "run", sixty, 60)
    resumed = [r["next_step"] for r in select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "resume")]
    assert resumed == [51]


def test_two_resumes_in_a_row(sixty: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    for steps in (20, 21, 60):
        train_tiny(tmp_path / "run", steps)
    assert_equal_runs(tmp_path / "run", sixty, 60)


@pytest.mark.parametrize(
    "arithmetic",
    [
        "runtime.precision=bfloat16", "runtime.attention=eager", "runtime.matmul_backend=onednn",
        "optimizer.name=muon", "optimizer.beta2_halflife_tokens=500", "optimizer.embedding_lr_scale=3",
        "data.seq_len_warmup_steps=9",
    ],
)  # fmt: skip
def test_in_other_arithmetic(tmp_path: Path, train_tiny: TrainTiny, arithmetic: str) -> None:
    train_tiny(tmp_path / "straight", 12, arithmetic)
    for steps in (7, 12):
        train_tiny(tmp_path / "run", steps, arithmetic)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 12)


def train_in_another_process(
    run: Path, config: RunConfig, data: Dataset, tokenizer: Tokenizer, steps: int, *options: str
) -> subprocess.Popen[bytes]:
    file = run.parent / "tiny.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "resmol",
        "train",
        str(run),
        "--config",
        str(file),
        "--steps",
        str(steps),
        *options,
    ]
    command += ["--data", str(data.root), "--tokenizer", str(tokenizer.path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("runtime.matmul_backend=mkl",),
        ("runtime.matmul_backend=onednn",),
        ("data.seq_len=160", "model.max_position_embeddings=160", "batch.global_batch_tokens=320"),
    ],
    ids=["mkl", "onednn", "two blocks of attention"],
)
def test_compiled(
    tmp_path: Path,
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    settings: tuple[str, ...],
) -> None:
    """In processes of their own: what checks shapes under pytest cannot be compiled."""
    given = (tiny_config, tiny_dataset, tiny_tokenizer)
    options = [word for setting in ("runtime.compile=on", *settings) for word in ("--set", setting)]
    for name, steps in (("straight", 12), ("run", 7), ("run", 12)):
        assert train_in_another_process(tmp_path / name, *given, steps, *options).wait() == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 12)


def test_across_epoch_borders(tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset) -> None:
    data = {"data": str(short_dataset.root)}
    train_tiny(tmp_path / "straight", 40, **data)
    epochs = [r["epoch"] for r in effective_steps(read_ledger(tmp_path / "straight" / "ledger.jsonl").records).values()]
    assert epochs[-1] > 2, "the data is meant to be used up twice"
    for steps in (*range(10, 20), 30, 40):
        train_tiny(tmp_path / "run", steps, **data)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 40)


def test_interrupted_at_every_step(tmp_path: Path, train_tiny: TrainTiny) -> None:
    quiet = ("evaluation.every=0", "sampling.every=0", "checkpoint.every=0")
    train_tiny(tmp_path / "straight", 30, *quiet)
    for step in range(1, 31):
        train_tiny(tmp_path / "run", step, *quiet)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 30)


def test_weights_alone_do_not_pass_for_a_resume(
    sixty: Path, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any
) -> None:
    """They are refused; and the comparison above has teeth: the first loss after the next update differs."""
    train_tiny(tmp_path / "run", 50)
    genuine = resume.load_into

    def load_weights(checkpoint: Checkpoint, model: CausalLM, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        genuine(checkpoint, model)
        allocate_moments(optimizer, 50)

    monkeypatch.setattr(resume, "load_into", load_weights)
    with pytest.raises(CheckpointError, match="other weights or moments than were in memory"):
        train_tiny(tmp_path / "run", 60)
    monkeypatch.setattr(Fingerprint, "is_whole", lambda _: False)  # nothing to compare
    train_tiny(tmp_path / "run", 60)
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "run", sixty, 60)


class Hook:
    """A log writer that does something when a certain step is shown."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def show(self, record: Record) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            self.action()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_within_the_step(
    sixty: Path, tmp_path: Path, train_tiny: TrainTiny, number: signal.Signals, name: str
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        train_tiny(tmp_path / "run", 60, log_writers=lambda _: [Hook(23, twice)])
    assert stopped.value.signal_number == number
    assert (tmp_path / "run" / "checkpoints" / "step-00000023").is_dir()
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").records[-1]["reason"] == name
    train_tiny(tmp_path / "run", 60)
    assert_equal_runs(tmp_path / "run", sixty, 60)


def test_sighup_is_survived(tmp_path: Path, train_tiny: TrainTiny) -> None:
    hook = Hook(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    state = train_tiny(tmp_path / "run", 8, log_writers=lambda _: [hook])
    assert state.step == 8


class Crash(BaseException):
    """Stands for a death of the process: nothing in the package catches it."""


def die() -> None:
    raise Crash


def compute_wrongly_at(step: int, monkeypatch: Any) -> None:
    """From here on, let one step have another loss than it had."""
    genuine = module.train_step

    def faulty(state: Any, *arguments: Any) -> Any:
        result = genuine(state, *arguments)
        return dataclasses.replace(result, loss=result.loss + 1e-3) if state.step == step else result

    monkeypatch.setattr(module, "train_step", faulty)


def test_a_crash_between_saves_rewinds_and_meets_its_own_bits(
    sixty: Path, tmp_path: Path, train_tiny: TrainTiny
) -> None:
    with pytest.raises(Crash):
        train_tiny(tmp_path / "run", 60, log_writers=lambda _: [Hook(23, die)])
    train_tiny(tmp_path / "run", 60)
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    assert [(r["from_step"], r["to_step"]) for r in select(records, "rewind")] == [(23, 20)]
    assert_equal_runs(tmp_path / "run", sixty, 60)
    assert all_passed(audit(RunDir(tmp_path / "run")))


def test_a_crash_before_the_first_save_starts_over(sixty: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    with pytest.raises(Crash):
        train_tiny(tmp_path / "run", 60, log_writers=lambda _: [Hook(3, die)])
    train_tiny(tmp_path / "run", 60)
    assert_equal_runs(tmp_path / "run", sixty, 60)


def test_re_executed_steps_with_other_bits_stop(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any) -> None:
    with pytest.raises(Crash):
        train_tiny(tmp_path / "run", 60, log_writers=lambda _: [Hook(8, die)])
    compute_wrongly_at(7, monkeypatch)
    with pytest.raises(CheckFailed, match=r"step 7 .* loss_bits"):
        train_tiny(tmp_path / "run", 60)


def test_a_second_crash_does_not_spare_steps_the_comparison(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any
) -> None:
    """Steps 6 to 8 ran; the next process dies after step 6; the third must still be held to steps 7 and 8."""

    for step in (8, 6):
        with pytest.raises(Crash):
            train_tiny(tmp_path / "run", 60, log_writers=lambda _, step=step: [Hook(step, die)])
    compute_wrongly_at(8, monkeypatch)
    with pytest.raises(CheckFailed, match=r"step 8 .* loss_bits"):
        train_tiny(tmp_path / "run", 60)
    failed = {check.name for check in audit(RunDir(tmp_path / "run")) if not check.passed}
    assert failed == {"executions"}, "going on all the same stays on record"


def test_going_to_another_machine_and_back_before_the_first_save_compares_nothing_across(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any
) -> None:
    """Each machine has bits of its own; a record of the second one must not be held against the first."""

    genuine, here = module.train_step, host.processor_name()
    for processor, shift in ((here, 0.0), ("another", 1e-3), (here, 0.0)):

        def shifted(*arguments: Any, by: float = shift) -> Any:
            result = genuine(*arguments)
            return dataclasses.replace(result, loss=result.loss + by)

        monkeypatch.setattr(host, "processor_name", lambda name=processor: name)
        monkeypatch.setattr(module, "train_step", shifted)
        with pytest.raises(Crash):
            train_tiny(tmp_path / "run", 60, log_writers=lambda _: [Hook(3, die)])
    warnings = list(select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn"))
    assert [w["changes"]["processor"]["to"] for w in warnings] == ["another", here]


def test_a_checkpoint_that_was_written_again_after_a_rewind_is_believed(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """The ledger's word on the first checkpoint of a step ends with the rewind that took the step back."""
    run = tmp_path / "run"
    train_tiny(run, 10)
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    train_tiny(run, 10)  # falls back to step 5, and saves step 10 anew, with another parent in its manifest
    again = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    saved = max(number for number, line in enumerate(again) if b'"kind":"save"' in line)
    assert saved > len(lines)
    (run / "ledger.jsonl").write_bytes(b"".join(again[:saved]))  # a crash between the commit and its record
    state = train_tiny(run, 12)
    resumes = list(select(read_ledger(run / "ledger.jsonl").records, "resume"))
    assert (state.step, resumes[-1]["step"]) == (12, 10)
    assert all_passed(audit(RunDir(run)))


def test_sigkill_in_another_process(
    tmp_path: Path,
    sixty: Path,
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    train_tiny: TrainTiny,
) -> None:
    run = tmp_path / "run"
    process = train_in_another_process(run, tiny_config, tiny_dataset, tiny_tokenizer, 60)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "ledger.jsonl").exists() and b'"step":12,' in (run / "ledger.jsonl").read_bytes():
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    train_tiny(run, 60)
    assert_equal_runs(run, sixty, 60)
    assert all_passed(audit(RunDir(run)))


# --- what must be refused ------------------------------------------------------------------------------------


def test_steps_below_the_checkpoint(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 10)
    with pytest.raises(UsageError, match="at step 10; --steps 8"):
        train_tiny(tmp_path / "run", 8)


def test_the_step_reached_already_is_no_error(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 10)
    ledger = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    assert train_tiny(tmp_path / "run", 10).step == 10
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == ledger, "nothing happened, so nothing is recorded"
    assert train_tiny(tmp_path / "run", 12).step == 12


def test_other_data_is_refused_and_changes_nothing(
    tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset
) -> None:
    train_tiny(tmp_path / "run", 5)
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match="fingerprint"):
        train_tiny(tmp_path / "run", 10, data=str(short_dataset.root))
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    train_tiny(tmp_path / "run", 10, data=None)


def test_a_wrong_argument_leaves_nothing_behind(tmp_path: Path, train_tiny: TrainTiny) -> None:
    with pytest.raises(ConfigError):
        train_tiny(tmp_path / "run", 5, "optimizer.lr=0")
    assert not (tmp_path / "run").exists()


def test_drift(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 5)
    with pytest.raises(ConfigError, match=r"data\.seed \(class A\)"):
        train_tiny(tmp_path / "run", 10, "data.seed=9")
    with pytest.raises(ConfigError, match=r"optimizer\.lr \(class B\)") as refused:
        train_tiny(tmp_path / "run", 10, "optimizer.lr=0.02")
    assert "--accept-drift optimizer.lr" in refused.value.fix
    train_tiny(tmp_path / "run", 10, "optimizer.lr=0.02", accept_drift=["optimizer.lr"])
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    assert next(select(records, "drift"))["changes"] == {"optimizer.lr": {"from": 0.01, "to": 0.02}}


def test_all_checkpoints_corrupt(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 10)
    for path in (run / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no valid checkpoint") as refused:
        train_tiny(run, 20)
    assert refused.value.exit_code == 65
    assert len(list((run / "checkpoints").iterdir())) == 2, "nothing is deleted"
    assert train_tiny(run, 20, allow_fresh=True).step == 20
    assert all_passed([check for check in audit(RunDir(run)) if check.name == "continuity"])


def test_a_corrupt_newest_checkpoint_is_skipped(sixty: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 50)
    victim = run / "checkpoints" / "step-00000050" / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-5] ^= 4
    victim.write_bytes(content)
    train_tiny(run, 60)
    records = read_ledger(run / "ledger.jsonl").records
    skipped = [r for r in select(records, "warn") if r["what"] == "checkpoint skipped"]
    assert "optimizer.safetensors" in skipped[0]["reason"]
    assert (run / "checkpoints" / "corrupt-step-00000050-1").is_dir()
    assert_equal_runs(run, sixty, 60)


def test_a_changed_environment_is_recorded(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 5)
    with pytest.raises(ConfigError, match=r"environment changed, so .* not promised: threads 1 -> 2\nfix"):
        train_tiny(tmp_path / "run", 10, "runtime.threads=2", accept_drift=["runtime.threads"], strict=True)
    train_tiny(tmp_path / "run", 10, "runtime.threads=2", accept_drift=["runtime.threads"])
    [warning] = select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn")
    assert warning["changes"]["threads"] == {"from": 1, "to": 2}
    text = describe(warning)
    assert text == "warning: environment changed: bitwise equality is not promised from here (threads 1 -> 2)"


@pytest.mark.parametrize(("micro", "recorded"), [(2, False), (1, True)])
def test_another_number_of_processes_matters_where_sums_have_an_order(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any, micro: int, recorded: bool
) -> None:
    from resmol.train.parallel import Runtime

    run, options = tmp_path / "run", [f"batch.micro_batch_size={micro}", "batch.global_batch_tokens=64"]
    train_tiny(run, 5, *options)
    genuine = Runtime.environment
    monkeypatch.setattr(Runtime, "environment", lambda self: {**genuine(self), "world_size": 2})
    train_tiny(run, 10, *options)
    assert any(select(read_ledger(run / "ledger.jsonl").records, "warn")) == recorded


def test_an_older_copy_of_the_ledger_is_noticed(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 10)
    old = (run / "ledger.jsonl").read_bytes()
    train_tiny(run, 20)
    (run / "ledger.jsonl").write_bytes(old)
    with pytest.raises(CheckFailed, match="older copy"):
        train_tiny(run, 30)


def test_checkpoints_with_an_empty_ledger_are_refused(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 5)
    (run / "ledger.jsonl").unlink()
    with pytest.raises(CheckFailed, match="empty ledger"):
        train_tiny(run, 10)
    Ledger(run / "ledger.jsonl").close()


# --- what a checkpoint is bound to ---------------------------------------------------------------------------


def test_one_resume_reads_one_manifest_once(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any) -> None:
    train_tiny(tmp_path / "run", 10)
    genuine, read = checkpoint_manifest.read_manifest, []
    monkeypatch.setattr(checkpoint_manifest, "read_manifest", lambda path: read.append(path.name) or genuine(path))
    monkeypatch.setattr(retention, "read_manifest", checkpoint_manifest.read_manifest)
    assert train_tiny(tmp_path / "run", 10).step == 10
    assert read == ["step-00000010"]


def test_checkpoints_are_a_chain_across_a_resume(tmp_path: Path, train_tiny: TrainTiny) -> None:
    for steps in (10, 15):
        train_tiny(tmp_path / "run", steps)
    five, ten, fifteen = (read_manifest(path) for path in sorted((tmp_path / "run" / "checkpoints").iterdir()))
    assert [five.parent, ten.parent, fifteen.parent] == [None, five.sha256, ten.sha256]


def bind_to_another(path: Path, **changes: str) -> None:
    """Change fields of a checkpoint's state, and its manifest with them; only the ledger tells the difference."""
    opened = open_checkpoint(path)
    (path / "state.json").write_text(opened.state.model_copy(update=changes).model_dump_json(indent=1))
    entries = opened.manifest.files | {"state.json": file_entry(path / "state.json", {})}
    manifest = opened.manifest.model_copy(update={"files": entries})
    (path / "manifest.json").write_bytes(Manifest.model_validate(manifest.model_dump()).to_bytes())


@pytest.mark.parametrize("field", ["config_sha256", "data_fingerprint"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, train_tiny: TrainTiny, field: str) -> None:
    """It is whole, its ledger's head is here, and a crash kept its own record from being written."""
    run = tmp_path / "run"
    train_tiny(run, 10)
    bind_to_another(run / "checkpoints" / "step-00000010", **{field: "ab" * 32})
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    saved = max(number for number, line in enumerate(lines) if b'"kind":"save"' in line)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:saved]))
    before = (run / "ledger.jsonl").read_bytes()
    with pytest.raises(CheckFailed, match=f"step-00000010 is no checkpoint of this run: its {field} is abababababab"):
        train_tiny(run, 12)
    assert (run / "ledger.jsonl").read_bytes() == before
    (run / "checkpoints" / "step-00000010").rename(tmp_path / "moved")
    assert train_tiny(run, 12).step == 12, "as the message says, it goes on from the one before"


def test_accepted_drifts_are_what_a_later_checkpoint_is_bound_to(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run, lr = tmp_path / "run", "optimizer.lr"
    train_tiny(run, 5)
    train_tiny(run, 10, "optimizer.lr=0.02", accept_drift=[lr])
    train_tiny(run, 15, "optimizer.lr=0.03", accept_drift=[lr])
    states = [open_checkpoint(path).state for path in sorted((run / "checkpoints").iterdir())]
    assert len({state.config_sha256 for state in states}) == 3
    weights = run / "checkpoints" / "step-00000015" / "model.safetensors"
    weights.write_bytes(b"")
    assert train_tiny(run, 15, "optimizer.lr=0.03").step == 15, "from step 10, which had another learning rate"
    assert all_passed([check for check in audit(RunDir(run)) if check.name == "configuration"])


EDITS = [
    ("beta2 = 0.95", "beta2 = 0.5", r"optimizer\.beta2 \(class A\): 0\.95 -> 0\.5"),
    ("document_mask = true", "document_mask = false", r"data\.document_mask \(class A\): True -> False"),
    ("weight_decay = 0.01", "weight_decay = 0.5", r"optimizer\.weight_decay \(class B\): 0\.01 -> 0\.5"),
    ("clip_norm = 1.0", "clip_norm = 9.0", r"optimizer\.clip_norm \(class B\)"),
]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name} holds {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(("old", "new", "named"), EDITS)
def test_an_edited_configuration_is_refused_field_by_field(
    tmp_path: Path, train_tiny: TrainTiny, old: str, new: str, named: str
) -> None:
    run = tmp_path / "run"
    train_tiny(run, 5)
    edit(run / "config.toml", old, new)
    ledger = (run / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=named):
        train_tiny(run, 10, config=None)
    with pytest.raises(ConfigError, match=r"config\.toml was edited, and another configuration is given as well"):
        train_tiny(run, 10)
    assert (run / "ledger.jsonl").read_bytes() == ledger
    failed = [check.measured for check in audit(RunDir(run)) if not check.passed]
    assert len(failed) == 1
    assert failed[0].startswith("config.toml: ")


def test_a_preset_that_changed_since_is_left_out(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 5, "optimizer.beta2=0.5")
    with pytest.raises(ConfigError, match=r"optimizer\.beta2 \(class A\): 0\.5 -> 0\.95") as refused:
        train_tiny(run, 10)
    assert refused.value.fix.startswith("leave --preset and --config out: the run has a configuration of its own")
    assert train_tiny(run, 10, config=None).step == 10


def test_an_edit_of_class_b_is_recorded_when_it_is_accepted(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run, lr = tmp_path / "run", "optimizer.lr"
    train_tiny(run, 5)
    edit(run / "config.toml", "lr = 0.01", "lr = 0.02")
    assert train_tiny(run, 10, config=None, accept_drift=[lr]).step == 10
    changes = next(select(read_ledger(run / "ledger.jsonl").records, "drift"))["changes"]
    assert changes == {lr: {"from": 0.01, "to": 0.02}}
    assert all_passed(audit(RunDir(run)))


def test_a_field_of_class_c_may_be_edited(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 5)
    edit(tmp_path / "run" / "config.toml", "keep_last = 100", "keep_last = 99")
    assert train_tiny(tmp_path / "run", 10, config=None).step == 10
    assert all_passed(audit(RunDir(tmp_path / "run")))


def test_a_lost_configuration_is_restored_from_the_ledger(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run, lr = tmp_path / "run", "optimizer.lr"
    train_tiny(run, 5)
    train_tiny(run, 8, "optimizer.lr=0.02", accept_drift=[lr])
    bound = RunDir(run).load_config().bound_fields()
    (run / "config.toml").unlink()
    with pytest.raises(ConfigError, match=r"optimizer\.beta2 \(class A\)"):
        train_tiny(run, 10, "optimizer.lr=0.02", "optimizer.beta2=0.5")
    with pytest.raises(DataError, match=r"config\.toml is missing, which says where"):
        train_model(None, run)
    assert not (run / "config.toml").exists()
    assert train_tiny(run, 10, config=None).step == 10
    assert RunDir(run).load_config().bound_fields() == bound
    assert all_passed(audit(RunDir(run)))


def test_the_configuration_of_another_run_is_refused(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 5)
    train_tiny(tmp_path / "other", 5, "train.seed=9")
    (tmp_path / "run" / "config.toml").write_bytes((tmp_path / "other" / "config.toml").read_bytes())
    with pytest.raises(ConfigError, match=r"train\.seed \(class A\): 8 -> 9"):
        train_tiny(tmp_path / "run", 10, config=None)


@pytest.mark.parametrize("again", [{"accept_drift": ["optimizer.lr"]}, {}], ids=["accepted again", "not accepted"])
def test_a_crash_between_the_stored_configuration_and_the_record_of_its_drift(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any, again: dict[str, Any]
) -> None:
    """config.toml is then ahead of the ledger, which decides."""
    run = tmp_path / "run"
    train_tiny(run, 5)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_record_resume", lambda *_: die())
        with pytest.raises(Crash):
            train_tiny(run, 10, "optimizer.lr=0.02", accept_drift=["optimizer.lr"])
    assert "lr = 0.02" in (run / "config.toml").read_text(encoding="utf-8")
    assert not any(select(read_ledger(run / "ledger.jsonl").records, "drift"))
    if again:
        assert train_tiny(run, 10, config=None, **again).step == 10
        assert all_passed(audit(RunDir(run)))
    else:
        with pytest.raises(ConfigError, match=r"optimizer\.lr \(class B\)"):
            train_tiny(run, 10, config=None)


def test_a_decay_is_planned_while_it_lies_ahead(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """Warm-up-stable-decay: the decay is decided on late. The audit knows both schedules."""
    run, decay = tmp_path / "run", ("schedule.decay_start=22", "schedule.decay_steps=6")
    accepted = {"accept_drift": ["schedule.decay_start", "schedule.decay_steps"], "config": None}
    train_tiny(run, 20)
    with pytest.raises(ConfigError, match=r"schedule\.decay_start \(class B\)"):
        train_tiny(run, 28, *decay, config=None)
    early = ("schedule.decay_start=15", "schedule.decay_steps=6")
    with pytest.raises(ConfigError, match="gives step 16 another learning rate, and the run is at step 20"):
        train_tiny(run, 28, *early, **accepted)
    train_tiny(run, 25, *decay, **accepted)
    with pytest.raises(ConfigError, match="gives step 23 another learning rate"):
        train_tiny(run, 28, "schedule.decay_steps=9", **accepted)
    train_tiny(run, 28, config=None)
    rates = [record["lr"] for _, record in sorted(effective_steps(read_ledger(run / "ledger.jsonl").records).items())]
    assert rates[19:22] == [0.01] * 3
    assert rates[22:] == pytest.approx([0.01 * (6 - step) / 6 for step in range(1, 7)])
    assert all_passed(audit(RunDir(run)))


def test_steps_after_the_decay_are_warned_of(
    tmp_path: Path, train_tiny: TrainTiny, caplog: pytest.LogCaptureFixture
) -> None:
    decay = ("schedule.decay_start=10", "schedule.decay_steps=2")
    train_tiny(tmp_path / "run", 12, *decay)
    assert "change nothing" not in caplog.text
    train_tiny(tmp_path / "run", 14, *decay)
    assert "the learning rate is 0 from step 12 on" in caplog.text
    assert "takes --set schedule.decay_start=12 --set schedule.decay_steps=2" in caplog.text


# --- the place in the data -----------------------------------------------------------------------------------


def windows_read(monkeypatch: Any) -> list[int]:
    """Record the windows that training reads from here on, in their order."""
    genuine, read = module.train_step, list[int]()

    def train_step(state: Any, batch: StepBatch, *arguments: Any) -> Any:
        read.extend(window for micro_batch in batch.batches for window in micro_batch.window_ids)
        return genuine(state, batch, *arguments)

    monkeypatch.setattr(module, "train_step", train_step)
    return read


@pytest.mark.parametrize("tokens", [(64, 128, 32), (128, 64, 256)], ids=["doubled first", "halved first"])
def test_a_batch_that_changes_goes_on_after_the_last_window(
    tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset, monkeypatch: Any, tokens: tuple[int, ...]
) -> None:
    """None is skipped and none repeated, over more than an epoch; the audit recomputes it."""
    run, batch = tmp_path / "run", "batch.global_batch_tokens"
    quiet = ("evaluation.every=0", "sampling.every=0", "batch.micro_batch_size=1")
    read = windows_read(monkeypatch)
    for number, size in enumerate(tokens, start=1):
        options = (f"{batch}={size}", *quiet)
        train_tiny(run, 7 * number, *options, data=str(short_dataset.root), accept_drift=[batch])
    steps = effective_steps(read_ledger(run / "ledger.jsonl").records)
    seq_len = RunDir(run).load_config().data.seq_len
    count = 7 * sum(tokens) // seq_len
    n_windows = -(-(len(short_dataset.train) - 1) // seq_len)
    order = WindowShuffle(n_windows, RunDir(run).load_config().data.seed)
    assert read == order.windows(np.arange(count, dtype=np.int64)).tolist()
    assert steps[21]["windows_seen"] == count > n_windows
    assert steps[21]["epoch"] == count / n_windows
    epochs = [steps[step]["epoch"] for step in range(1, 22)]
    assert epochs == sorted(epochs)
    assert all_passed(audit(RunDir(run), strict=True))


def test_the_audit_notices_a_place_that_is_computed_from_the_step(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any
) -> None:
    """With (step - 1) times the batch of today, a batch that doubled skips windows."""
    run, batch = tmp_path / "run", "batch.global_batch_tokens"
    train_tiny(run, 5)
    genuine = resume.restore

    def restore(state: Any, *arguments: Any) -> None:
        genuine(state, *arguments)
        state.windows_seen *= 2

    monkeypatch.setattr(resume, "restore", restore)
    train_tiny(run, 10, f"{batch}=128", accept_drift=[batch])
    failed = {check.name for check in audit(RunDir(run)) if not check.passed}
    assert failed == {"tokens", "data order"}
