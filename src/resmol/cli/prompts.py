"""Read prompts from the command line, standard input or a file.

Prompts are UTF-8, or what a byte order mark says. A text that is not is refused with the place of the first wrong byte,
never repaired in silence; a file in another format is refused by that format's name.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from resmol.data.format_signatures import CSV_SUFFIXES, TABLE_NAMES, UnsupportedFormat
from resmol.data.formats import HEAD_BYTES, JSON_SUFFIXES, recognize
from resmol.errors import DataError
from resmol.system.byte_order_mark import decode_text, marked_encoding
from resmol.system.user_paths import user_path

MAX_BYTES = 16 << 20  # a thousand times the largest context of these models
_SHOWN_PROBLEMS = 5
_SHOWN_CHARS = 40  # of an option's value
_FIX = 'write a prompt on each line, or in a .jsonl file an object with a string "prompt" on each line'


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


def escape_notice(option: str, text: str) -> str:
    """Return a sentence about an escape of a line break or tab, which an option takes as it is; "" without one."""
    found = re.search(r"\\[nrt]", text)
    if found is None:
        return ""
    written = text if len(text) <= _SHOWN_CHARS and "'" not in text and text.isprintable() else f"...{found[0]}..."
    return (
        f"note: {option} holds a backslash and the letter {found[0][1]}, taken as they are; for a line break or a tab, "
        f"bash and zsh write {option} $'{written}'"
    )


def prompts_from(path: str) -> list[Prompt]:
    """Read the prompts of a file, in order; ``-`` is standard input.

    JSON lines, recognized by a name such as .jsonl or by a first line with a ``prompt``, hold an object with a string
    ``prompt`` on each line; other fields are ignored. Any other text holds a prompt on each line. Lines with nothing
    but white space are left out.

    Raises:
        DataError: The file is not there, too large, no text, holds no prompt, or bad lines: all of them are named.
    """
    name = "standard input" if path == "-" else path
    if path == "-":
        content = _read(sys.stdin.buffer.read, name)
    else:
        file_path = user_path(path)
        if file_path.is_dir():
            raise DataError(f"{path} is a folder", fix="name a file with a prompt on each line")
        if not file_path.exists():
            raise DataError(f"{path} does not exist", fix="check --prompts")
        with file_path.open("rb") as file:
            content = _read(file.read, name)
    as_json = _is_json(path, content)
    found, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
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


def _is_json(path: str, content: bytes) -> bool:
    """Return whether prompts are JSON lines; refuse what is neither these nor text."""
    named_so = path.lower().endswith((*JSON_SUFFIXES, *CSV_SUFFIXES))
    kind = recognize(path, content[:HEAD_BYTES], "auto" if named_so else "text")
    other = kind.name if isinstance(kind, UnsupportedFormat) else TABLE_NAMES.get(kind)
    if other is not None:
        raise DataError(f"{path} is {other}, which is not read as prompts", fix=_FIX)
    if kind == "jsonl":
        return True
    first = next((line for line in content.split(b"\n") if line.strip()), b"")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("prompt"), str)


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
    """Return all there is as UTF-8 without a byte order mark; without one, the bytes as they are."""
    content = read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} is larger than {MAX_BYTES >> 20} MiB", fix="shorten it, or cut it into several")
    encoding = marked_encoding(content)
    if encoding in (None, "utf-8"):
        return content.removeprefix(codecs.BOM_UTF8)
    try:
        return decode_text(content).encode("utf-8")
    except UnicodeError as error:
        raise DataError(
            f"{name} is not {encoding}, which its byte order mark says: {error}", fix="write it as UTF-8"
        ) from None
