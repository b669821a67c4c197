"""Generation at the terminal: streamed text, and a read-eval-print loop (REPL) of prompts."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from resmol.cli.prompts import MAX_BYTES, decoded, one_line
from resmol.cli.terminal import say
from resmol.errors import DataError, ResmolError
from resmol.inference.completion import FINISH_REASONS, Completion, TextStreamer, untokenizable_notice
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import LoadedModel

PROMPT = "> "
# Generated text may hold control characters, which a terminal would obey instead of showing them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def write(text: str) -> None:
    """Write text to standard output and flush it; at a terminal, control characters become visible symbols."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def describe(done: Completion) -> str:
    """Return a summary line of a completion: number of tokens, finish reason, timings."""
    count = len(done.token_ids)
    tokens = f"{count:,} token{'' if count == 1 else 's'}"
    return f"[{tokens}, {FINISH_REASONS[done.finish_reason]}; {done.timings.describe()}]"


def stream(loaded: LoadedModel, prompt: str, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Stream the continuation of a prompt to standard output, then write a summary line to standard error.

    Raises:
        UsageError: The prompt fills the context.
        BrokenPipeError: The reader of standard output has closed it.
        KeyboardInterrupt: Ctrl-C, after the summary of the text so far.
    """
    warn_untokenizable(loaded, prompt)
    pieces = loaded.stream(prompt, sampling, stop=stop)
    try:
        _write_all(pieces)
    except KeyboardInterrupt:
        _end(pieces)
        raise
    _end(pieces)


def print_batch(done: Sequence[Completion], places: Sequence[str]) -> None:
    """Write each continuation under a heading with the place and the text of its prompt."""
    for completion, place in zip(done, places, strict=False):
        write(f"=== {place}: {completion.prompt}\n{completion.text}\n")


def repl(loaded: LoadedModel, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Read prompts from standard input, one a line, and continue each by itself until the input ends.

    Empty lines are skipped. A prompt that cannot be continued is reported, and the next one is read. A line that is
    too large ends the loop, since the rest of it would be read as the next prompt.

    Raises:
        DataError: At the end, if the input is not a terminal and a prompt could not be continued.
        KeyboardInterrupt: Ctrl-C, if the input is not a terminal.
    """
    if not sys.stdin.isatty():
        _repl(loaded, sampling, stop, at_terminal=False)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - the import makes `input` edit lines and keep a history
    say("each prompt is continued by itself; Ctrl-C stops a continuation, Ctrl-D exits")
    with _handling_interrupts(signal.SIG_IGN):  # except while a line is typed or a continuation streamed
        _repl(loaded, sampling, stop, at_terminal=True)


def _repl(loaded: LoadedModel, sampling: SamplingParams, stop: Sequence[str], *, at_terminal: bool) -> None:
    continued = failed = 0
    while True:
        try:
            if (prompt := _next_prompt(at_terminal)) is None:
                break
            if not prompt.strip():
                continue
            (_stream_interruptibly if at_terminal else stream)(loaded, prompt, sampling, stop)
            continued += 1
        except KeyboardInterrupt:  # at the prompt: discard the line, as a shell does
            if not at_terminal:
                raise
            say("")
        except ResmolError as error:
            failed += 1
            say(f"error: {error.what}\n  fix: {error.fix}")
            if isinstance(error, _LineTooLarge):
                break
    if failed and not at_terminal:
        raise DataError(
            f"{failed} of {continued + failed} prompts could not be continued", fix="see the messages above"
        )


def warn_untokenizable(loaded: LoadedModel, prompt: str) -> None:
    """Print a notice if bytes of a prompt have no token, so that the model cannot see them."""
    if notice := untokenizable_notice(loaded.tokenizer, prompt):
        say(notice)


class _LineTooLarge(DataError):
    """An input line exceeds `MAX_BYTES`."""


def _next_prompt(at_terminal: bool) -> str | None:
    """Return the next line, or None at the end of the input.

    Raises:
        DataError: The line is not UTF-8, or too large.
    """
    if not at_terminal:
        line = sys.stdin.buffer.readline(MAX_BYTES + 1)
        if len(line) > MAX_BYTES:
            raise _LineTooLarge(f"the line is larger than {MAX_BYTES >> 20} MiB", fix="cut it into several lines")
        return one_line(decoded(line, "the line")) if line else None
    try:
        with _first_interrupt_only():
            line = _typed()
    except EOFError:
        say("")
        return None
    return decoded(line.encode("utf-8", errors="surrogateescape"), "the line")


def _typed() -> str:
    """Return a typed line; the prompt sign goes to the terminal, never into a file that the texts are written to."""
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def _stream_interruptibly(loaded: LoadedModel, prompt: str, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Stream a continuation; the first Ctrl-C stops it, but neither the program nor its summary line."""
    warn_untokenizable(loaded, prompt)
    pieces = loaded.stream(prompt, sampling, stop=stop)
    with _first_interrupt_only():
        with suppress(KeyboardInterrupt):
            _write_all(pieces)
        _end(pieces)


def _end(pieces: TextStreamer) -> None:
    """End the line of the text and print its summary."""
    write("\n")
    say(describe(pieces.completion()))


def _write_all(pieces: TextStreamer) -> None:
    for piece in pieces:
        write(piece)


def _first_interrupt_only() -> AbstractContextManager[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt and ignore further ones until the context ends."""

    def once(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    return _handling_interrupts(once)


@contextmanager
def _handling_interrupts(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    """Handle Ctrl-C by a handler, or ignore it (SIG_IGN), until the context ends; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
