"""A first start that fails leaves nothing that blocks the next one, and what can be refused early is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_equal_runs
from tiny import TrainTiny, synthetic_texts
from torch._dynamo.exc import TorchDynamoException

from resmol.audit.audit import audit
from resmol.config.load import FROM_SCRATCH
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError, DataError, DiskFull, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger
from resmol.train.request import requested_changes
from resmol.train.start import train_model

FAILURES: dict[str, tuple[BaseException, str]] = {
    "no room": (DiskFull("no room", fix=""), "resmol.run.directory.RunDir._check_room"),
    "before the ledger": (OSError("no file"), "resmol.train.start.Ledger"),
    "after its first record": (KeyboardInterrupt(), "resmol.train.start.check_ranks_agree"),
    "in the first step": (ConfigError("no compiler", fix=""), "resmol.train.start.train"),
}


def test_a_start_that_fails_before_it_wrote_anything_leaves_no_directory(tmp_path: Path, train_tiny: TrainTiny) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        train_tiny(tmp_path / "runs" / "run", 1, data=str(tmp_path / "nothing.txt"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("place", FAILURES)
def test_a_failed_first_start_binds_nobody(
    tmp_path: Path, tiny_config: RunConfig, tiny_tokenizer: Tokenizer, place: str
) -> None:
    """Another text, seed, width and compilation may come next; the record begins with them."""
    run, text = RunDir(tmp_path / "run"), tmp_path / "input.txt"
    text.write_text("\n".join(synthetic_texts(60)), encoding="utf-8")
    error, name = FAILURES[place]

    def fail(*_: Any) -> None:
        raise error

    def start(**changes: Any) -> None:
        config = tiny_config.replace({"train.steps": 2, "evaluation.every": 0, "sampling.every": 0} | changes)
        train_model(config, run.path, data=str(text), tokenizer=tiny_tokenizer.path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(type(error)):
            start()
    assert not run.has_begun()
    text.write_text("\n".join(synthetic_texts(80)), encoding="utf-8")
    changed = {"train.seed": 7, "model.hidden_size": 48, "model.intermediate_size": 16}
    start(**changed)
    records = read_ledger(run.ledger).records
    assert [record["kind"] for record in records if record["kind"] in ("start", "step")] == ["start", "step", "step"]
    assert run.load_config().model.hidden_size == 48
    assert run.has_begun()
    with pytest.raises(ConfigError, match="hidden_size"):
        start()
    assert all(check.passed for check in audit(run))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_same_command_or_the_run_alone_goes_on_after_a_failed_start(
    tmp_path: Path, train_tiny: TrainTiny, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmol.train.start.train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "run", 2)
    train_model(None, tmp_path / "run", tokenizer=tiny_tokenizer.path)
    train_tiny(tmp_path / "straight", 2)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight", 2)


def test_what_needs_no_decision_is_refused_before_any(
    tmp_path: Path, tiny_config: RunConfig, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that fills no window, a disk without room, a compiler that does not work."""
    text = tmp_path / "input.txt"
    text.write_text("a few words", encoding="utf-8")
    monkeypatch.setattr("resmol.train.start.decide_auto", lambda _: pytest.fail("decided too early"))

    def start(**changes: Any) -> None:
        train_model(tiny_config.replace(changes), tmp_path / "run", data=str(text), tokenizer=tiny_tokenizer.path)

    with pytest.raises(DataError, match="a window of 16 needs 17"):
        start()
    assert list(tmp_path.iterdir()) == [text], "nothing is left of it"
    monkeypatch.setattr("resmol.train.compiler.compiler_problem", lambda _: "it is broken")
    with pytest.raises(ConfigError, match=r"torch\.compile does not work here: it is broken"):
        start(**{"runtime.compile": "on"})
    monkeypatch.setattr("resmol.run.directory.total_parameters", lambda _: 1 << 50)
    with pytest.raises(DiskFull, match="a checkpoint needs"):
        start()


