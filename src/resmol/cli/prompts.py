"""Read prompts from the command line, standard input or a file.

Prompts are UTF-8. Other text is refused with the place of the first wrong byte, never repaired silently.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resmol.errors import DataError

MAX_BYTES = 16 << 20  # a thousand times the largest context of these models
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place in the input, such as ``line 3``."""

    text: str
    place: str


def given_prompt(text: str) -> str:
    """Return the prompt given on the command line; ``-`` reads it from standard input.

    One line break at the end of standard input is dropped, as ``$(...)`` does, since ``echo`` adds one.

    Raises:
        DataError: It is not UTF-8, or too large.
    """
    if text == "-":
        return one_line(decoded(_read(sys.stdin.buffer.read, "standard input"), "standard input"))
    if _holds_surrogate(text):  # Python decodes arguments that are not UTF-8 to surrogates
        raise DataError("--prompt is not UTF-8", fix="pass the text as UTF-8")
    return text


def prompts_from(path: str) -> list[Prompt]:
    """Read the prompts of a file, in order; ``-`` is standard input.

    A file whose name ends with .jsonl or .ndjson holds a JSON object with a string ``prompt`` on each line; other
    fields are ignored. Any other file holds a prompt on each line. Lines with nothing but white space are skipped.

    Raises:
        DataError: The file does not exist, is too large, holds no prompt, or holds bad lines; all of these are named.
    """
    name = "standard input" if path == "-" else path
    if path == "-":
        content = _read(sys.stdin.buffer.read, name)
    else:
        if Path(path).is_dir():
            raise DataError(f"{path} is a folder", fix="name a file with a prompt on each line")
        if not Path(path).exists():
            raise DataError(f"{path} does not exist", fix="check --prompts")
        with Path(path).open("rb") as file:
            content = _read(file.read, name)
    as_json = Path(path).suffix.lower() in (".jsonl", ".ndjson")
    found, problems = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = one_line(decoded(line, f"line {number}"))
            found.append(Prompt(_json_prompt(text, number) if as_json else text, f"line {number}"))
        except DataError as error:
            problems.append(error.what)
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise DataError(f"{name}: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}", fix="correct these lines")
    if not found:
        raise DataError(f"{name} holds no prompt", fix="write one on each line")
    return found


def decoded(data: bytes, name: str) -> str:
    """Return UTF-8 as text (`DataError` names the first wrong byte)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}",
            fix="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from None


def one_line(text: str) -> str:
    """Return the text without a line break at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _json_prompt(line: str, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"line {number} is not JSON ({reason})", fix="") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f'line {number} has no string "prompt"', fix="")
    if _holds_surrogate(prompt):
        raise DataError(f"line {number} holds half a character (a surrogate without its partner)", fix="")
    return prompt


def _holds_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _read(read: Callable[[int], bytes], name: str) -> bytes:
    content = read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} is larger than {MAX_BYTES >> 20} MiB", fix="shorten it, or cut it into several")
    return content
