"""A mirror: a second place for a run whose machine may vanish, such as a Colab session or a spot instance.

After each save a thread copies what is new: checkpoints first, each one whole and compared with its manifest, then the
ledger that records them. A crash at any instant of it leaves the mirror as it was, or with a checkpoint that its ledger
does not record yet. On an empty machine the same command copies the run back, verified, and resumes it.

Nothing about a mirror stops or slows training: what fails is a ``warn`` record, and is tried again after the next save.
There is one exception. A ledger only grows, so that of the mirror must be the beginning of the run's. If it is not,
another machine has gone on with the run, and this one stops.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

from resmol.errors import CheckpointError, DataError, ResmolError, RunInUse, UsageError
from resmol.run.checkpoint_manifest import MANIFEST, list_checkpoints, parse_manifest
from resmol.run.directory import RunDir
from resmol.run.ledger import LedgerTampered, effective_saves, parse_ledger
from resmol.run.log_writers import RunLog
from resmol.run.mirror_places import CHECKPOINTS, MirrorPlace, verified_copy
from resmol.system.atomic_io import commit_directory, make_directory, remove_directory, write_durable
from resmol.system.locks import kept_while_read

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0  # for the last copy, when training has ended
TAKEN = "wait for the other machine, or stop it; to go on apart from it, leave --mirror out or name another one"


class Mirror:
    """Copies a run to another place in the background, after each save; leaving the context waits for the last copy."""

    def __init__(self, place: MirrorPlace, run: RunDir, run_log: RunLog) -> None:
        self._place, self._run, self._run_log = place, run, run_log
        self._copying: Future[None] | None = None
        self._is_behind = False

    def request(self) -> None:
        """Copy what the run holds now, as soon as the copy under way, if there is one, has ended."""
        self._is_behind = True
        self.poll()

    def poll(self) -> None:
        """Record a copy that failed, and start the next one if one is due; never waits.

        Raises:
            RunInUse: Another machine has gone on with the run.
        """
        if self._copying is not None and self._copying.done():
            self._finish()
        if self._copying is None and self._is_behind:
            self._is_behind = False
            self._copying = _in_background(self._place, self._run)

    def close(self) -> None:
        """Wait for the last copy, but not forever; raises what `poll` does."""
        try:
            while self._copying is not None:
                self._copying.exception(PATIENCE_SECONDS)
                self.poll()
        except TimeoutError:
            self._warn(f"it takes longer than {PATIENCE_SECONDS:.0f} s")

    def _finish(self) -> None:
        copying, self._copying = self._copying, None
        assert copying is not None
        try:
            copying.result()
        except RunInUse:
            raise
        except ResmolError as error:
            self._warn(type(error).__name__, error.what)
        except OSError as error:
            self._warn(error.strerror or type(error).__name__, str(error))

    def _warn(self, reason: str, detail: str = "") -> None:
        """Record the reason without a place of this machine, since a ledger may be published."""
        self._run_log.write("warn", what="the mirror is behind: it is tried again after the next save", reason=reason)
        if detail:
            logger.warning(f"mirror: {detail}")


def _in_background(place: MirrorPlace, run: RunDir) -> Future[None]:
    """Copy in a thread that does not keep the process alive: a drive that hangs would."""
    future: Future[None] = Future()
    ledger = run.ledger.read_bytes()  # as it is now; it was synced for the save

    def work() -> None:
        try:
            copy_to(place, run, ledger)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=work, name="mirror", daemon=True).start()
    return future


def copy_to(place: MirrorPlace, run: RunDir, ledger: bytes) -> None:
    """Bring a mirror to where a ledger of the run stands.

    Raises:
        RunInUse: Another machine has gone on with the run in this mirror.
        ResmolError, OSError: The place failed. It holds what it held before, and perhaps further checkpoints.
    """
    place.open()
    require_older(place.read(run.ledger.name), ledger)
    recorded = effective_saves(parse_ledger(ledger, run.ledger).records)
    there = {name: place.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") for name in place.checkpoints()}
    with ExitStack() as hold:
        kept = []
        for path in list_checkpoints(run.checkpoints):
            with suppress(FileNotFoundError):  # retention was faster
                hold.enter_context(kept_while_read(path / MANIFEST))
                kept += [path] if path.name in recorded else []
        new = [path for path in kept if there.get(path.name) != (path / MANIFEST).read_bytes()]
        small = [file for file in (run.config, run.tokenizer, run.log) if file.is_file()]
        files = {file.name: file.read_bytes() for file in small}
        names = {path.name for path in kept}
        place.write(new, {**files, run.ledger.name: ledger}, [name for name in there if name not in names])


def require_older(theirs: bytes | None, ours: bytes) -> None:
    """Refuse a mirror whose ledger is not the beginning of ours.

    Raises:
        RunInUse: Another machine has gone on with this run.
        UsageError: It is the mirror of another run.
        DataError: It is damaged.
    """
    if theirs is None or ours.startswith(theirs):
        return
    try:
        records = parse_ledger(theirs, Path("ledger.jsonl of the mirror")).records
    except LedgerTampered as error:
        raise DataError(error.what, fix="remove the mirror: the next save writes it again") from error
    if theirs.partition(b"\n")[0] != ours.partition(b"\n")[0]:
        raise UsageError("the mirror holds another run", fix="name another place with --mirror")
    raise RunInUse(
        f"another machine has gone on with this run in the mirror (up to line {len(records)} of its ledger)", fix=TAKEN
    )


def find_mirror(place: MirrorPlace, run: RunDir) -> None:
    """Before a start: copy the run back where there is none, and compare the two where there are both.

    Args:
        place: The mirror.
        run: The run directory, whose lock is held.

    Raises:
        RunInUse: The mirror is ahead of the run.
        UsageError: It holds another run.
        CheckpointError: There is no run here, and no checkpoint in the mirror is whole.
        DataError: There is no run here, and the mirror cannot be reached or is damaged.
    """
    is_here = run.has_begun() and run.ledger.exists()
    try:
        place.open()
        theirs = place.read(run.ledger.name)
        if is_here:
            require_older(theirs, run.ledger.read_bytes())
        elif theirs is not None:
            copy_back(place, run, theirs)
    except (DataError, OSError) as error:
        if not is_here:
            raise
        logger.warning(f"mirror: {error}; it is tried again after the next save")


def copy_back(place: MirrorPlace, run: RunDir, ledger: bytes) -> None:
    """Copy a run from its mirror, the ledger last: what a crash leaves before that is no run yet, and is done again."""
    logger.info("mirror: there is no run here; copying it back")
    recorded = effective_saves(parse_ledger(ledger, run.ledger).records)
    make_directory(run.checkpoints)
    whole = 0
    for name in sorted(recorded.keys() & set(place.checkpoints()), reverse=True):
        content = place.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") or b""
        try:
            _fetch(place, run, name, content, recorded[name]["manifest_sha256"])
        except (CheckpointError, FileNotFoundError) as error:
            logger.warning(f"mirror: {name} is left out: {error}")
        else:
            whole += 1
    if not whole:
        raise CheckpointError(
            "the mirror holds no whole checkpoint of its run", fix="name another mirror or run directory with a copy"
        )
    for file in (run.config, run.tokenizer, run.log):
        if (content := place.read(file.name) or b"") != b"":
            write_durable(file, content)
    write_durable(run.ledger, ledger)


def _fetch(place: MirrorPlace, run: RunDir, name: str, content: bytes, sha256: str) -> None:
    """Copy one checkpoint, which must be the one that the ledger recorded."""
    final = run.checkpoints / name
    manifest = parse_manifest(content, final)
    if manifest.sha256 != sha256:
        raise CheckpointError(f"{name} is not the one that the ledger recorded", fix="take another mirror")
    if final.exists():  # of an earlier try
        remove_directory(final)

    def write_files(temporary: Path) -> None:
        place.fetch(name, manifest, temporary)
        verified_copy(temporary, manifest)

    commit_directory(final, write_files, lambda _: content)
