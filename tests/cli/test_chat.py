"""Generation at a pseudo-terminal: text streams, Ctrl-C stops one continuation, Ctrl-D exits."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resmol.cli import chat
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import load_model
from resmol.train.start import train_model

SECONDS = 300  # the most that anything here may take; only a broken program comes near
# The model is slowed down, so that there is an answer to interrupt; and Ctrl-C works also where the tests themselves
# run in the background of a shell, which makes their children ignore it.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import resmol.inference.generate as module
from resmol.__main__ import main
fast = module._logits
module._logits = lambda *arguments: (time.sleep(0.02), fast(*arguments))[1]
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def run(
    tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("chat") / "run"
    changes = ["train.steps=2", "model.max_position_embeddings=1024", "sampling.every=0"]
    train_model(tiny_config, path, data=str(tiny_dataset.root), tokenizer=tiny_tokenizer.path, overrides=changes)
    return path


def command(run: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", SLOW, "generate", str(run), *arguments]


ENVIRONMENT = {**os.environ, "TERM": "dumb"}


class Terminal:
    """A program at a terminal of its own, and what it has written there.

    The terminal keeps what was written before a Ctrl-C: by default it throws away what nobody has read yet.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.text = ""
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            settings = termios.tcgetattr(0)
            settings[3] |= termios.NOFLSH
            termios.tcsetattr(0, termios.TCSANOW, settings)
            os.execve(arguments[0], arguments, ENVIRONMENT)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str, keys: str = "") -> str:
        """Return what was written since the last call, up to the pattern; keys are typed once a second until then.

        Python's readline notices a signal only while it waits for a key: one that comes just before waits for the next.
        """
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < deadline, self.text
            self.type(keys)
            if select.select([self.end], [], [], 1.0)[0]:
                self.text += os.read(self.end, 4096).decode(errors="replace")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def exit_code(self, keys: str = "") -> int:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            try:
                self.type(keys)
                if select.select([self.end], [], [], 0.5)[0]:
                    os.read(self.end, 4096)
            except OSError:  # Linux says that the other side is gone
                time.sleep(0.01)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.end)


