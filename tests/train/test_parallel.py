"""Two gloo ranks give the bits of one process, evaluations included; the environment holds no secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import assert_equal_runs
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.checks import all_passed
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError
from resmol.run.directory import RunDir
from resmol.run.ledger import Kind, Record, effective_steps, read_ledger, select
from resmol.train import loss_scale
from resmol.train.parallel import Runtime, open_runtime

OFTEN = ["evaluation.every=5", "evaluation.windows=7", "sampling.every=5"]  # 4 batches, the last one of one window


def torchrun_words(processes: int) -> list[str]:
    """Return what starts ``resmol`` in several processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "resmol"]


def torchrun(
    processes: int, config: RunConfig, run: Path, data: Path, tokenizer: Path, steps: int, *options: str
) -> None:
    file = run.parent / "tiny.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    command = torchrun_words(processes)
    command += [
        "train",
        str(run),
        "--config",
        str(file),
        "--steps",
        str(steps),
        "--data",
        str(data),
        "--tokenizer",
        str(tokenizer),
        *options,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]


def outputs(run: Path, kind: Kind) -> list[Record]:
    """Return the records of a kind, without what differs between equal runs."""
    records = select(read_ledger(run / "ledger.jsonl").records, kind)
    return [{key: record[key] for key in record.keys() - {"seconds", "seq", "prev", "time"}} for record in records]


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "float32"), ("muon", "float16")])
def test_one_process_two_and_one_again(
    tmp_path: Path,
    train_tiny: TrainTiny,
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    precision: str,
) -> None:
    """In float16 the loss scale has grown when the second rank comes, and the gradient of step 6 overflows on both."""
    overrides = [*OFTEN, f"optimizer.name={optimizer}", "averaging.fraction=0.5", "averaging.every=2"]
    overrides.append(f"runtime.precision={precision}")
    config = with_overrides(tiny_config, overrides)
    with monkeypatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
        train_tiny(tmp_path / "straight", 5, *overrides)
        train_tiny(tmp_path / "run", 5, *overrides)
    train_tiny(tmp_path / "straight", 15, *overrides)
    torchrun(2, config, tmp_path / "run", tiny_dataset.root, tiny_tokenizer.path, 10)
    train_tiny(tmp_path / "run", 15, *overrides)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 15)
    steps = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)
    assert [step for step in steps if steps[step].get("skipped")] == ([6] if precision == "float16" else [])
    evaluations = outputs(tmp_path / "run", "eval")
    assert [record["step"] for record in evaluations] == [5, 10, 15]
    assert evaluations == outputs(tmp_path / "straight", "eval"), "the last bit of the loss included"
    assert outputs(tmp_path / "run", "sample") == outputs(tmp_path / "straight", "sample")
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    assert [r["environment"]["world_size"] for r in records if r["kind"] in ("start", "resume")] == [1, 2, 1]
    slow = "straggler"  # a busy machine may have one
    assert not [record for record in select(records, "warn") if record["what"] != slow]


def test_two_processes_go_on_after_the_last_window_with_twice_the_batch(
    tmp_path: Path, train_tiny: TrainTiny, tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer
) -> None:
    run, batch = tmp_path / "run", "batch.global_batch_tokens"
    quiet = ("evaluation.every=0", "sampling.every=0")
    train_tiny(run, 5, *quiet)
    doubled = with_overrides(tiny_config, [f"{batch}=128", *quiet])
    torchrun(2, doubled, run, tiny_dataset.root, tiny_tokenizer.path, 10, "--accept-drift", batch)
    train_tiny(run, 12, *quiet, accept_drift=[batch])
    steps = effective_steps(read_ledger(run / "ledger.jsonl").records)
    assert [steps[step]["windows_seen"] for step in (5, 6, 10, 11, 12)] == [20, 28, 60, 64, 68]
    assert all_passed(audit(RunDir(run), strict=True))


def test_cuda_without_a_device(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    with (
        pytest.raises(ConfigError, match=r"runtime\.device is cuda, and PyTorch .* finds no accelerator"),
        open_runtime(with_overrides(tiny_config, ["runtime.device=cuda"])),
    ):
        pass


def test_environment_holds_facts_only(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    with open_runtime(tiny_config) as runtime:
        assert isinstance(runtime, Runtime)
        facts = runtime.environment()
    assert set(facts) == {
        "python",
        "torch",
        "system",
        "processor",
        "cpu_capability",
        "mkl",
        "threads",
        "world_size",
        "sharding",
        "device",
    }
    assert "secret" not in str(facts)
