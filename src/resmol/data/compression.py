"""Compressed files: which compression it is, and what it unpacks to, streaming; damage and bombs are refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from resmol.errors import DataError

PACKED_HEAD_BYTES = 1 << 20  # bzip2 unpacks nothing before a block is whole, up to 900 kB
MAX_RATIO = 500  # text reaches 3 to 10, the logs of a machine perhaps 100; gzip can reach 1,032, Zstandard 30,000
BOMB_BYTES = 256 << 20  # the ratio counts from here on
# What the libraries raise for damage: zlib.error and LZMAError are no OSError; a file that ends too early is EOFError.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _zstandard(stream: io.BufferedIOBase) -> Any:
    """Return a reader of all frames: Arrow's says where a stream was cut off, which the zstandard package does not."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")


def _xz(stream: io.BufferedIOBase) -> Any:
    return lzma.LZMAFile(cast(BinaryIO, stream))


@dataclass(frozen=True)
class Compression:
    """One compression.

    Attributes:
        suffix: How names of its files end.
        sign: How its files begin.
        open: Makes a reader of the content from a stream of the file; it has ``read(size)``.
    """

    suffix: str
    sign: re.Pattern[bytes]
    open: Callable[[io.BufferedIOBase], Any]


COMPRESSIONS = (
    Compression(".gz", re.compile(rb"\x1f\x8b"), lambda stream: gzip.GzipFile(fileobj=stream)),
    Compression(".zst", re.compile(rb"\x28\xb5\x2f\xfd"), _zstandard),
    Compression(".xz", re.compile(rb"\xfd7zXZ\0"), _xz),
    Compression(".bz2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), lambda stream: bz2.BZ2File(stream)),
)
COMPRESSED_SUFFIXES = tuple(one.suffix for one in COMPRESSIONS)


def compression_of(name: str, head: bytes) -> Compression | None:
    """Return the compression of a file by its beginning, else by its name; None where it has none."""
    by_content = next((one for one in COMPRESSIONS if one.sign.match(head)), None)
    by_name = next((one for one in COMPRESSIONS if head and name.lower().endswith(one.suffix)), None)
    return by_content or by_name


def unpacked_name(name: str) -> str:
    """Return a file's name without the ending of its compression."""
    return next((name[: -len(end)] for end in COMPRESSED_SUFFIXES if name.lower().endswith(end)), name)


def unpacked_head(compression: Compression, head: bytes, size: int) -> bytes:
    """Return the first ``size`` bytes of the content, or as many as the beginning of a file holds."""
    content = b""
    try:
        reader = compression.open(io.BytesIO(head))
        while len(content) < size and (more := reader.read(min(4096, size - len(content)))):
            content += more
    except DAMAGE:
        pass  # the head ends within the file; reading the file says whether anything is wrong with it
    return content


class Unpacked(io.RawIOBase):
    """The content of a compressed file as a stream of bytes.

    Args:
        compression: Its compression.
        stream: The file.
        packed_bytes: How many bytes of the file were read so far.
        name: The file, for messages.
    """

    def __init__(
        self, compression: Compression, stream: io.BufferedIOBase, packed_bytes: Callable[[], int], name: object
    ) -> None:
        self._reader = compression.open(stream)
        self._bomb_check = BombCheck(name)
        self._packed_bytes = packed_bytes

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with the next bytes (`DataError` once they are a bomb)."""
        data = self._reader.read(len(buffer))
        self._bomb_check.add(len(data), self._packed_bytes())
        buffer[: len(data)] = data
        return len(data)


class BombCheck:
    """Refuses a file that unpacks to far more than any text does: disk and time are finite, whatever the memory."""

    def __init__(self, name: object) -> None:
        self._name = name
        self._unpacked = 0

    def add(self, unpacked: int, packed_bytes: int) -> None:
        """Count what was unpacked.

        Raises:
            DataError: It is more than `MAX_RATIO` times what was read of the file.
        """
        self._unpacked += unpacked
        if self._unpacked > BOMB_BYTES and self._unpacked > MAX_RATIO * packed_bytes:
            raise DataError(
                f"{self._name} unpacks to more than {MAX_RATIO} times its size: {self._unpacked / 1e6:,.0f} MB from "
                f"the first {packed_bytes / 1e6:,.1f} MB",
                fix="look at what is in it; if it is the text that you want, unpack it and name the unpacked file",
            )
