"""A model at the terminal: its text as it comes, and a loop of prompts and answers."""

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
from resmol.inference.completion import Completion, TextStreamer
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import LoadedModel

PROMPT = "> "
ENDS = {
    "eos": "end of the text",
    "length": "as long as asked for",
    "context": "end of the context",
    "stop": "stop string",
    "interrupted": "interrupted",
}
# Text of a model may hold anything; at a terminal, control characters would be obeyed instead of shown.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def show(text: str) -> None:
    """Write text to standard output at once; at a terminal, control characters become visible signs."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def describe(done: Completion) -> str:
    """Return a line about a completion: how many tokens, how fast, why it ended."""
    count = len(done.token_ids)
    tokens = f"{count:,} token{'' if count == 1 else 's'}"
    return f"[{tokens}, {ENDS[done.finish_reason]}; {done.timings.describe()}]"


def stream(loaded: LoadedModel, prompt: str, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Write the continuation of a prompt as it comes, then a line about it on standard error.

    Raises:
        UsageError: The prompt fills the context.
        BrokenPipeError: Nobody reads standard output any more.
        KeyboardInterrupt: Ctrl-C, after the line about what was written so far.
    """
    warn_untokenizable(loaded, prompt)
    pieces = loaded.stream(prompt, sampling, stop=stop)
    try:
        _show_all(pieces)
    except KeyboardInterrupt:
        _end(pieces)
        raise
    _end(pieces)


def print_batch(done: Sequence[Completion], places: Sequence[str]) -> None:
    """Write each continuation under a line that says which prompt it continues."""
    for completion, place in zip(done, places, strict=False):
        show(f"=== {place}: {completion.prompt}\n{completion.text}\n")


def repl(loaded: LoadedModel, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Read prompts from standard input, one a line, and answer each by itself until the input ends.

    A line that is empty is passed over. A prompt that cannot be answered is reported, and the next one is read; only a
    line that is too large to be read ends the loop, since what follows it would be the rest of it.

    Raises:
        DataError: At the end, if the input was no terminal and there was a prompt that could not be answered.
        KeyboardInterrupt: Ctrl-C while the input is no terminal: nobody is there to type the next prompt.
    """
    if not sys.stdin.isatty():
        _converse(loaded, sampling, stop, at_terminal=False)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - being imported is all it takes for `input` to edit lines and remember them
    say("a prompt is continued, each by itself; Ctrl-C stops an answer, Ctrl-D leaves")
    with _handling_interrupts(signal.SIG_IGN):  # but while a line is typed and while an answer is given
        _converse(loaded, sampling, stop, at_terminal=True)


def _converse(loaded: LoadedModel, sampling: SamplingParams, stop: Sequence[str], *, at_terminal: bool) -> None:
    answered = failed = 0
    while True:
        try:
            if (prompt := _next_prompt(at_terminal)) is None:
                break
            if not prompt.strip():
                continue
            (_answer if at_terminal else stream)(loaded, prompt, sampling, stop)
            answered += 1
        except KeyboardInterrupt:  # at the prompt: the line is given up, as in a shell
            if not at_terminal:
                raise
            say("")
        except ResmolError as error:
            failed += 1
            say(f"error: {error.what}\n  fix: {error.fix}")
            if isinstance(error, _LineTooLarge):
                break
    if failed and not at_terminal:
        raise DataError(f"{failed} of {answered + failed} prompts could not be answered", fix="see the messages above")


def warn_untokenizable(loaded: LoadedModel, prompt: str) -> None:
    """Tell when a part of a prompt has no token, so that the model cannot see it."""
    if dropped := loaded.tokenizer.count_untokenizable(prompt):
        say(f"{dropped} bytes of the prompt have no token in this vocabulary and are left out")


class _LineTooLarge(DataError):
    """A line that is not read to its end, which may never come."""


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
    """Return what is typed behind the prompt sign, which never stands in a file that the texts are written to."""
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def _answer(loaded: LoadedModel, prompt: str, sampling: SamplingParams, stop: Sequence[str]) -> None:
    """Stream one answer; the first Ctrl-C ends it, and not the program, nor the line that tells about it."""
    warn_untokenizable(loaded, prompt)
    pieces = loaded.stream(prompt, sampling, stop=stop)
    with _first_interrupt_only():
        with suppress(KeyboardInterrupt):
            _show_all(pieces)
        _end(pieces)


def _end(pieces: TextStreamer) -> None:
    """End the line that the text stands in, and tell about it."""
    show("\n")
    say(describe(pieces.completion()))


def _show_all(pieces: TextStreamer) -> None:
    for piece in pieces:
        show(piece)


def _first_interrupt_only() -> AbstractContextManager[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt and ignore the impatient ones after it, until the context ends."""

    def once(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    return _handling_interrupts(once)


@contextmanager
def _handling_interrupts(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    """Let a handler, or SIG_IGN, answer Ctrl-C until the context ends; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
