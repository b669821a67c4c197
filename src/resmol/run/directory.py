"""The run directory: which file lies where, and the lock that lets one process at a time write there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from resmol.errors import DataError, RunInUse
from resmol.system.atomic_io import full_disk_is_an_error, make_directory


@dataclass(frozen=True)
class RunDir:
    """Names every file of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def ledger(self) -> Path:
        """The hash-chained record, of which everything else here is a view."""
        return self.path / "ledger.jsonl"

    @property
    def log(self) -> Path:
        """The lines that a person reads."""
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        """One directory for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer, so that the run can speak without a network."""
        return self.path / "tokenizer.json"

    @property
    def data(self) -> Path:
        """Where a text file given to ``train`` is prepared."""
        return self.path / "data"

    @property
    def evidence(self) -> Path:
        """The JSON that the commands of ``reproduce`` printed."""
        return self.path / "evidence"

    @property
    def certificate(self) -> Path:
        """What `resmol audit --certify` writes."""
        return self.path / "certificate.json"

    @property
    def report(self) -> Path:
        """The one-page report."""
        return self.path / "report.html"

    @property
    def claims_file(self) -> Path:
        """What `reproduce` claims, and how each claim came out."""
        return self.evidence / "claims.json"

    def exists(self) -> bool:
        """Tell whether a run was started here."""
        return self.config.is_file()

    def claims(self) -> list[dict[str, Any]]:
        """Return the claims of `reproduce`, if it ran here, with evidence named relative to the run.

        A file that says something else than claims do is none: each has a name, a verdict and what was measured.
        """
        try:
            found = json.loads(self.claims_file.read_bytes())["checks"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        checks = [check for check in found if isinstance(check, dict)] if isinstance(found, list) else []
        checks = [check for check in checks if {"name", "passed", "measured"} <= check.keys()]
        return [{"expected": "", **check, "evidence": self._inside(str(check.get("evidence", "")))} for check in checks]

    def _inside(self, evidence: str) -> str:
        """Return a path relative to the run, or only the file's name: no folder of the machine it was made on.

        The paths were relative to wherever the claims were made, or absolute, and the run may have another name since.
        So a path begins at the last part that names something in a run, else after the run's own name.
        """
        own = (self.config, self.ledger, self.log, self.checkpoints, self.tokenizer, self.data, self.evidence)
        names = {path.name for path in (*own, self.certificate, self.report)}
        parts = PurePosixPath(evidence).parts
        starts = [start for start, part in enumerate(parts) if part in names]
        starts = starts or [start for start in range(1, len(parts)) if parts[start - 1] == self.path.resolve().name]
        return "/".join(parts[starts[-1] :] if starts else parts[-1:])

    def require(self) -> None:
        """Raise `DataError` when no run was ever started here."""
        if not self.exists():
            raise DataError(
                f"{self.path} is not a run directory (it has no config.toml)",
                fix="name the directory that `resmol train` wrote",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel frees it when the process dies, however it dies.

        Raises:
            RunInUse: Another process holds it; the message names its process and host.
        """
        make_directory(self.path)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInUse(
                    f"{self.path} is in use by another process: {_owner_of(descriptor)}",
                    fix="wait for it, stop it with Ctrl-C, or choose another run directory",
                ) from None
            with full_disk_is_an_error(self.path / "lock"):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _owner_of(lock: int, patience: float = 1.0) -> str:
    """Return what a lock's file says of its owner.

    An owner writes its name just after it has the lock, so for an instant the file is empty, or names the process
    that held the lock before and is dead.
    """
    give_up = time.monotonic() + patience
    while True:
        said = os.pread(lock, 4096, 0).decode(errors="replace").strip()
        if _may_be_alive(said) or time.monotonic() > give_up:
            return said or "unknown"
        time.sleep(0.01)


def _may_be_alive(said: str) -> bool:
    try:
        owner = json.loads(said)
        if owner["host"] == socket.gethostname():
            os.kill(int(owner["pid"]), 0)  # signal 0 only asks
    except (ValueError, TypeError, KeyError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # it lives, as somebody else's
    return True