@pytest.fixture
def terminal(run: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    opened = Terminal(command(run, *request.param))
    yield opened
    opened.close()


LONG = "--max-new-tokens=1000", "--temperature=0"


@pytest.mark.parametrize("terminal", [("--interactive", *LONG)], indirect=True)
def test_a_conversation_at_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-C stops a continuation, Ctrl-D exits.*> ")
    terminal.type("ka lo\n")
    terminal.wait_for(r"ka lo\r\n.*\S")  # text is there long before the answer is complete
    terminal.type("\x03")
    told = terminal.wait_for(r"\[(\d+) tokens?, interrupted.*\].*> ")
    assert int(re.findall(r"\[(\d+) token", told)[0]) < 900
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.wait_for("> ", keys="\x03")
    terminal.type("\n")  # an empty line is no prompt
    terminal.wait_for("> ")
    terminal.type("9" * 1030 + "\n")
    terminal.wait_for(r"error: the prompt has 1,030 tokens.*> ")
    terminal.type("mi\n")
    terminal.wait_for(r"mi\r\n.*\S")
    terminal.type("\x03\x03\x03")
    terminal.wait_for(r"interrupted.*> ")
    assert terminal.exit_code(keys="\x04") == 0


@pytest.mark.parametrize("terminal", [("--prompt=ka lo", *LONG)], indirect=True)
def test_an_interrupted_text_still_ends_with_a_line_about_it(terminal: Terminal) -> None:
    terminal.wait_for(r"sha256 \w+\r\n.*\S")
    terminal.type("\x03")
    terminal.wait_for(r"\r\n\[\d+ tokens?, interrupted.*\]\r\n")
    assert terminal.exit_code() == 130


def test_an_impatient_second_interrupt_does_not_take_the_line_about_the_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def write(text: str) -> None:  # Ctrl-C with the first piece, and again with the line break behind the answer
        written.append(text)
        if len(written) == 1 or text == "\n":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "write", write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat._stream_interruptibly(load_model(run), "ka lo", SamplingParams(temperature=0.0), ())
    except KeyboardInterrupt:
        pytest.fail("the second interrupt was not ignored")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(written) == 2
    assert "interrupted" in capsys.readouterr().err


def test_an_impatient_second_interrupt_at_the_prompt_does_not_leave(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def typed() -> str:
        asked.append("")
        if len(asked) == 1:
            signal.raise_signal(signal.SIGINT)
        raise EOFError

    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(chat, "_typed", typed)
    monkeypatch.setattr(chat, "say", lambda _line: signal.raise_signal(signal.SIGINT) if asked else None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat.repl(load_model(run), SamplingParams(), ())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    except KeyboardInterrupt:
        pytest.fail("the second interrupt was not ignored")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(asked) == 2


def piped(run: Path, content: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(run, "--interactive", *arguments), input=content, capture_output=True, env=ENVIRONMENT, timeout=SECONDS
    )


def test_a_pipe_is_answered_line_by_line_and_its_bad_lines_decide_the_exit_code(run: Path) -> None:
    done = piped(run, b"ka\n\n\xff\nlo", "--max-new-tokens=4", "--temperature=0")
    assert done.returncode == 3
    told = done.stderr.decode()
    assert told.count("token limit") == 2
    assert "the line is not UTF-8: byte 1 is 0xff" in told
    assert "1 of 3 prompts could not be continued" in told
    assert b"> " not in done.stdout
    assert "Ctrl-C" not in told
    fine = piped(run, b"ka\nlo\n", "--max-new-tokens=4", "--temperature=0")
    assert (fine.returncode, fine.stdout) == (0, done.stdout)


def test_a_line_without_an_end_is_not_read_into_memory(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(chat, "MAX_BYTES", 4 << 20)
    monkeypatch.setattr(chat, "stream", lambda _loaded, prompt, *_: asked.append(prompt))
    content = io.BytesIO(b"ka\n" + b"x" * (10 << 20) + b"\nlo\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    with pytest.raises(DataError, match="1 of 2 prompts could not be continued"):
        chat.repl(load_model(run), SamplingParams(), ())
    assert asked == ["ka"]
    assert "error: the line is larger than 4 MiB\n  fix: " in capsys.readouterr().err
    assert content.tell() < 5 << 20


def test_the_prompt_sign_is_no_part_of_the_texts(run: Path) -> None:
    """The texts go into a file while prompts are typed at a terminal."""
    keyboard, terminal_end = pty.openpty()
    arguments = command(run, "--interactive", "--max-new-tokens=4", "--temperature=0")
    try:
        with subprocess.Popen(
            arguments, stdin=terminal_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        ) as process:
            os.write(keyboard, b"ka\n\x04")
            texts, told = process.communicate(timeout=SECONDS)
    finally:
        os.close(keyboard)
        os.close(terminal_end)
    assert process.returncode == 0
    assert texts == piped(run, b"ka\n", "--max-new-tokens=4", "--temperature=0").stdout
    assert told.count(b"\n> ") == 2


def test_an_interrupt_leaves_a_program_that_reads_a_pipe(run: Path) -> None:
    with subprocess.Popen(
        command(run, "--interactive", *LONG),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"ka\nlo\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stderr.read().count(b", interrupted;") == 1


def test_a_reader_that_leaves_is_no_internal_error(run: Path) -> None:
    with subprocess.Popen(
        command(run, "--prompt=ka", *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(SECONDS) != 0
        told = process.stderr.read()
    assert b"Traceback" not in told
    assert b"internal error" not in told


def test_control_characters_are_shown_at_a_terminal_and_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07\x9b\tb\n\x7f"

    class Out:
        encoding = "utf-8"

        def __init__(self, at_terminal: bool) -> None:
            self.isatty, self.written, self.flush = lambda: at_terminal, "", lambda: None

        def write(self, text: str) -> None:
            self.written += text

    for at_terminal, expected in ((True, "a␛[2J␇\ufffd\tb\n␡"), (False, text)):
        out = Out(at_terminal)
        monkeypatch.setattr(sys, "stdout", out)
        chat.write(text)
        assert out.written == expected
