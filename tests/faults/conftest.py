"""Fixtures of the fault campaign; see campaign.py for its report and trials.py for what a trial is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import shim as shim_module
from campaign import DEFAULT_SEED, Campaign
from trials import FAULT_RUN, STEPS, Forks, Oracle, Setting, checkpoint_digests, step_bits, train_run

from resmol.data.shards import Dataset


@pytest.fixture(scope="session")
def campaign() -> Iterator[Campaign]:
    """Counts and chance; a selection unless RESMOL_FAULTS=full."""
    full, seed = os.environ.get("RESMOL_FAULTS") == "full", int(os.environ.get("RESMOL_FAULTS_SEED", DEFAULT_SEED))
    made = Campaign(full, seed)
    yield made
    if out := os.environ.get("RESMOL_FAULTS_OUT"):  # a file of its own for each of pytest-xdist's processes
        file = Path(out) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'rows')}.json"
        file.write_text(json.dumps([asdict(row) for row in made.rows]), encoding="utf-8")


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    """The library that lets disks fail, or the reason why there is none."""
    try:
        return shim_module.build(tmp_path_factory.mktemp("shim"))
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


@pytest.fixture(scope="session")
def forks(shim_library: Path | str) -> Forks:
    """The fork server; the library sleeps in all its children."""
    return Forks(preload=str(shim_library) if isinstance(shim_library, Path) else None)


@pytest.fixture
def shim(shim_library: Path | str, forks: Forks) -> None:
    """Only where a child of ``forks`` can `shim.arm` itself."""
    if isinstance(shim_library, str):
        pytest.skip(f"no faults of the disk: {shim_library}")


@pytest.fixture(scope="session")
def setting(tiny_dataset: Dataset, tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The tiny run that every trial trains."""
    config = tmp_path_factory.mktemp("faults") / "faults.toml"
    config.write_text(FAULT_RUN, encoding="utf-8")
    return Setting(config, tiny_dataset.root, tiny_tokenizer_file)


@pytest.fixture(scope="session")
def oracle(forks: Forks, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The run that nothing happens to; it keeps the state after every step."""
    run = tmp_path_factory.mktemp("oracle") / "run"
    code = forks.run(train_run, run, setting, "checkpoint.every=1", "checkpoint.keep_last=1000")
    assert code == 0
    oracle = Oracle(step_bits(run), checkpoint_digests(run))
    assert set(oracle.steps) == set(oracle.tensors) == set(range(1, STEPS + 1))
    return oracle
