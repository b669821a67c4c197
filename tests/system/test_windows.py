"""The other side of what is POSIX: a run on what looks like Windows (tests/windows), and what differs there."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import TrainTiny, synthetic_texts
from waiting import HANGS, until

from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import RunInUse
from resmol.run.checkpoint_manifest import list_checkpoints, read_manifest
from resmol.run.directory import RunDir
from resmol.run.ledger import comparable_steps, read_ledger, scan
from resmol.run.retention import prune
from resmol.system import atomic_io, locks, user_paths
from resmol.system.locks import exclusive_lock, kept_while_read

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = """
import json, sys
from resmol.__main__ import run
for words in json.loads(sys.argv[1]):
    if code := run(words, debug=False):
        sys.exit(code)
"""


def on_windows(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a program that sees such a system."""
    places = os.pathsep.join([str(ROOT / "tests" / "windows"), str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": places, "RESMOL_TEST_SYSTEM": "windows", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**environment, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
    )  # fmt: skip


def output_of(code: str, *arguments: str, **variables: str) -> str:
    """Return what a program prints that sees such a system, and ends well."""
    process = on_windows(code, *arguments, **variables)
    out, error = process.communicate(timeout=HANGS)
    assert process.returncode == 0, error
    return out


def commands(*lines: list[str]) -> subprocess.Popen[str]:
    return on_windows(COMMANDS, json.dumps(lines))


def test_it_prepares_trains_stops_goes_on_generates_and_audits_with_the_same_bits(
    tiny_config: RunConfig, tiny_tokenizer: Tokenizer, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
    (tmp_path / "text").mkdir()
    for number, text in enumerate(synthetic_texts(60)):
        (tmp_path / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    run, tokenizer = tmp_path / "run", ["--tokenizer", str(tiny_tokenizer.path)]
    hashed = ["--tokenizer-sha256", tiny_tokenizer.sha256]
    text = ["--input", str(tmp_path / "text"), "--val-fraction", "0.1"]
    train = ["train", str(run), *tokenizer, "--set", "checkpoint.keep_last=2"]
    first = commands(
        ["prepare", str(tmp_path / "data"), *text, *tokenizer, *hashed],
        [*train, "--config", str(tmp_path / "config.toml"), "--data", str(tmp_path / "data"), "--steps", "1000000"],
    )
    ledger = RunDir(run).ledger
    until(lambda: sum(1 for _ in scan(ledger, "step")) > 12 or first.poll() is not None, "12 steps")
    first.send_signal(signal.SIGUSR2)  # which stands for SIGBREAK
    _, error = first.communicate(timeout=HANGS)
    assert first.returncode == 128 + signal.SIGUSR2, error
    last = max(record["step"] for record in scan(RunDir(run).ledger, "step")) + 9
    second = commands(
        [*train, "--steps", str(last)],
        ["generate", str(run), "--prompt", "ka", "--max-new-tokens", "3"],
        ["audit", str(run), "--replay", "1"],
    )
    _, error = second.communicate(timeout=HANGS)
    assert second.returncode == 0, error
    here = tmp_path / "here"
    train_tiny(here, last, data=str(tmp_path / "data"))
    bits = [
        {
            step: record["loss_bits"]
            for step, record in comparable_steps(read_ledger(path / "ledger.jsonl").records).items()
        }
        for path in (run, here)
    ]
    assert bits[0] == bits[1]
    files = [read_manifest(list_checkpoints(path / "checkpoints")[0]).files for path in (run, here)]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]
    assert files[0]["optimizer.safetensors"] == files[1]["optimizer.safetensors"]
    assert len(list_checkpoints(run / "checkpoints")) == 2, "older ones were removed"
    again = output_of(
        COMMANDS, json.dumps([["prepare", str(tmp_path / "again"), *text, *tokenizer, *hashed, "--json"]])
    )
    assert json.loads(again)["fingerprint"] == open_dataset(tmp_path / "data").fingerprint


# --- an open file ---------------------------------------------------------------------------------------------


@pytest.fixture
def open_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system where nothing can be renamed that somebody has open, and nobody waits for that to end."""
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        opened = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
        if any(file.startswith(f"{source}{os.sep}") for file in opened):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(locks, "OPEN_FILES_STAY", True)
    monkeypatch.setattr(atomic_io, "OPEN_FILES_STAY", True)
    monkeypatch.setattr(atomic_io, "RENAME_PATIENCE_SECONDS", 0.0)


@pytest.mark.usefixtures("open_files_stay")
def test_a_checkpoint_that_is_being_read_stays_until_the_next_time(train_tiny: TrainTiny, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train_tiny(run.path, 15)
    oldest = list_checkpoints(run.checkpoints)[-1]
    with kept_while_read(oldest / "manifest.json"):
        assert prune(run.checkpoints, keep_last=1) == ["step-00000010"]
        assert oldest.is_dir()
    assert prune(run.checkpoints, keep_last=1) == ["step-00000005"]


def test_a_rename_waits_for_a_scanner_that_looks_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, real = iter([True, True]), os.replace

    def replace(source: Path, target: Path) -> None:
        if next(refusals, False):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        atomic_io.write_durable(tmp_path / "file", b"here a permission stays missing")
    monkeypatch.setattr(atomic_io, "OPEN_FILES_STAY", True)
    atomic_io.write_durable(tmp_path / "file", b"there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class _BehindTheLockedByte(io.FileIO):
    """A file whose first byte nobody may read or write: Windows locks it for all other handles."""

    def readinto(self, buffer: Any) -> int:
        self._require_behind()
        return super().readinto(buffer)

    def read(self, size: int = -1) -> bytes:
        self._require_behind()
        return super().read(size)

    def write(self, content: Any) -> int:
        self._require_behind()
        return super().write(content)

    def _require_behind(self) -> None:
        if self.tell() == 0:
            raise PermissionError(errno.EACCES, "The process cannot access the file: a portion of it is locked")


def test_the_byte_that_is_locked_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_beside_the_lock(path: Path, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        file = _BehindTheLockedByte(path, mode)
        if buffering == 0:
            return file
        return io.BufferedRandom(file) if "+" in mode else io.BufferedReader(file)

    monkeypatch.setattr(Path, "open", open_beside_the_lock)
    lock, owner = tmp_path / "lock", f"process {os.getpid()} on"
    with exclusive_lock(lock), pytest.raises(RunInUse, match=owner), exclusive_lock(lock):
        pass


# --- disks ----------------------------------------------------------------------------------------------------


def module_of(system: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return system/atomic_io.py as another system imports it."""
    monkeypatch.setattr(sys, "platform", system)
    spec = importlib.util.spec_from_file_location(f"atomic_io_of_{system}", str(atomic_io.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_windows_a_file_is_flushed_that_is_open_for_writing_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    opened: list[tuple[str, int]] = []
    real = os.open

    def watched(path: Path, flags: int, *more: Any, **rest: Any) -> int:
        opened.append((Path(path).name, flags & os.O_ACCMODE))
        return real(path, flags, *more, **rest)

    monkeypatch.setattr(os, "open", watched)
    module_of("win32", monkeypatch).write_durable(tmp_path / "file", b"x")
    module_of("win32", monkeypatch).fsync_path(tmp_path / "file")
    assert opened == [("file", os.O_RDWR)]
    assert messages == []


@pytest.mark.parametrize("answer", [None, errno.ENOTSUP, errno.EIO])
def test_on_macos_the_cache_of_the_drive_is_flushed_as_well(
    answer: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def control(_descriptor: int, operation: int) -> None:
        done.append(operation)
        if answer is not None:
            raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    module, file = module_of("darwin", monkeypatch), tmp_path / "file"
    file.touch()
    if answer == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            module.fsync_path(file)
    else:
        module.fsync_path(file)
    assert done == ([51, "fsync"] if answer == errno.ENOTSUP else [51])


# --- paths and streams ----------------------------------------------------------------------------------------


def test_a_path_on_another_drive_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def relpath(_path: str) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    assert user_paths.short_path(str(Path.cwd() / "a" / "b")) == str(Path("a") / "b")
    monkeypatch.setattr(os.path, "relpath", relpath)
    assert user_paths.short_path("D:\\runs\\a") == "D:\\runs\\a"


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_an_encoding_that_lacks_characters_costs_characters_only(encoding: str) -> None:
    """A pipe on Windows has the code page of the system."""
    words = ["inspect", "nano"]
    main = "import sys; from resmol.__main__ import main; main(sys.argv[1:])"
    assert "parameters" in output_of(main, *words, PYTHONIOENCODING=encoding)
    assert json.loads(output_of(main, *words, "--json", PYTHONIOENCODING=encoding))["parameters"]
