"""The commit protocol: its order, a crash at every effect, and a disk that is full or says no."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resmol.errors import DiskFull
from resmol.system import atomic_io
from resmol.system.atomic_io import (
    commit_directory,
    fsync_path,
    make_directory,
    remove_directory,
    remove_leftovers,
    write_durable,
)

EFFECTS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink")
PAYLOAD = {"model.safetensors": b"m" * 10_000, "state.json": b"{}"}


class Crash(BaseException):
    """The process dies here; not an Exception, so that nothing swallows it."""


def write_payload(folder: Path) -> None:
    for name, data in PAYLOAD.items():
        (folder / name).write_bytes(data)


def commit(final: Path) -> None:
    def list_files(folder: Path) -> bytes:
        return "\n".join(sorted(file.name for file in folder.iterdir())).encode()

    commit_directory(final, write_payload, list_files)


def descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def is_whole(final: Path) -> bool:
    expected = PAYLOAD | {"manifest.json": "\n".join(sorted(PAYLOAD)).encode()}
    return {file.name: file.read_bytes() for file in final.iterdir()} == expected


def label(path: Any) -> str:
    """Name a path or a descriptor without the random part."""
    name = Path(f"/proc/self/fd/{path}").readlink().name if isinstance(path, int) else Path(os.fsdecode(path)).name
    return "TEMPORARY" if name.startswith("tmp-") else name


def close(result: Any) -> None:
    """Close what a dying process would have held open."""
    if isinstance(result, int):
        os.close(result)
    elif result is not None:
        result.close()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, on_effect: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``on_effect`` before and after every effect on the disk, and list the effects."""
    effects: list[str] = []

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            paths = arguments[:2] if name in ("rename", "replace") else arguments[:1]
            effects.append(f"{name} {' '.join(label(path) for path in paths)}")
            on_effect("before")
            result = real(*arguments, **options)
            try:
                on_effect("after")
            except BaseException:
                close(result)
                raise
            return result

        return call

    with monkeypatch.context() as patch:
        for name in EFFECTS:
            patch.setattr(os, name, watch(name, getattr(os, name)))
        patch.setattr(io, "open", watch("create", io.open))  # what Path.open and Path.write_bytes call
        yield effects


def ignore(_when: str) -> None:
    return None


class CrashAt:
    """Raises at the n-th moment, before or after an effect; a dead process has no effects afterwards."""

    def __init__(self, moment: int, *, dead: bool = True) -> None:
        self.left, self.dead = moment, dead

    def __call__(self, _when: str) -> None:
        self.left -= 1
        if self.left == -1 or (self.dead and self.left < 0):
            raise Crash


# --- the order ----------------------------------------------------------------------------------------------


def test_the_commit_follows_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, ignore) as effects:
        commit(tmp_path / "step-00000005")
    assert [effect for effect in effects if not effect.startswith("open")] == [
        "mkdir TEMPORARY",
        "create model.safetensors",
        "create state.json",
        "fsync model.safetensors",
        "fsync state.json",
        "create manifest.json",
        "fsync manifest.json",
        "fsync TEMPORARY",
        "rename TEMPORARY step-00000005",
        f"fsync {tmp_path.name}",
    ]
    assert is_whole(tmp_path / "step-00000005")


def test_a_new_directory_is_entered_in_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, ignore) as effects:
        make_directory(tmp_path / "runs" / "one")
        make_directory(tmp_path / "runs" / "one")
    synced = [effect for effect in effects if effect.startswith("fsync")]
    assert synced == ["fsync runs", f"fsync {tmp_path.name}"]


def test_a_file_is_replaced_by_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, ignore) as effects:
        write_durable(tmp_path / "config.toml", b"new")
    assert [effect for effect in effects if not effect.startswith("open")] == [
        "create TEMPORARY",
        "fsync TEMPORARY",
        "replace TEMPORARY config.toml",
        f"fsync {tmp_path.name}",
    ]


