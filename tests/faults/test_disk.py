"""Rows S1 to S7: disks that are full, slow, broken, read-only or gone, and directories with things left over."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import drills
import pytest
import shim
from campaign import Campaign
from trials import INTERVAL, STEPS, TENSOR_FILES, Forks, Oracle, Setting, command, error_of, finish, step_bits

import resmol.run.checkpoint
import resmol.train.loop
from resmol.errors import CheckpointError, DiskFull, ResmolError, RunInUse
from resmol.run.checkpoint_manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    checkpoint_name,
    list_checkpoints,
    open_checkpoint,
    read_manifest,
    step_of,
)
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.system.locks import exclusive_lock

DATA_OR_DISK = 3  # the exit code of an error that comes from the operating system
# A save may fail in the background while later steps are executed, but the next save waits for it.
LOST_AT_MOST = 2 * INTERVAL


@contextmanager
def own_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system of its own at ``folder``, with these options; skip where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a disk: {mounted.stderr.decode(errors='replace').strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the options of a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def reached(run: Path) -> int:
    """Return the last step that a run's ledger has; 0 where there is none."""
    return max(step_bits(run), default=0) if RunDir(run).ledger.exists() else 0


def damage_done(run: Path, lost: int = LOST_AT_MOST) -> list[str]:
    """Look at what a failed process left: every checkpoint whole, nothing half, not more than ``lost`` steps gone."""
    checkpoints, problems = list_checkpoints(RunDir(run).checkpoints), []
    for path in checkpoints:
        try:
            open_checkpoint(path).verify()
        except CheckpointError as error:
            problems.append(error.what)
    newest = step_of(checkpoints[0]) if checkpoints else 0
    if reached(run) - newest > lost:
        problems.append(f"step {reached(run)} was reached, and the newest checkpoint is that of step {newest}")
    saved = read_ledger(RunDir(run).ledger).records if RunDir(run).ledger.exists() else []
    acknowledged = max((record["step"] for record in select(saved, "save")), default=0)
    if newest < acknowledged:
        problems.append(f"step {acknowledged} was saved, and the newest checkpoint is that of step {newest}")
    return problems + [f"left behind: {path.name}" for path in run.rglob("tmp-*")]


def goes_on(forks: Forks, run: Path, setting: Setting, oracle: Oracle) -> list[str]:
    """Start the run again, the fault being mended: it must come to its end, as if nothing had happened."""
    code = forks.run(command, run, setting)
    if code != 0:
        return [f"started again: exit code {code}: {error_of(run).strip()}"]
    return [*oracle.differences(run), *([] if reached(run) == STEPS else ["the run is not complete"])]


# --- S1: no room -------------------------------------------------------------------------------------------------


def checkpoint_bytes(forks: Forks, setting: Setting, folder: Path) -> int:
    """Return the size of a checkpoint."""
    assert forks.run(command, folder / "whole", setting, "--steps", "1") == 0
    return read_manifest(RunDir(folder / "whole").checkpoints / checkpoint_name(1)).bytes