@pytest.mark.parametrize("compilation", ["auto", "on"])
def test_too_little_memory_is_refused_before_anything_else(
    tmp_path: Path, tiny_config: RunConfig, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, compilation: str
) -> None:
    """Nothing is prepared, compiled or left behind for a run that does not fit."""
    text = tmp_path / "input.txt"
    text.write_text("\n".join(synthetic_texts(60)), encoding="utf-8")
    monkeypatch.setattr("resmol.train.autotune.free_memory", lambda _: 1000)
    monkeypatch.setattr("resmol.train.compiler.compiler_problem", lambda _: pytest.fail("it compiles"))
    monkeypatch.setattr("resmol.train.autotune.compiler_problem", lambda _: pytest.fail("it compiles"))
    config = tiny_config.replace({"runtime.compile": compilation, "train.steps": 1 << 40})
    with pytest.raises(ConfigError, match=r"training needs about 0\.0 GB"):
        train_model(config, tmp_path / "run", data=str(text), tokenizer=tiny_tokenizer.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.txt"]


def test_a_compiler_that_fails_in_a_step_gets_a_sentence(tmp_path: Path, train_tiny: TrainTiny) -> None:
    def fail(*_: Any) -> None:
        raise TorchDynamoException("no header file\n\nand more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmol.train.start.train", fail)
        with pytest.raises(ConfigError) as refused:
            train_tiny(tmp_path / "run", 2)
        assert refused.value.what.endswith("torch.compile does not work here: no header file")
    train_tiny(tmp_path / "run", 2)


@pytest.mark.parametrize("kind", ["step", "save", "rewind", "eval", "sample"])
def test_a_run_has_begun_with_the_first_thing_that_was_done(tmp_path: Path, kind: str) -> None:
    run = RunDir(tmp_path)
    assert not run.has_begun()
    run.ledger.write_bytes(b'{"kind":"start"}\n{"kind":"warn"}\n{"kind":"st')
    assert not run.has_begun()
    for line in (f'{{"kind":"{kind}"}}'.encode(), b"\0\0", b"[]", b"no record"):
        run.ledger.write_bytes(b'{"kind":"start"}\n' + line + b"\n")
        assert run.has_begun(), line
    run.ledger.unlink()
    (run.checkpoints / "tmp-step-00000001-x").mkdir(parents=True)
    (run.checkpoints / ".DS_Store").touch()
    assert not run.has_begun()
    (run.checkpoints / "corrupt-step-00000001-1").mkdir()
    assert run.has_begun()


@pytest.mark.parametrize("operation", ["rename", "ftruncate"])
def test_a_file_system_that_lacks_an_operation_is_refused_before_the_first_step(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """As a bucket that is mounted as a folder."""

    def fail(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(DataError, match="lies on a file system that cannot"):
        RunDir(tmp_path).check_place(tiny_config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_does_not_say_its_size_is_given_the_benefit_of_the_doubt(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", fail)
        RunDir(tmp_path).check_place(tiny_config)
    nothing = os.statvfs_result((0,) * 10)
    monkeypatch.setattr(os, "statvfs", lambda _: nothing)
    RunDir(tmp_path).check_place(tiny_config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf", "pytorch_model.bin"])
def test_a_model_is_no_run(tmp_path: Path, train_tiny: TrainTiny, name: str) -> None:
    """Whoever wants to go on from published weights is told at once what does that."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(b"{}")
    for run in (tmp_path / "model", tmp_path / "model" / name):
        with pytest.raises(UsageError, match="holds a model, not a run") as caught:
            train_tiny(run, 1)
        assert FROM_SCRATCH in caught.value.fix
    assert [path.name for path in (tmp_path / "model").iterdir()] == [name]


def test_a_checkpoint_or_a_file_is_no_run(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 1, "sampling.every=0", "evaluation.every=0")
    with pytest.raises(UsageError, match="is a checkpoint") as caught:
        train_tiny(tmp_path / "run" / "checkpoints" / "step-00000001", 2)
    assert "name its run" in caught.value.fix
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        train_tiny(tmp_path / "notes.txt", 1)


@pytest.mark.parametrize(
    ("name", "said"), [("alice/nano", True), ("runs/nano", False), ("here/nano", False), ("nano", False)]
)
def test_a_folder_that_is_called_like_a_model_on_the_hub_is_said_to_be_a_folder(
    name: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    requested_changes(RunDir(Path(name)), None, [], None)
    assert ("nothing is read from the Hub" in caplog.text) is said
