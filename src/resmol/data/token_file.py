"""A file of token ids, read piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np


class TokenFile:
    """The tokens of a file, as an array that is read where it is sliced.

    It is read and not mapped: a window is a few kB, some file systems cannot map files, and a mapped file that shrinks
    kills the process. It is opened for each piece, so that a thousand shards do not need a thousand descriptors.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> None:
        """Keep the path; the file is looked at when it is read, or asked for its length."""
        self._path, self._dtype = path, dtype

    def __len__(self) -> int:
        return self._path.stat().st_size // self._dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop).

        Raises:
            EOFError: The file ends before that.
            OSError: It cannot be read.
        """
        wanted = (stop - start) * self._dtype.itemsize
        with self._path.open("rb", buffering=0) as file:
            file.seek(start * self._dtype.itemsize)
            content = file.read(wanted)
            while len(content) < wanted and (more := file.read(wanted - len(content))):
                content += more
        if len(content) != wanted:
            raise EOFError(f"it ends before token {stop}")
        return np.frombuffer(content, dtype=self._dtype)