def test_a_directory_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path / "step-00000005")
    with watched(monkeypatch, ignore) as effects:
        remove_directory(tmp_path / "step-00000005")
    changes = [effect for effect in effects if not effect.startswith("open")]
    assert changes[:2] == ["rename step-00000005 TEMPORARY", f"fsync {tmp_path.name}"]
    assert sorted(changes[2:]) == [
        "rmdir TEMPORARY", "unlink manifest.json", "unlink model.safetensors", "unlink state.json",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# --- a crash at every moment --------------------------------------------------------------------------------


def moments(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> int:
    with watched(monkeypatch, ignore) as effects:
        action()
    assert len(effects) >= 4
    return 2 * len(effects)


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "raised"])
def test_a_commit_that_crashes_anywhere_leaves_all_or_nothing(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rehearsal").mkdir()
    count = moments(monkeypatch, lambda: commit(tmp_path / "rehearsal" / "step-00000010"))
    seen = set()
    for moment in range(count):
        folder = tmp_path / str(moment)
        folder.mkdir()
        commit(folder / "step-00000005")
        with watched(monkeypatch, CrashAt(moment, dead=dead)), pytest.raises(Crash):
            commit(folder / "step-00000010")
        committed = sorted(path.name for path in folder.iterdir() if not path.name.startswith("tmp-"))
        assert committed[0] == "step-00000005"
        assert all(is_whole(folder / name) for name in committed)
        seen.add(len(committed))
        assert bool(remove_leftovers(folder)) <= dead
        assert sorted(path.name for path in folder.iterdir()) == committed
    assert seen == {1, 2}


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "raised"])
def test_a_write_that_crashes_anywhere_leaves_the_old_or_the_new(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    count = moments(monkeypatch, lambda: write_durable(path, b"old"))
    seen = set()
    for moment in range(count):
        path.write_bytes(b"old")
        with watched(monkeypatch, CrashAt(moment, dead=dead)), pytest.raises(Crash):
            write_durable(path, b"new")
        seen.add(path.read_bytes())
        assert bool(remove_leftovers(tmp_path)) <= dead
    assert seen == {b"old", b"new"}


def test_a_removal_that_crashes_anywhere_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rehearsal").mkdir()
    commit(tmp_path / "rehearsal" / "step-00000005")
    count = moments(monkeypatch, lambda: remove_directory(tmp_path / "rehearsal" / "step-00000005"))
    for moment in range(count):
        folder = tmp_path / str(moment)
        folder.mkdir()
        commit(folder / "step-00000005")
        with watched(monkeypatch, CrashAt(moment)), pytest.raises(Crash):
            remove_directory(folder / "step-00000005")
        for path in folder.glob("step-*"):
            assert is_whole(path)
        remove_leftovers(folder)
        assert all(is_whole(path) for path in folder.iterdir())


# --- a disk that says no ------------------------------------------------------------------------------------


class FailsAt:
    """Raises an OSError before the n-th effect, once."""

    def __init__(self, number: int, code: int) -> None:
        self.left, self.code = number, code

    def __call__(self, when: str) -> None:
        if when == "before":
            self.left -= 1
            if self.left == -1:
                raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_commit_that_fails_anywhere_leaves_nothing_new(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rehearsal").mkdir()
    with watched(monkeypatch, ignore) as effects:
        commit(tmp_path / "rehearsal" / "step-00000010")
    before_rename = next(number for number, effect in enumerate(effects) if effect.startswith("rename"))
    for number in range(before_rename + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        commit(folder / "step-00000005")
        expected = OSError if code == errno.EIO else DiskFull
        with watched(monkeypatch, FailsAt(number, code)), pytest.raises(expected) as caught:
            commit(folder / "step-00000010")
        if isinstance(caught.value, DiskFull):
            assert "step-00000010 was not written" in caught.value.what
            assert caught.value.exit_code == 28
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]
        assert is_whole(folder / "step-00000005")
        commit(folder / "step-00000010")  # a fresh attempt in a fresh directory is possible
        assert is_whole(folder / "step-00000010")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_anywhere_keeps_the_old(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"old")
    for number in range(3):  # create, fsync, replace
        expected = DiskFull if code == errno.ENOSPC else OSError
        with watched(monkeypatch, FailsAt(number, code)), pytest.raises(expected):
            write_durable(path, b"new")
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("config.toml", b"old")]


def test_no_file_is_synced_again_after_its_sync_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may drop the dirty pages and report success the second time: a retry would be a lie."""
    real, failed = os.fsync, []

    def fail_once_for_the_payload(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        assert inode not in failed
        if not failed and label(descriptor) == "state.json":
            failed.append(inode)
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once_for_the_payload)
    with pytest.raises(OSError, match="Input/output"):
        commit(tmp_path / "step-00000005")
    assert list(tmp_path.iterdir()) == []
    keep_the_inode = tmp_path / "placeholder"
    keep_the_inode.write_bytes(b"")
    failed[0] = -1  # the inode may be used again by the fresh attempt
    commit(tmp_path / "step-00000005")
    assert is_whole(tmp_path / "step-00000005")


def test_an_error_while_writing_the_payload_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyError

    with pytest.raises(KeyError):
        commit_directory(tmp_path / "step-00000005", fail, lambda _folder: b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write_to_a_full_device(_folder: Path) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    with pytest.raises(DiskFull, match="the disk is full"):
        commit_directory(tmp_path / "step-00000005", write_to_a_full_device, lambda _folder: b"{}")


def test_a_committed_directory_is_never_written_over(tmp_path: Path) -> None:
    commit(tmp_path / "step-00000005")
    with pytest.raises(OSError, match="not empty"):
        commit_directory(tmp_path / "step-00000005", lambda _folder: None, lambda _folder: b"other")
    assert is_whole(tmp_path / "step-00000005")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


# --- leftovers ----------------------------------------------------------------------------------------------


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = {"step-00000005", "step-12.bak", "foo-step-99", "nottmp-1", ".tmp-1", "elsewhere"}
    for name in [*kept, *(f"tmp-step-{number}" for number in range(50))]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / "tmp-file").write_bytes(b"x")
    (tmp_path / "tmp-link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    removed = remove_leftovers(tmp_path)
    assert sorted(removed) == sorted([*(f"tmp-step-{number}" for number in range(50)), "tmp-file", "tmp-link"])
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "elsewhere" / "file").is_file()


def test_there_is_nothing_to_sweep_where_there_is_nothing(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_an_fsync_that_fails_closes_its_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = descriptors()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        fsync_path(tmp_path)
    assert descriptors() == before


def test_what_cannot_be_removed_yet_is_left_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """As on NFS, where the file that a reader has open stays in the folder until it is closed."""
    final = tmp_path / "final"
    final.mkdir()
    write_payload(final)
    real = os.unlink

    def busy(path: Any, *arguments: Any, **options: Any) -> None:
        if os.fsdecode(path).endswith("state.json"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        remove_directory(final)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("tmp-final-")
    assert [file.name for file in left.iterdir()] == ["state.json"]
    assert messages == [f"{left} could not be removed whole; the next start tries again"]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_that_cannot_sync_directories_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], number: int
) -> None:
    """As CIFS and some FUSE mounts; a file that cannot be synced stays an error, and so does a disk that fails."""
    real = os.fsync
    atomic_io._log_no_directory_sync.cache_clear()

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir() is directories:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    directories = True
    commit(tmp_path / "one")
    write_durable(tmp_path / "two", b"x")
    make_directory(tmp_path / "three" / "four")
    assert is_whole(tmp_path / "one")
    assert len(messages) == 1
    assert f"cannot sync directories ({os.strerror(number)})" in messages[0]
    directories = False
    with pytest.raises(OSError, match=os.strerror(number)):
        commit(tmp_path / "five")
    directories, number = True, errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        commit(tmp_path / "six")
