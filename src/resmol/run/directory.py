"""The run directory: which file lies where, whether it can be read, and whether there is room for it."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from resmol.config.load import load_config
from resmol.config.run_config import RunConfig
from resmol.errors import DataError, DiskFull
from resmol.model.flops import total_parameters
from resmol.run.ledger import FORMAT, first_record, unverified_kinds
from resmol.run.ranks import Ranks
from resmol.system.atomic_io import (
    TEMPORARY_PREFIX,
    commit_directory,
    fsync_path,
    full_disk_is_an_error,
    remove_leftovers,
    write_durable,
)
from resmol.system.host import free_inodes
from resmol.system.user_paths import user_path

logger = logging.getLogger(__name__)

LACKING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EXDEV, errno.EPERM}  # "no such operation"
_KEPT = re.compile(r"^(corrupt-)?step-[0-9]{8}")
_BEFORE_THE_FIRST_STEP = ("start", "resume", "drift", "warn", "stop")
FILES_OF_A_RUN = 13  # lock, configuration, tokenizer, ledger, log, checkpoints; and a checkpoint with its six files

CONFIG_HEAD = """\
# Written by resmol. To change the run, give `resmol train` --set section.key=value. A field of drift class A is fixed;
# one of class B also needs --accept-drift section.key. `resmol config --fields` lists fields and classes.

