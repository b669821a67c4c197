"""What an attacker hands in, and the child processes that meet it; no test in here. See test_hostile.py."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import os
import pathlib
import pickle
import resource
import runpy
import struct
import subprocess
import tarfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch

from resmol.__main__ import run as run_command_line
from resmol.errors import ResmolError

# --- pickles that do something ---------------------------------------------------------------------------------


class Reduced:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class AmongItems:
    """Unpickled, another object is unpickled on the way."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __reduce__(self) -> Any:
        return (dict, (), None, None, iter([("key", self.item)]))


def pickles(canary: Path) -> dict[str, bytes]:
    """Return twelve files that create ``canary`` when they are loaded as what they are."""
    path, touch = str(canary), f"touch {canary}"
    call = Reduced(pathlib.Path.touch, canary)
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"weight": call}, archive)
    torch.save({"weight": call}, legacy, _use_new_zipfile_serialization=False)
    array = pickle.dumps([call], protocol=3)
    npy_header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return {
        "os.system, protocol 0": f"cposix\nsystem\n(S'{touch}'\ntR.".encode(),
        "INST, protocol 0": f"(S'{touch}'\niposix\nsystem\n.".encode(),
        "exec, protocol 2": pickle.dumps(Reduced(builtins.exec, f"open({path!r}, 'w')"), protocol=2),
        "eval, protocol 3": pickle.dumps(Reduced(builtins.eval, f"open({path!r}, 'w')"), protocol=3),
        "open, protocol 4": pickle.dumps(Reduced(builtins.open, path, "w"), protocol=4),
        "subprocess, protocol 5": pickle.dumps(Reduced(subprocess.check_call, ["touch", path]), protocol=5),
        "runpy, inside a dictionary": pickle.dumps(AmongItems(Reduced(runpy._run_code, f"open({path!r}, 'w')", {}))),
        "torch.save, zip": archive.getvalue(),
        "torch.save, legacy": legacy.getvalue(),
        "numpy object array": b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + npy_header + array,
        "gzip of a pickle": gzip.compress(pickle.dumps(call)),
        "tar of a pickle": tar_of("pickle", pickle.dumps(call, protocol=2)),
    }


