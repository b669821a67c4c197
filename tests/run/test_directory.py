"""Which files a run has, and which directories are a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from resmol.errors import DataError
from resmol.run.directory import RunDir
from resmol.run.ledger import GENESIS, canonical


def test_a_directory_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not run.exists()
    with pytest.raises(DataError, match="is not a run directory"):
        run.require()
    run.config.write_text("")
    assert run.exists()
    run.require()


def test_a_run_of_another_format_is_named_with_the_version_that_reads_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text('[runtime]\nproducts = "blas"\n')
    start = {"seq": 1, "prev": GENESIS, "time": "", "kind": "start", "format": 1, "version": "0.1.0"}
    run.ledger.write_bytes(canonical(start) + b"\n")
    with pytest.raises(
        DataError, match=r"written by resmol 0\.1\.0 \(format 1\); this version reads format 2"
    ) as refused:
        run.load_config()
    assert "use resmol 0.1.0 for it" in refused.value.fix


@pytest.mark.parametrize("content", [b"", b"{}", b"[]\n", b"\xff\n", b"x" * 2_000_000, b"[" * 100_000])
def test_a_ledger_without_a_first_record_states_no_format(content: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("")
    run.require()
    run.ledger.write_bytes(content)
    run.require()


def test_every_file_of_a_run_lies_in_its_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = [name for name, member in vars(RunDir).items() if isinstance(member, property)]
    paths = {name: getattr(run, name) for name in names}
    assert {path.parent for path in paths.values()} == {tmp_path, run.evidence}
    assert run.evidence.parent == tmp_path
    assert len({path.name for path in paths.values()}) == len(names)
    assert {paths[name].name for name in ("config", "ledger", "log", "checkpoints", "report")} == {
        "config.toml", "ledger.jsonl", "train.log", "checkpoints", "report.html",
    }  # fmt: skip
