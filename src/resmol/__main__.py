"""The process entry: runs the command line and turns every error into two lines and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

import typer

from resmol.errors import DiskFull, Interrupted, ResmolError, UsageError
from resmol.system.installation import started_as
from resmol.system.launcher import wait_for_rank_zero
from resmol.system.standard_streams import set_up_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``resmol`` and exit with the code that README.md lists."""
    set_up_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    sys.exit(run([argument for argument in given if argument != "--debug"], debug=debug))


def run(arguments: Sequence[str], *, debug: bool) -> int:
    """Run one command and return its exit code."""
    from resmol.cli import app

    try:
        result = app(list(arguments), standalone_mode=False, prog_name="resmol")
    except ResmolError as error:
        if debug:
            raise
        fix = _fix_for(arguments, error.fix)
        if isinstance(error, Interrupted):  # what was asked for is no error
            _print(f"{error.what}; {fix}")
        else:
            if isinstance(error, UsageError):
                wait_for_rank_zero()
            _print_error(error.what, fix)
        return exit_code(error)
    except typer.exceptions.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a command that needs words got none: its help is no error
            _print(message)
        else:
            _print_error(message, _fix_for_usage(arguments))
        return 2
    except (typer.Abort, KeyboardInterrupt):
        _print("interrupted; run the same command again")
        return 130
    except OSError as error:
        if debug:
            raise
        _print_error(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": "),
            "check the path, its permissions and the disk",
        )
        return DiskFull.exit_code if error.errno == errno.ENOSPC else 3
    except Exception as error:
        if debug:
            raise
        _print_error(
            f"internal error: {type(error).__name__}: {error}",
            "run it again with --debug and report the traceback",
        )
        return 1
    return result if isinstance(result, int) else 0


def exit_code(error: ResmolError) -> int:
    """Return the exit code that stands for an error; after a signal it is 128 + the signal's number."""
    return 128 + error.signal_number if isinstance(error, Interrupted) else error.exit_code


def _fix_for(arguments: Sequence[str], fix: str) -> str:
    """Return a fix in which options of other commands are named as such."""
    from resmol.cli import app
    from resmol.cli.fixes import as_started, command_of, complete_fix, options_of_commands

    commands = options_of_commands(app)
    return as_started(complete_fix(fix, command_of(arguments, commands), commands), commands, started_as())


def _fix_for_usage(arguments: Sequence[str]) -> str:
    """Return what to type instead: the field of a usual option that `train` does not have, or the help that fits."""
    from resmol.cli import app
    from resmol.cli.fixes import command_of, options_of_commands, usual_option

    command = command_of(arguments, options_of_commands(app))
    hint = usual_option(arguments) if command == "train" else None
    return hint or f"see `{f'{started_as()} {command}'.strip()} --help`"


def _print_error(what: str, fix: str) -> None:
    _print(f"error: {what}\n  fix: {fix}")


def _print(text: str) -> None:
    try:
        print(text, file=sys.stderr)  # noqa: T201
    except OSError:
        return  # nobody is listening any more; the exit code says it


if __name__ == "__main__":
    main()
