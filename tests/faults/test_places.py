"""Rows S8 to S11: places that lack something: directory syncs, locks, mapped files, a home folder, a compiler."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shim
from campaign import Campaign
from test_processes import TERMINATED, die_after, goes_on, new_process, reached
from trials import STEPS, Forks, Oracle, Setting, command, error_of
from waiting import HANGS

from resmol.interop.load import load_model
from resmol.run.directory import RunDir

LACKING = {
    "sync-directory": (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF),
    "lock": (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
    "map": (errno.ENODEV, errno.ENOTSUP, errno.EINVAL, errno.EPERM),
}
SAID = {"sync-directory": "cannot sync directories", "lock": "without locks"}


def without(kind: str, number: int, run: Path, setting: Setting, *arguments: str) -> int:
    """Do what `resmol train RUN` does where an operation is not there."""
    shim.arm(run.parent, "fail", kinds=(kind,), k=1, until=shim.EVER, errno=number)
    return command(run, setting, *arguments)


def killed_without(kind: str, number: int, step: int, run: Path, setting: Setting) -> int:
    """The same, killed after a step."""
    shim.arm(run.parent, "fail", kinds=(kind,), k=1, until=shim.EVER, errno=number)
    return die_after(step, run, setting)


def load_without(kind: str, number: int, run: Path) -> int:
    """Load the newest checkpoint."""
    shim.arm(run.parent, "fail", kinds=(kind,), k=1, until=shim.EVER, errno=number)
    return 0 if load_model(run, device="cpu").source.step == STEPS else 1


@pytest.mark.usefixtures("shim")
def test_s8_operations_that_are_not_there(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """A run starts, is killed, goes on and is read on a file system that lacks one operation; once it is said."""
    cases = [(kind, number) for kind, numbers in LACKING.items() for number in numbers]
    chosen = cases if campaign.full else [(kind, campaign.draw(kind).choice(LACKING[kind])) for kind in LACKING]
    problems = []
    for case, (kind, number) in enumerate(chosen):
        run = tmp_path / f"place-{case}" / "run"
        run.parent.mkdir()
        forks.run(killed_without, kind, number, 23, run, setting)
        found = [] if reached(run) == 23 else [f"step {reached(run)} was reached: {error_of(run)}"]
        code = forks.run(without, kind, number, run, setting)
        said = error_of(run).count(SAID.get(kind, "\0"))
        found += [] if (code, reached(run)) == (0, STEPS) else [f"exit code {code}: {error_of(run)}"]
        found += [] if said == (kind in SAID) else [f"it was said {said} times"]
        found += oracle.differences(run)
        found += [] if forks.run(load_without, kind, number, run) == 0 else ["it cannot be read"]
        problems += [f"{kind} {errno.errorcode[number]}: {text}" for text in found[:1]]
    campaign.record(
        "S8", "the file system has no locks, cannot sync directories, or cannot map files",
        "trains, is killed, goes on and is read, with the same bits; said once", problems, len(chosen),
        exhaustive=campaign.full,
    )  # fmt: skip


def two_without_locks(run: Path, setting: Setting) -> int:
    """While a run without locks is being trained, another process must be refused."""
    shim.arm(run.parent, "fail", kinds=("lock",), k=1, until=shim.EVER, errno=errno.ENOLCK)
    return command(run, setting, "--set", "train.steps=1000000")


@pytest.mark.usefixtures("shim")
def test_s9_one_process_without_locks(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """The file that stands for a lock keeps a second process out, and a killed owner does not block the next."""
    count, problems = campaign.count(1, 10), []
    for trial in range(count):
        run = tmp_path / f"place-{trial}" / "run"
        run.parent.mkdir()
        first = forks.start(two_without_locks, run, setting)
        while not reached(run):
            assert first.is_alive(), error_of(run)
        code = forks.run(without, "lock", errno.ENOLCK, run, setting)
        problems += [] if code == 75 else [f"trial {trial}: the second process ended with {code}"]
        if trial % 2:
            first.terminate()
        else:
            first.kill()
        first.join(HANGS)
        problems += [] if first.exitcode in (-9, TERMINATED) else [f"trial {trial}: the first ended: {first.exitcode}"]
        code = forks.run(without, "lock", errno.ENOLCK, run, setting, "--steps", str(reached(run) + 1))
        problems += [] if code == 0 else [f"trial {trial}: the next ended with {code}: {error_of(run)}"]
    campaign.record(
        "S9", "two processes at once where the file system has no locks; the owner is killed",
        "the second exits with 75, the next one trains", problems, count,
    )  # fmt: skip


def nobody(*words: str) -> list[str]:
    """Return a command that a user without a name and without a home executes."""
    identity = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    return [
        "env",
        *(f"-u{name}" for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME")),
        *identity,
        *words,
    ]


def test_s10_no_home(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """A user of a container that has no entry in /etc/passwd, and no variable names a home."""
    if shutil.which("unshare") is None or subprocess.run(nobody("true"), capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)
    }  # fmt: skip
    commands = {
        "train": new_process(run, setting),
        "generate": [sys.executable, "-m", "resmol", "generate", str(run), "--prompt", "ka", "--max-new-tokens", "2"],
    }
    problems = []
    for name, words in commands.items():
        done = subprocess.run(
            nobody(*words), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS
        )
        problems += [] if done.returncode == 0 else [f"{name}: exit code {done.returncode}: {done.stderr[-300:]}"]
        problems += [] if done.stderr.count("no home folder") == 1 else [f"{name}: it says {done.stderr[:300]}"]
    problems += [] if not (tmp_path / "~").exists() else ["a folder ~ was made"]
    problems += oracle.differences(run) if RunDir(run).ledger.exists() else ["nothing was trained"]
    campaign.record(
        "S10", "no home folder: no HOME, no entry in /etc/passwd", "works, and says once where downloads are kept",
        problems, len(commands), exhaustive=True,
    )  # fmt: skip


COMPILER = """
import torch
from resmol.train import autotune, compiler
autotune.COMPILE_SECONDS = 0.0  # so that `auto` chooses to compile
{fault}
"""


def test_s11_no_compiler(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """A compiler that ends with an error, and none at all; `auto` trains uncompiled, a stored "on" gets a sentence."""
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("c++", "g++", "clang++"):
        (broken / name).write_text("#!/bin/sh\nexit 1\n")
        (broken / name).chmod(0o755)
    problems, paths = [], {"broken": f"{broken}:{os.environ['PATH']}", "absent": str(Path(sys.executable).parent)}
    chosen = list(paths) if campaign.full else ["broken"]
    for what in chosen:
        run, path = tmp_path / what, paths[what]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{what}"),
        }  # fmt: skip

        def ended(*arguments: str, run: Path = run, environment: dict[str, str] = environment) -> tuple[int, str]:
            code = COMPILER.format(fault="") + f"import sys; from resmol.__main__ import main; main({arguments!r})"
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            return done.returncode, done.stderr

        words = new_process(run, setting)[3:]
        code, said = ended(*words, "--set", "runtime.compile=auto")
        problems += [] if code == 0 and "trains uncompiled" in said else [f"{what}, auto: exit code {code}: {said}"]
        problems += [] if RunDir(run).load_config().runtime.compile == "off" else [f"{what}: off was not stored"]
        problems += [f"{what}: {text}" for text in oracle.differences(run)[:1]]
        code, said = ended(*new_process(run.with_name(f"{what}-on"), setting)[3:], "--set", "runtime.compile=on")
        sound = code == 2 and "torch.compile does not work here" in said and "--set runtime.compile=off" in said
        problems += [] if sound else [f"{what}, on: exit code {code}: {said[-300:]}"]
        problems += goes_on(forks, run, setting, oracle)
    campaign.record(
        "S11", "no C++ compiler, or one that does not work",
        "auto trains uncompiled, with the same bits; on is refused", problems, 2 * len(chosen),
        exhaustive=campaign.full,
    )  # fmt: skip