def tar_of(name: str, content: bytes) -> bytes:
    """Return an uncompressed archive with one member."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


def load_as_what_it_is(kind: str, content: bytes) -> int:
    """Be the victim: load a file of `pickles` in the way that it is made for."""
    import numpy as np

    stream = io.BytesIO(content)
    with suppress(Exception):
        if kind.startswith("torch.save"):
            torch.load(stream, weights_only=False)
        elif kind.startswith("numpy"):
            np.load(stream, allow_pickle=True)
        elif kind.startswith("gzip"):
            pickle.loads(gzip.decompress(content))
        elif kind.startswith("tar"):
            with tarfile.open(fileobj=stream) as tar:
                member = tar.extractfile("pickle")
                assert member is not None
                pickle.load(member)
        else:
            pickle.loads(content)
    return 0


def load_dcp(folder: Path) -> int:
    """Be the victim: read the metadata of a distributed checkpoint as PyTorch does."""
    from torch.distributed.checkpoint import FileSystemReader

    with suppress(Exception):
        FileSystemReader(folder).read_metadata()
    return 0


# --- a child that tries things and survives --------------------------------------------------------------------


def run_commands(commands: Sequence[Sequence[str]], report: Path, environment: dict[str, str] | None = None) -> int:
    """Run command lines one after another here; report exit code, output, processor time and growth of each."""
    os.environ.update(environment or {})
    os.chdir(report.parent)
    outcomes = []
    for command in commands:
        output = io.StringIO()
        started, before = busy_seconds(), resident_bytes()
        try:
            with redirect_stdout(output), redirect_stderr(output):
                code = run_command_line([word for word in command if word != "--debug"], debug="--debug" in command)
        except BaseException:
            code = -1
            output.write(traceback.format_exc())
        seconds, growth = busy_seconds() - started, resident_bytes() - before
        outcomes.append({"code": code, "output": output.getvalue(), "seconds": seconds, "growth": growth})
    report.write_text(json.dumps(outcomes), encoding="utf-8")
    return 0


def busy_seconds() -> float:
    """Return the processor time of this process and of the children that it waited for: no other program adds to it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident_bytes() -> int:
    """Return the resident size of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the largest resident size since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let the peak begin again, where the kernel can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_each(reader: Callable[[Path], object], files: Sequence[Path], report: Path, cap: int = 0) -> int:
    """Read files one after another; report what was raised, the processor time, and the growth of the peak."""
    cap_memory(cap)
    outcomes = []
    for path in files:
        forget_peak()
        started, before = busy_seconds(), peak_bytes()
        raised, said = attempt(reader, path)
        outcome = {"raised": raised, "said": said, "growth": peak_bytes() - before}
        outcomes.append(outcome | {"seconds": busy_seconds() - started})
    report.write_text(json.dumps(outcomes), encoding="utf-8")
    return 0


def attempt(reader: Callable[[Path], object], path: Path) -> tuple[str, str]:
    """Return the name of what reading raised ("" for nothing, "ResmolError" for all errors of ours) and its text."""
    try:
        reader(path)
    except ResmolError as error:
        return "ResmolError", error.what
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()[-1500:]
    return "", ""


def cap_memory(more: int) -> None:
    """Limit the address space to what it is plus ``more`` bytes."""
    if more:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --- changed bytes ---------------------------------------------------------------------------------------------

ODD_BYTES = (
    b"", b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"-Infinity", b"null", b"[]", b"{}", b'""', b'"\\ud800"', b"true",
    b"9" * 30, b"9" * 5000, b"[" * 200, b"[" * 100_000, b'{"a":' * 50_000, b"1.0", b"18446744073709551616", b"'", b'"',
    b"\n", b"\xe2\x80\xae", b"\xed\xa0\x80", b"../../etc/passwd", b"\\u0000",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**40, 1.5, 1e308, float("nan"), float("inf"), "", "x" * 10_000,
    "\ud800", "\0", "../../x", "/etc/passwd", [], [[]], {}, {"a": {}}, [0] * 100, "é", -(2**63),
)  # fmt: skip


def mutated(content: bytes, draw: Random) -> bytes:
    """Change some bytes: flips, odd pieces put in, pieces taken out, doubled or moved."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        length = min(draw.choice((1, 2, 4, 8, 64, 4096)), len(data) - at)
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = draw.choice(ODD_BYTES)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
        elif kind == 4:
            data[at : at + length] = draw.randbytes(length)
        else:
            other = draw.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def mutated_value(value: Any, draw: Random) -> Any:
    """Replace something inside a JSON value by something odd, take it out, or add something."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, action = draw.choice(list(value)), draw.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return value | {draw.choice(["", "extra", "__metadata__", key + " ", "\ud800"]): draw.choice(ODD_VALUES)}
        return value | {key: mutated_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutated_value(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD_VALUES)


def mutated_json(content: bytes, draw: Random) -> bytes:
    """Change bytes, or values with the syntax kept; half and half."""
    if draw.random() < 0.5:
        return mutated(content, draw)
    return json.dumps(mutated_value(json.loads(content), draw)).encode()


def fuzz(
    reader: Callable[[Path], object], path: Path, write: Callable[[Path, Random], None], seed: str, trials: int,
    seconds: float, report: Path, cap: int,
) -> int:  # fmt: skip
    """Read changed files for so many trials, or seconds if five were made by then; report all but errors of ours."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic in Rust writes to the descriptor
    cap_memory(cap)
    draw, done, refused, found = Random(seed), 0, 0, []
    until, longest = time.perf_counter() + seconds, 0.0
    while done < trials and (done < 5 or time.perf_counter() < until) and len(found) < 5:
        write(path, draw)
        started = busy_seconds()
        raised, said = attempt(reader, path)
        longest = max(longest, busy_seconds() - started)
        done, refused = done + 1, refused + (raised == "ResmolError")
        if raised not in ("", "ResmolError"):
            path.with_name(f"found-{len(found)}").write_bytes(path.read_bytes() if path.is_file() else b"")
            found.append(f"{seed}, trial {done}: {said[-600:]}")
    outcome = {"trials": done, "refused": refused, "found": found, "longest": longest}
    report.write_text(json.dumps(outcome), encoding="utf-8")
    return 0


# --- archives --------------------------------------------------------------------------------------------------


def bomb(path: Path, name: str, size: int, claim: int) -> None:
    """Write a zip whose one member unpacks to ``size`` zero bytes and claims to have ``claim``."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    data = b"".join(squeeze.compress(block) for _ in range(size >> 20)) + squeeze.flush()
    raw = name.encode()
    fields = struct.pack("<HHHIIIHH", 0, 8, 0, 0, len(data), claim, len(raw), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + fields + raw
    entry = b"PK\x01\x02" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + raw
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local) + len(data), 0)
    path.write_bytes(local + data + entry + b"PK\x05\x06" + end)


def zip_with_links(path: Path, names: Sequence[str]) -> None:
    """Write a zip whose members are links and names that lead elsewhere."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")


def all_files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