"""


@dataclass(frozen=True)
class RunDir:
    """Names every file of a run; ``~`` in its path is expanded."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", user_path(self.path))

    @property
    def lock(self) -> Path:
        """The file that a process locks while it trains here."""
        return self.path / "lock"

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
        """A copy of the tokenizer, so that the run can generate without a network."""
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
    def anchors(self) -> Path:
        """Time stamps and signatures over heads of the ledger, one folder for each (`resmol anchor`)."""
        return self.path / "anchors"

    @property
    def report(self) -> Path:
        """The one-page report."""
        return self.path / "report.html"

    @property
    def claims_file(self) -> Path:
        """What `reproduce` claims, and how each claim came out."""
        return self.evidence / "claims.json"

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return self.config.is_file()

    def has_begun(self) -> bool:
        """Return whether a step was recorded or a checkpoint saved here; what a failed start left binds nobody."""
        if self.checkpoints.is_dir() and any(_KEPT.match(entry.name) for entry in self.checkpoints.iterdir()):
            return True
        return not all(kind in _BEFORE_THE_FIRST_STEP for kind in unverified_kinds(self.ledger))

    def load_config(self) -> RunConfig:
        """Read the configuration of the run (`DataError` as in `require`)."""
        self.require()
        return load_config(self.config)

    def write_config(self, config: RunConfig) -> None:
        """Store the configuration, for people and for the next start (`DiskFull`)."""
        write_durable(self.config, (CONFIG_HEAD + config.to_toml()).encode())

    def require(self) -> None:
        """Check that this is a run that can be read.

        Raises:
            DataError: No run was ever started here, or another version of resmol wrote it in another format.
        """
        if not self.exists():
            raise DataError(
                f"{self.path} is not a run directory (it has no config.toml)",
                fix="name the directory that `resmol train` wrote",
            )
        start = first_record(self.ledger) or {}
        if start.get("format", FORMAT) != FORMAT:
            raise DataError(
                f"{self.path} was written by resmol {start.get('version')} (format {start['format']}); "
                f"this version reads format {FORMAT}",
                fix=f"use resmol {start.get('version')} for it; a model that it exports (`resmol export`) can be read "
                "by every version",
            )

    def prepare(self, config: RunConfig, tokenizer_json: bytes) -> None:
        """Make the directory ready for a ledger and checkpoints; a new run gets its configuration and tokenizer.

        Call it only while holding the run's lock: what a crash or a failed first start left behind is removed. Raises
        what `check_place` raises.
        """
        self._check_room(config)
        self._check_permission()
        begun = self.has_begun()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        fsync_path(self.path)
        remove_leftovers(self.checkpoints)
        remove_leftovers(self.path)
        if not begun:
            for leftover in (self.ledger, self.log):
                leftover.unlink(missing_ok=True)
        if not begun or not self.tokenizer.exists():
            write_durable(self.tokenizer, tokenizer_json)
        if not begun or not self.exists():
            if self.ledger.exists():
                logger.warning(
                    "config.toml is missing: restored from the ledger, with the fields of class C as given now"
                )
            self.write_config(config)

    def check_shared(self, ranks: Ranks) -> None:
        """Check that all ranks see the directory of rank 0, since they write checkpoints together.

        Raises:
            DataError: A rank does not see it; all ranks raise this.
        """
        if ranks.world_size == 1:
            return
        probe = self.path / f"{TEMPORARY_PREFIX}ranks-{uuid.uuid4().hex[:12]}"
        if ranks.rank == 0:
            probe.touch()
        try:
            name = ranks.exchange("name the run directory", probe.name)[0]
            seen = ranks.exchange("look at the run directory", [(self.path / name).exists(), socket.gethostname()])
        finally:
            probe.unlink(missing_ok=True)
        for rank, (sees, host) in enumerate(seen):
            if not sees:
                raise DataError(
                    f"rank {rank}, on {host}, does not see the run directory of rank 0, {self.path}: all ranks write "
                    "checkpoints into it",
                    fix="give all ranks the same run directory, on a file system that their hosts share",
                )

    def check_place(self, config: RunConfig) -> None:
        """Check that a run can be written here: room for a checkpoint, permission, and the operations that it needs.

        Raises:
            DiskFull: There is no room for a checkpoint.
            DataError: The directory cannot be written, or its file system lacks an operation.
        """
        self._check_room(config)
        self._check_permission()
        self._check_operations()

    def _check_permission(self) -> None:
        for folder in (self.path, self.checkpoints):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise DataError(
                    f"{folder} cannot be written", fix="check its permissions, and whether the disk is read-only"
                )

    def _check_room(self, config: RunConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        copies = 4 if config.averaging.fraction else 3  # weights, two moments, averaged weights
        checkpoint_bytes = copies * 4 * total_parameters(config.model)
        try:
            disk = shutil.disk_usage(self.path)
            inodes = free_inodes(self.path)
        except OSError as error:
            if error.errno not in LACKING:
                raise
            return  # some FUSE mounts do not say
        if disk.total and disk.free < checkpoint_bytes:  # and some say 0 of 0
            raise DiskFull(
                f"a checkpoint needs {checkpoint_bytes:,} bytes; {self.path} has {disk.free:,} free",
                fix="free some space, or choose a run directory on another disk",
            )
        if inodes is not None and inodes < FILES_OF_A_RUN:
            raise DiskFull(
                f"a run and a checkpoint need {FILES_OF_A_RUN} inodes; {self.path} has {inodes} free",
                fix="remove some files, or choose a run directory on another disk",
            )

    def _check_operations(self) -> None:
        """Do in small what a run does: commit a directory, append to a file, cut it, remove it."""
        probe = self.path / f"{TEMPORARY_PREFIX}probe"
        shutil.rmtree(probe, ignore_errors=True)
        operation = "rename a directory"
        try:
            commit_directory(probe, lambda folder: (folder / "file").touch(), lambda _: b"{}")
            operation = "append to a file"
            with full_disk_is_an_error(probe), (probe / "file").open("ab", buffering=0) as file:
                file.write(b"x")
                os.ftruncate(file.fileno(), 0)
        except OSError as error:
            if error.errno not in LACKING:
                raise
            raise DataError(
                f"{self.path} lies on a file system that cannot {operation} ({error.strerror})",
                fix="choose a run directory on another one, such as a local disk, and copy the run when it has ended",
            ) from None
        finally:
            shutil.rmtree(probe, ignore_errors=True)
