"""The exception tree; every error says what happened and what to do about it.

ResmolError              exit code
├── CheckFailed          1    a check, an audit or a parity test did not pass
├── ProcessLost          1    another process of the run died, froze or does not answer
├── UsageError           2    a wrong argument or a wrong combination of arguments
│   └── ConfigError      2    a configuration that is invalid, or that drifted under a run
├── DataError            3    text, tokens, a file or a tokenizer is missing or unusable
│   └── NetworkError     3    the Hub or the package index could not be reached
├── DiskFull             28   no space left (the number of ENOSPC)
├── CheckpointError      65   no valid checkpoint, or this one is corrupt (EX_DATAERR)
├── NonFiniteError       70   NaN or infinity in a loss or a gradient (EX_SOFTWARE)
├── RunInUse             75   another process holds the run's lock (EX_TEMPFAIL)
└── Interrupted          130  after SIGINT, 143 after SIGTERM, 128 + n after another; the state was saved
"""

from __future__ import annotations

from typing import Any, ClassVar


class ResmolError(Exception):
    """The root of all errors that resmol raises on purpose.

    Args:
        what: One sentence that says what is wrong, with the value or the path.
        fix: One sentence that says what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.add_note(f"fix: {fix}")  # Python shows it below the error, in a notebook too

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes the same error."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[ResmolError], args: tuple[Any, ...], state: dict[str, Any]) -> ResmolError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class CheckFailed(ResmolError):
    """A check, an audit or a parity test did not pass."""

    exit_code = 1


class ProcessLost(ResmolError):
    """Another process of the run died, froze or does not answer."""

    exit_code = 1


class UsageError(ResmolError):
    """An argument, or a combination of arguments, makes no sense."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration is invalid, or differs from the one a run was started with."""


class DataError(ResmolError):
    """Text, tokens, a file or a tokenizer is missing or unusable."""

    exit_code = 3


class NetworkError(DataError):
    """Something that had to come from the network did not."""


class DiskFull(ResmolError):
    """The file system has no room for what had to be written."""

    exit_code = 28


class CheckpointError(ResmolError):
    """There is no valid checkpoint, or the one that was named is corrupt."""

    exit_code = 65


class NonFiniteError(ResmolError):
    """A loss or a gradient is NaN or infinite; the weights were not updated with it."""

    exit_code = 70


class RunInUse(ResmolError):
    """Another process holds the lock of this run directory."""

    exit_code = 75


class Interrupted(ResmolError):
    """A signal asked the run to stop; the state was saved first."""

    def __init__(self, what: str, *, fix: str, signal_number: int) -> None:
        super().__init__(what, fix=fix)
        self.signal_number = signal_number