def test_s1_disk_full(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """Disks for less than one checkpoint up to more than all that is ever kept."""
    count, problems, codes = campaign.count(4, 20), [], []
    size = checkpoint_bytes(forks, setting, tmp_path)
    for trial in range(count):
        share = 0.5 + 4.5 * trial / (count - 1)
        with own_disk(tmp_path / f"run-{trial}", f"size={int(share * size)}") as run:
            code = forks.run(command, run, setting)
            codes.append(code)
            found = damage_done(run)
            if code not in (0, DiskFull.exit_code):
                found.append(f"exit code {code}: {error_of(run)}")
            if code == DiskFull.exit_code and not re.search(r"needs [\d,]+ bytes", error_of(run)):
                found.append(f"the message does not say how many bytes are needed: {error_of(run)}")
            if share < 1 and reached(run):
                found.append("training began, and there is no room for a checkpoint")
            if share > 2.2 and code != 0:  # two checkpoints and the small files: pruning makes enough room
                found.append(f"exit code {code}, and there is room for two checkpoints")
            remount(run, "size=64m")
            found += goes_on(forks, run, setting, oracle)
            problems += [f"disk for {share:.1f} checkpoints: {text}" for text in found[:1]]
    assert {0, DiskFull.exit_code} <= set(codes), codes
    campaign.record(
        "S1", "disk full: room for 0.5 to 5 checkpoints", "exit 28 with the bytes needed, or pruned and gone on",
        problems, count, note=f"{codes.count(DiskFull.exit_code)} stopped with exit code 28",
    )  # fmt: skip


def command_with_limit(limit: int, run: Path, setting: Setting) -> int:
    """Train where no file may be larger than ``limit``: what `ulimit -f` does, and a quota much the same."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return command(run, setting)


def test_s1_files_must_stay_small(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """The same without a disk of one's own: the tokenizer, the ledger, the weights or the moments are too large."""
    count, draw, problems = campaign.count(2, 20), campaign.draw("S1"), []
    size = checkpoint_bytes(forks, setting, tmp_path)
    for trial in range(count):
        run, limit = tmp_path / f"run-{trial}", int(10 ** draw.uniform(4, 5.7))
        code = forks.run(command_with_limit, min(limit, size // 2), run, setting)
        found = damage_done(run)
        if code != DiskFull.exit_code:
            found.append(f"exit code {code}: {error_of(run)}")
        found += goes_on(forks, run, setting, oracle)
        problems += [f"files up to {limit:,} bytes: {text}" for text in found[:1]]
    campaign.record(
        "S1f", "files may not grow any more (`ulimit -f`)", "exit 28, the same bits once they may", problems, count
    )


# --- S2, S3: calls that fail -------------------------------------------------------------------------------------


def in_fork(function: Callable[[], str]) -> str:
    """Call ``function`` in a fork of this process and return what it returns."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writer, function().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(process, 0)
    return said or "died"


def outcome(run: Path, tools: drills.Equipment, script: drills.Script, **fault: Any) -> str:
    """Play a script with a fault armed; return "done" or the error, and how many calls counted."""

    def play() -> str:
        shim.arm(run.parent, **fault)
        try:
            drills.open_run(run, tools, script)
        except DiskFull as error:
            said = f"full: {error.what}"
        except (OSError, ResmolError) as error:
            said = f"error: {error}"
        else:
            said = "done"
        return f"{shim.disarm()} {said}"

    return in_fork(play)


def prepared(folder: Path, tools: drills.Equipment) -> Path:
    """Return a run with two checkpoints, in a folder of its own."""
    folder.mkdir()
    drills.open_run(folder / "run", tools, drills.saves(5, 10))
    return folder / "run"


def copy_of(run: Path, folder: Path) -> Path:
    """Copy a run into a folder of its own."""
    shutil.copytree(run.parent, folder)
    return folder / "run"


def failing_writes(out: Path, setting: Setting, folder: Path, share: int) -> int:
    """Let each write of a resumption, of a save and of one more fail, be cut short or be interrupted."""
    tools, problems, tried = drills.equipment(setting), [], 0
    template, script = prepared(folder / "template", tools), drills.saves(15, 20)
    outcome(copy_of(template, folder / "count"), tools, script, mode="count", log=folder / "count.log")
    paths = [Path(o.path).name for o in shim.read_log(folder / "count.log") if o.kind == "write"]
    ways: dict[str, dict[str, Any]] = {
        **{name: {"mode": "fail", "errno": getattr(errno, name)} for name in ("ENOSPC", "EIO", "EINTR")},
        "always ENOSPC": {"mode": "fail", "errno": errno.ENOSPC, "until": shim.EVER},
        "one byte": {"mode": "short"},
        "always one byte": {"mode": "short", "until": shim.EVER},
    }
    for point, (way, k) in enumerate((way, k) for way in ways for k in range(1, len(paths) + 1)):
        if point % share or (way == "always one byte" and k != 1):
            continue
        run = copy_of(template, folder / f"point-{point}")
        _, said = outcome(run, tools, script, kinds=("write",), k=k, **ways[way]).split(" ", 1)
        acknowledged = max(r["step"] for r in select(read_ledger(RunDir(run).ledger).records, "save"))
        found = []
        if said == "done" and acknowledged != 20:
            found.append(f"ended without an error, and step {acknowledged} is the last one saved")
        if said != "done" and way in ("EINTR", "one byte", "always one byte"):
            found.append(f"gave up: {said}")
        lost = way == "always ENOSPC" or (way == "EIO" and paths[k - 1] != "train.log")  # a view may fail
        if (said == "done" and lost) or said == "died":
            found.append(f"ended as {said}")
        if "ENOSPC" in way and not said.startswith(("full", "done")):
            found.append(f"the disk is full, and it says {said}")
        _, wrong = drills.read(run, tools, acknowledged)
        problems += [f"{way} at write {k}: {text}" for text in (found + wrong)[:1]]
        shutil.rmtree(run.parent)
        tried += 1
    out.write_text(json.dumps([tried, len(paths), problems]))
    return 0


def test_s2_failing_writes(campaign: Campaign, forks: Forks, shim: None, setting: Setting, tmp_path: Path) -> None:
    share, out = campaign.count(13, 1), tmp_path / "out.json"
    assert finish(forks.start(failing_writes, out, setting, tmp_path, share), timeout=600) == 0
    tried, calls, problems = json.loads(out.read_text())
    campaign.record(
        "S2", "a write fails (ENOSPC, EIO), is interrupted or writes one byte",
        "no false success, short writes completed", problems, tried, exhaustive=share == 1, note=f"{calls} writes",
    )  # fmt: skip


def commits(operations: Sequence[shim.Operation]) -> list[str]:
    """Return the names under which checkpoints were committed in a log."""
    return [Path(o.to).name for o in operations if o.kind == "rename" and Path(o.to).name.startswith("step-")]


def unsynced_commits(operations: Sequence[shim.Operation]) -> list[str]:
    """Return what was committed although a file of that very directory was never synced."""
    problems, synced, created = [], set[str](), set[str]()
    for operation in operations:
        if operation.kind == "fsync":
            synced.add(operation.path)
        elif operation.kind == "mkdir":
            if operation.path in created:
                problems.append(f"{operation.path} was used again")
            created.add(operation.path)
        elif operation.kind == "rmdir" and Path(operation.path).name == "run":
            created.discard(operation.path)  # a start that failed before it wrote anything
        elif operation.kind == "rename" and Path(operation.to).name.startswith("step-"):
            names = (*TENSOR_FILES, CONFIG, STATE, MANIFEST)
            wanted = {operation.path, *(f"{operation.path}/{name}" for name in names)}
            problems += [f"{path} was committed unsynced" for path in sorted(wanted - synced)]
    return problems


def failing_syncs(out: Path, setting: Setting, folder: Path, share: int) -> int:
    """Let each fsync of a new run and of three saves, the last of which prunes, fail."""
    tools, problems, tried = drills.equipment(setting), [], 0
    script = drills.saves(5, 10, 15)
    (folder / "count").mkdir()
    outcome(folder / "count" / "run", tools, script, mode="count", log=folder / "count.log")
    healthy = shim.read_log(folder / "count.log")
    syncs = [number for number, operation in enumerate(healthy) if operation.kind == "fsync"]
    ways: dict[str, dict[str, Any]] = {
        "EIO": {"errno": errno.EIO},
        "EIO from then on": {"errno": errno.EIO, "until": shim.EVER},
        "ENOSPC": {"errno": errno.ENOSPC},
    }
    for point, (way, k) in enumerate((way, k) for way in ways for k in range(1, len(syncs) + 1)):
        if point % share:
            continue
        run, log = folder / f"point-{point}" / "run", folder / f"log-{point}"
        run.parent.mkdir()
        _, said = outcome(run, tools, script, mode="fail", kinds=("fsync",), k=k, log=log, **ways[way]).split(" ", 1)
        operations = shim.read_log(log) if log.exists() else []
        found = unsynced_commits(operations)
        before = commits(healthy[: syncs[k - 1]])
        if way != "ENOSPC" and commits(operations) != before:  # a full disk may be made less full, and tried again
            found.append(f"committed {commits(operations)}; before the error these were {before}")
        if way != "ENOSPC" and not said.startswith("error"):
            found.append(f"ended as {said}")
        recorded = read_ledger(RunDir(run).ledger).records if RunDir(run).ledger.exists() else []
        acknowledged = max((r["step"] for r in select(recorded, "save")), default=0)
        again = log.with_suffix(".again")
        second = outcome(run, tools, script, mode="count", log=again).split(" ", 1)[1]
        both = [*operations, *(shim.read_log(again) if again.exists() else [])]
        found += [] if second == "done" else [f"started again: {second}"]
        found += unsynced_commits(both)
        found += drills.read(run, tools, max(15, acknowledged))[1]
        problems += [f"{way} at fsync {k} ({Path(healthy[syncs[k - 1]].path).name}): {text}" for text in found[:1]]
        shutil.rmtree(run.parent)
        tried += 1
    out.write_text(json.dumps([tried, len(syncs), problems]))
    return 0


def test_s3_failing_fsync(campaign: Campaign, forks: Forks, shim: None, setting: Setting, tmp_path: Path) -> None:
    share, out = campaign.count(7, 1), tmp_path / "out.json"
    assert finish(forks.start(failing_syncs, out, setting, tmp_path, share), timeout=600) == 0
    tried, calls, problems = json.loads(out.read_text())
    campaign.record(
        "S3", "an fsync fails", "nothing is committed after it; the next save is in a directory of its own",
        problems, tried, exhaustive=share == 1, note=f"{calls} calls",
    )  # fmt: skip


# --- S4: nothing can be written ----------------------------------------------------------------------------------


def without_privileges(run: Path, setting: Setting) -> int:
    """Train as a user to whom permissions apply, which they do not for root."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
    return command(run, setting)


def begun(forks: Forks, run: Path, setting: Setting) -> None:
    """Bring a run to step 20."""
    assert forks.run(command, run, setting, "--steps", "20") == 0


def fails_at_once(
    forks: Forks, run: Path, setting: Setting, how: Callable[[Path, Setting], int], times: list[float]
) -> list[str]:
    """Start a run where it cannot be written: it must say so before it executes a step."""
    before, started = reached(run), time.perf_counter()
    code = forks.run(how, run, setting)
    times.append(time.perf_counter() - started)
    found = [] if code in (DATA_OR_DISK, DiskFull.exit_code) else [f"exit code {code}"]
    found += [] if reached(run) == before else [f"steps {before + 1} to {reached(run)} were executed"]
    message = error_of(run)
    return found + ([] if "error: " in message and "internal" not in message else [f"it says {message!r}"])


def test_s4_cannot_be_written(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Directories without the permission to write, and disks that are read-only or have no inodes left."""
    problems: list[str] = []
    times: list[float] = []

    def judge(name: str, run: Path, how: Callable[[Path, Setting], int], mend: Callable[[], object]) -> None:
        found = fails_at_once(forks, run, setting, how, times)
        mend()
        found += goes_on(forks, run, setting, oracle)
        problems.extend(f"{name}: {text}" for text in found[:1])

    for name, place in (("run", "."), ("checkpoints", "checkpoints"), ("ledger", "ledger.jsonl")):
        run = tmp_path / f"locked-{name}"
        begun(forks, run, setting)
        target, permissions = run / place, (run / place).stat().st_mode
        target.chmod(permissions & ~0o222)
        judge(f"{name} not writable", run, without_privileges, lambda t=target, p=permissions: t.chmod(p))
    parent = tmp_path / "locked-parent"
    parent.mkdir()
    run = parent / "run"
    (parent / "run.error").touch()
    parent.chmod(0o500)
    judge("parent not writable", run, without_privileges, lambda: parent.chmod(0o700))

    with own_disk(tmp_path / "read-only", "size=64m") as run:
        begun(forks, run, setting)
        remount(run, "ro")
        judge("remounted read-only", run, command, lambda: remount(run, "rw"))
    with own_disk(tmp_path / "read-only-new", "size=64m") as run:
        remount(run, "ro")
        judge("read-only from the start", run, command, lambda: remount(run, "rw"))
    for inodes in (3, 8, 12):
        with own_disk(tmp_path / f"inodes-{inodes}", f"size=64m,nr_inodes={inodes}") as run:
            judge(f"{inodes} inodes", run, command, lambda run=run: remount(run, "nr_inodes=10000"))
    with own_disk(tmp_path / "inodes-22", "size=64m,nr_inodes=22") as run:  # room for two checkpoints: pruned, goes on
        code = forks.run(command, run, setting)
        found = [f"exit code {code}"] if code not in (0, DiskFull.exit_code) else []
        found += damage_done(run)
        remount(run, "nr_inodes=10000")
        found += goes_on(forks, run, setting, oracle)
        problems.extend(f"22 inodes: {text}" for text in found[:1])
    if campaign.full and max(times) > 2:
        problems.append(f"it took {max(times):.1f} s to fail")
    campaign.record(
        "S4", "read-only disk, no permission, no inodes", "fails before the first step, in at most 2 s",
        problems, len(times) + 1, exhaustive=True, note=f"at most {max(times):.2f} s" if campaign.full else "",
    )  # fmt: skip


# --- S5: the run directory is gone -------------------------------------------------------------------------------


def take_away(what: str, run: Path, setting: Setting) -> int:
    """Train; in the middle of it somebody moves the run away, deletes it, or puts another one in its place."""
    real = resmol.train.loop.record_step

    def record(session: Any, result: Any, seconds: float) -> None:
        real(session, result, seconds)
        if result.step == 12:
            session.checkpointer.wait_until_finished()
            run.rename(run.with_name("moved"))
            if what == "deleted":
                shutil.rmtree(run.with_name("moved"))
            if what == "replaced":
                shutil.copytree(run.with_name("moved"), run)
            if what == "emptied":
                (run / "checkpoints").mkdir(parents=True)

    resmol.train.loop.record_step = record
    if what == "moved in a save":
        resmol.train.loop.record_step = real
        resmol.run.checkpoint.file_sha256 = move_away(run, resmol.run.checkpoint.file_sha256)
    return command(run, setting)


def move_away(run: Path, real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `file_sha256` before which the run is moved, in the second save: after its files were written."""

    def hash_file(path: Path) -> Any:
        if "step-00000010" in str(path) and run.exists():
            run.rename(run.with_name("moved"))
        return real(path)

    return hash_file


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder; its directories with no bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_s5_run_directory_taken_away(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    problems, ways = [], ("moved", "deleted", "replaced", "emptied", "moved in a save")
    for what in ways:
        run = tmp_path / what / "run"
        run.parent.mkdir()
        moved = run.with_name("moved")
        code = forks.run(take_away, what, run, setting)
        found = [] if code == DATA_OR_DISK else [f"exit code {code}"]
        if what in ("moved", "deleted", "moved in a save") and run.exists():
            found.append("the run directory was made again")
        if what == "emptied" and any((run / "checkpoints").iterdir()):
            found.append("a checkpoint was written into a directory that is not the run's")
        if what == "replaced":
            steps = [step_of(path) for path in list_checkpoints(RunDir(run).checkpoints)]
            found += [] if steps == [10, 5] and reached(run) == 12 else [f"the other run was written to: {steps}"]
        found += [] if str(run) in error_of(run) else [f"it says {error_of(run)!r}"]
        if moved.exists():
            damage = damage_done(moved, lost=LOST_AT_MOST if what == "moved in a save" else INTERVAL)
            if what == "moved in a save":  # its half lies there, and the next start removes it
                damage = [text for text in damage if "tmp-step-00000010" not in text]
            found += [f"moved: {text}" for text in damage] + goes_on(forks, moved, setting, oracle)
        problems += [f"{what}: {text}" for text in found[:1]]
    campaign.record(
        "S5", "the run directory is moved, deleted or replaced in the middle",
        "stops with an error, makes nothing anew", problems, len(ways), exhaustive=True,
    )  # fmt: skip


# --- S6: a slow disk ---------------------------------------------------------------------------------------------


def command_on_slow_disk(milliseconds: int, run: Path, setting: Setting, *arguments: str) -> int:
    """Train where every fsync of weights and moments takes long."""
    shim.arm(
        run.parent, "sleep", kinds=("fsync",), until=shim.EVER, milliseconds=milliseconds, names="*.safetensors"
    )  # fmt: skip
    return command(run, setting, *arguments)


def test_s6_slow_disk(
    campaign: Campaign, forks: Forks, shim: None, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Saves that take much longer than the steps between them must not pile up."""
    seconds, run = float(campaign.count(1, 5)), tmp_path / "run"
    arguments = ("--set", "checkpoint.every=20")
    child = forks.start(command_on_slow_disk, int(1000 * seconds), run, setting, *arguments)
    in_flight, seen, meanwhile = 0, set[str](), set[int]()
    while child.exitcode is None:
        folder = RunDir(run).checkpoints
        names = {path.name for path in folder.glob("tmp-step-*")} if folder.exists() else set()
        in_flight, seen = max(in_flight, len(names)), seen | names
        meanwhile |= {reached(run)} if names else set()
        child.join(seconds / 40)
    problems = [] if finish(child) == 0 else [f"exit code {child.exitcode}: {error_of(run)}"]
    problems += [] if in_flight == 1 else [f"{in_flight} saves in flight"]
    problems += oracle.differences(run)
    records = read_ledger(RunDir(run).ledger).records
    steps, saves = list(select(records, "step")), list(select(records, "save"))
    problems += [f"save of step {r['step']} took {r['seconds']} s" for r in saves if r["seconds"] < 2 * seconds]
    usual = statistics.median(r["seconds"] for r in steps)  # of a busy machine, perhaps; saves come on top of it
    saving = [r["seconds"] for r in steps if r["step"] > 1 and r["step"] % 20 < 2]  # a save is asked for between them
    if sum(taken - usual for taken in saving) > seconds * len(saves):
        problems.append("the time of the steps includes that of the saves")
    if not any(step % 20 for step in meanwhile):
        problems.append(f"training stood still during every save: at {sorted(meanwhile)}")
    after = [max(s["step"] for s in steps if s["seq"] < r["seq"]) for r in saves]
    problems += [] if after == [40, 60, 60] else [f"recorded after steps {after}"]
    campaign.record(
        "S6", f"every fsync of weights and moments takes {seconds:g} s", "training goes on, one save at a time",
        problems, len(saves), exhaustive=True, note=f"{len(seen)} temporary directories seen, {in_flight} at a time",
    )  # fmt: skip


# --- S7: leftovers -----------------------------------------------------------------------------------------------


def test_s7_leftovers(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """Temporary directories and names that look like checkpoints; some hold a whole checkpoint."""
    count, problems = 50, []
    run = tmp_path / "run"
    begun(forks, run, setting)
    folder, outside = RunDir(run).checkpoints, tmp_path / "outside"
    whole = folder / checkpoint_name(20)
    stale = [f"tmp-{checkpoint_name(5 * (n % 14 + 1))}-{n:012x}" for n in range(count)]
    for number, name in enumerate(stale):
        if number % 3:
            (folder / name).mkdir()
        else:
            shutil.copytree(whole, folder / name)
    foreign = ["step-12.bak", "foo-step-99", "step-00000099.bak", "step-99", "step-000000099", "STEP-00000099", "step-"]
    foreign += ["corrupt-step-00000099-1", "step-00000099 (copy)", " step-00000099", "latest"]
    for name in foreign:
        shutil.copytree(whole, folder / name)
    shutil.copytree(whole, outside)
    (folder / "step-00000098").symlink_to(outside)
    (folder / "step-00000097").write_text("not a directory")
    (folder / "step-٠٠٠٠٠٠٩٩").mkdir()  # digits, but not those of a name
    foreign += ["step-00000098", "step-00000097", "step-٠٠٠٠٠٠٩٩"]
    (folder / f"tmp-{checkpoint_name(96)}-link").symlink_to(outside)
    if [step_of(path) for path in list_checkpoints(folder)] != [20, 15, 10]:
        problems.append(f"taken for checkpoints: {[path.name for path in list_checkpoints(folder)]}")

    before = contents(run)
    with exclusive_lock(RunDir(run).lock):
        code = forks.run(command, run, setting)
        before["lock"] = RunDir(run).path.joinpath("lock").read_bytes()
        problems += [] if code == RunInUse.exit_code else [f"exit code {code} while the run is in use"]
        changed = before.items() ^ contents(run).items()
        problems += [f"changed without the lock: {name}" for name, _ in list(changed)[:1]]
    outside_before = contents(outside)
    problems += goes_on(forks, run, setting, oracle)
    names = {path.name for path in folder.iterdir()}
    problems += [f"still there: {name}" for name in names if name.startswith("tmp-")][:1]
    problems += [f"{name} is gone" for name in foreign if name not in names]
    problems += [] if contents(outside) == outside_before else ["something outside the run was changed"]
    resumed = [r["step"] for r in select(read_ledger(RunDir(run).ledger).records, "resume")]
    problems += [] if resumed == [20] else [f"resumed at {resumed}"]
    campaign.record(
        "S7", "leftovers and look-alikes among the checkpoints", "ignored; own leftovers removed under the lock only",
        problems, count + len(foreign) + 1, exhaustive=True,
    )  # fmt: skip
