"""Terminal output: messages on standard error, results and tables on standard output."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from resmol.checks import Check, all_passed
from resmol.errors import CheckFailed, Interrupted
from resmol.system.installation import started_as
from resmol.system.standard_streams import LossyStream, has_all_characters
from resmol.system.tables import result_console, text_table
from resmol.system.user_paths import short_path


def say(text: str) -> None:
    """Print a message on standard error; a closed stream is ignored, so that a run goes on."""
    with suppress(OSError):
        typer.echo(text, err=True)


class _MessageHandler(logging.Handler):
    """Prints log records of the package as plain sentences."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_messages() -> None:
    """Print the log records of the package (INFO and above) on standard error from now on."""
    package = logging.getLogger("resmol")
    if not any(isinstance(handler, _MessageHandler) for handler in package.handlers):
        package.addHandler(_MessageHandler())
    package.setLevel(logging.INFO)


def suggest(*commands: str) -> None:
    """Print commands that usually come next on standard error, as they are typed in this shell, if it is read."""
    text = "next:" + "".join(f"\n  {started_as()} {command}" for command in commands)
    with suppress(OSError):
        print(text, file=LossyStream(sys.stderr))  # a finished run does not wait for a reader that sleeps


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=not has_all_characters(sys.stdout)))


def newest(results: Iterable[Any]) -> Any:
    """Return the last of some results, each of which holds those before it; Ctrl-C ends the work early."""
    result = None
    try:
        for result in results:  # noqa: B007 - the last one is returned
            pass
    except KeyboardInterrupt:
        say("interrupted; the results so far follow")
    if result is None:
        raise Interrupted("interrupted", fix="run the same command again", signal_number=2)
    return result


def show_result(result: Any, as_json: bool, as_markdown: bool) -> None:
    """Print something with `render`, `markdown` and `to_dict` as a table, as Markdown or as JSON."""
    if as_json:
        print_json(result.to_dict())
    elif as_markdown:
        typer.echo(result.markdown())
    else:
        result.render(result_console())


def report_checks(title: str, checks: Sequence[Check], as_json: bool, explain: bool = False) -> None:
    """Print checks as a table or as JSON (`CheckFailed` if one failed).

    A last check with the name ``verdict`` becomes a sentence after the table: its ``measured``, and what to change, its
    ``expected``, if it failed.
    """
    passed = all_passed(checks)
    verdict = checks[-1] if checks and checks[-1].name == "verdict" else None
    if as_json:
        print_json({"passed": passed, "checks": [check.to_dict() for check in checks]})
    else:
        result_console().print(check_table(title, checks[:-1] if verdict else checks, explain))
    if verdict and not passed:
        raise CheckFailed(verdict.measured, fix=verdict.expected)
    if verdict and not as_json:
        typer.echo(verdict.measured)
    if not passed:
        failed = [check.name for check in checks if not check.passed]
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed[:5])}", fix="see the table")


def check_table(title: str, checks: Sequence[Check], explain: bool) -> Table:
    """Return a table of checks; expectations are shown for failed checks, or with ``explain``."""
    table = text_table(title, "", "", "")
    for check in checks:
        mark = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        lines = [escape(check.measured)]
        if explain or not check.passed:
            lines += [f"[dim]expected: {escape(check.expected)}[/]"]
        if explain and check.guards:
            lines += [f"[dim]guards against: {escape(check.guards)}[/]"]
        if check.evidence:
            lines += [f"[dim]see {escape(short_path(check.evidence))}[/]"]
        table.add_row(mark, escape(check.name), "\n".join(lines))
    passed = sum(check.passed for check in checks)
    table.add_row("", f"[bold]{passed} of {len(checks)} passed[/]", "")
    return table
