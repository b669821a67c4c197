"""Bits that travel: a golden run whatever the environment asks for, and what an audit elsewhere makes of one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TrainTiny

import resmol.system.host
from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.errors import ConfigError
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger, select
from resmol.train import portable
from resmol.train.parallel import open_runtime
from resmol.train.portable import mkl_branch

HAS_MKL = pytest.mark.skipif(mkl_branch() == "none", reason="this PyTorch has no MKL, so no bits travel")
# Of 40 steps of nano on 512 tokens, PyTorch 2.13: the sha256 of the bits of every loss and gradient norm.
# Seen on an AMD EPYC (Zen 4) and on an Intel Xeon (with AVX-512 and AMX), and in QEMU 7.2's emulation of an Intel
# Haswell, and of an Intel Nehalem, which has no AVX and no fused multiply-add.
GOLDEN = "0750e6b67e35c23d"
OTHERWISE = {  # what chooses kernels, and what the number of threads follows; the mode must not care
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AUTO", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2", "MKL_DYNAMIC": "TRUE", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-AVX2",
}  # fmt: skip


@HAS_MKL
def test_a_portable_run_has_the_golden_bits(tmp_path: Path, tiny_dataset: Dataset, tiny_tokenizer_file: Path) -> None:
    command = [
        sys.executable, "-m", "resmol", "train", str(tmp_path / "run"), "--preset", "nano", "--steps", "40", "--data",
        str(tiny_dataset.root), "--tokenizer", str(tiny_tokenizer_file), "--set", "runtime.determinism=portable",
        "--set", "evaluation.every=0", "--set", "sampling.every=0",
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **OTHERWISE}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = read_ledger(RunDir(tmp_path / "run").ledger).records
    facts = next(select(records, "start"))["environment"]
    assert (facts["cpu_capability"], facts["mkl"], facts["threads"]) == ("DEFAULT", "compatible", 1)
    bits = "".join(record["loss_bits"] + record["grad_norm_bits"] for record in effective_steps(records).values())
    assert hashlib.sha256(bits.encode()).hexdigest()[:16] == GOLDEN


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this process is set up for it")
def test_where_pytorch_was_imported_before_a_portable_run_is_refused(tmp_path: Path, train_tiny: TrainTiny) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tiny(tmp_path / "run", 2, "runtime.determinism=portable")
    assert torch.backends.cpu.get_cpu_capability() in caught.value.what
    assert "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE" in caught.value.fix
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def replayed(run: Path) -> list[str]:
    checks = audit(RunDir(run), replay_options=ReplayOptions(count=9, seed=1))
    return [check.measured.partition(":")[0] for check in checks if check.name.startswith("replay of")]


@pytest.mark.parametrize(
    ("determinism", "verdict", "warnings"),
    [("machine", "UNSUPPORTED", 1), ("portable", "PASS", 0), ("off", "UNSUPPORTED", 1)],
)
def test_only_a_portable_run_is_replayed_on_another_processor(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch,
    determinism: str, verdict: str, warnings: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(portable, "portability_problem", lambda: "")  # the bits do not travel, but the facts do
    train_tiny(tmp_path / "run", 5, f"runtime.determinism={determinism}")
    here = replayed(tmp_path / "run")
    monkeypatch.setattr(resmol.system.host, "processor_name", lambda: "another processor")
    assert (here, replayed(tmp_path / "run")) == (["UNSUPPORTED" if determinism == "off" else "PASS"], [verdict])
    train_tiny(tmp_path / "run", 7, f"runtime.determinism={determinism}")
    assert sum(1 for _ in select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn")) == warnings


def test_only_off_leaves_the_choice_of_kernels_to_pytorch(tiny_config: RunConfig) -> None:
    for determinism, enforced in (("machine", True), ("off", False)):
        with open_runtime(with_overrides(tiny_config, [f"runtime.determinism={determinism}"])):
            assert torch.are_deterministic_algorithms_enabled() == enforced
