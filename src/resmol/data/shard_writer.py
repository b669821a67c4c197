"""Writes token shards in the layout that `shards` reads."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from resmol.data.saved_state import State, UnusableStateError, as_array, from_array
from resmol.data.shards import Shard, shard_file_sha256, token_dtype
from resmol.data.tokenizer import Tokenizer
from resmol.data.tokenizer_files import SMOLLM2_HUB_ID, SMOLLM2_TOKENIZER_SHA256
from resmol.system.atomic_io import fsync_path

_READ_BYTES = 1 << 20


class SplitWriter:
    """The shards of one split, written one after another; a document never crosses a border.

    Attributes:
        tokens: Tokens written so far, over all shards.
        documents: Documents ended so far, over all shards.
    """

    def __init__(self, root: Path, split: str, *, token_bytes: int, tokenizer: str, shard_tokens: int) -> None:
        self.tokens = 0
        self.documents = 0
        self._root = root
        self._split = split
        self._token_bytes = token_bytes
        self._dtype = token_dtype(token_bytes)
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._done: list[Shard] = []
        self._file: BinaryIO | None = None
        self._shard_start = 0  # in tokens of the split
        self._ends = array("Q")  # of the open shard, in tokens from its start

    def state(self) -> State:
        """Return where it is, for `resume`; all that was written is on disk afterwards."""
        facts = [self.tokens, self.documents, self._shard_start, [shard.model_dump() for shard in self._done]]
        return {"facts": as_array([*facts, self._open_sha256()]), "ends": np.array(self._ends, dtype=np.uint64)}

    def resume(self, state: State) -> None:
        """Go on where another writer of the same folder was; what it wrote later is removed.

        Raises:
            UnusableStateError: The files are not those that it wrote.
        """
        self.tokens, self.documents, self._shard_start, done, open_sha256 = from_array(state["facts"])
        self._ends = array("Q", state["ends"].tobytes())
        known = set()
        for shard in map(Shard.model_validate, done):
            path = self._root / shard.name
            index, metadata = _index(path), _metadata(path)
            if (_sha256(path), _sha256(index)) != (shard.sha256, shard.index_sha256):
                raise UnusableStateError(f"{shard.name} is damaged")
            self._write_metadata(path, shard.tokens)
            self._done.append(shard)
            known |= {path, index, metadata}
        if open_sha256 is not None:
            path = self._root / self._name()
            if _sha256(path, self._shard_bytes()) != open_sha256:
                raise UnusableStateError(f"{self._name()} is damaged")
            self._file = path.open("r+b")
            self._truncate(self.tokens - self._shard_start)
            known.add(path)
        for path in {*(self._root / self._split).glob("*")} - known:
            path.unlink()

    def _open_sha256(self) -> str | None:
        """Return the SHA-256 of the open shard, which is made durable; None where there is none."""
        if self._file is None:
            return None
        self._file.flush()
        path = self._root / self._name()
        fsync_path(path)
        fsync_path(path.parent)
        return _sha256(path, self._shard_bytes())

    def _shard_bytes(self) -> int:
        return (self.tokens - self._shard_start) * self._token_bytes

    def append(self, ids: Int64[np.ndarray, " n"]) -> None:
        """Add tokens to the current document."""
        if self._file is None or (self._at_document_end() and self.tokens - self._shard_start >= self._shard_tokens):
            self._begin_shard()
        assert self._file is not None
        self._file.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)

    def end_document(self) -> None:
        """Note that the current document ends here."""
        self._ends.append(self.tokens - self._shard_start)
        self.documents += 1

    def last_document_tokens(self) -> int:
        """Return the length of the last document in tokens, its end token included."""
        return self._ends[-1] - (self._ends[-2] if len(self._ends) > 1 else 0)

    def discard_document(self) -> None:
        """Remove the tokens of the current document, which has not ended."""
        if self._file is not None:
            left = self._ends[-1] if self._ends else 0
            self._truncate(left)
            self.tokens = self._shard_start + left

    def take_back(self, count: int) -> Int64[np.ndarray, " n"]:
        """Remove the last ``count`` tokens, at most the last document, and return them."""
        assert self._file is not None
        assert 0 < count <= self.last_document_tokens()
        left = self.tokens - self._shard_start - count
        self._file.seek(left * self._token_bytes)
        taken = np.frombuffer(self._file.read(), dtype=self._dtype).astype(np.int64)
        self._truncate(left)
        whole = count == self.last_document_tokens()
        self._ends.pop()
        if whole:
            self.documents -= 1
        else:
            self._ends.append(left)
        self.tokens -= count
        return taken

    def _truncate(self, tokens: int) -> None:
        """Leave only the first tokens of the open shard."""
        assert self._file is not None
        self._file.seek(tokens * self._token_bytes)
        self._file.truncate()

    def finish(self) -> tuple[Shard, ...]:
        """Complete the last shard; return all of them. Every file is on disk afterwards."""
        self._end_shard()
        return tuple(self._done)

    def close(self) -> None:
        """Close the open file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _at_document_end(self) -> bool:
        return len(self._ends) > 0 and self._ends[-1] == self.tokens - self._shard_start

    def _name(self) -> str:
        return f"{self._split}/{len(self._done):05d}.ds"

    def _begin_shard(self) -> None:
        self._end_shard()
        path = self._root / self._name()
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("w+b")
        self._shard_start = self.tokens
        self._ends = array("Q")

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self.close()
        if not self._ends:  # begun by a document that was discarded
            (self._root / self._name()).unlink()
            return
        write_index(self._root / self._name(), self._ends)
        self._write_metadata(self._root / self._name(), self._ends[-1])
        fsync_path(self._root / self._name())
        self._done.append(describe_shard(self._root, self._name(), self._ends))

    def _write_metadata(self, path: Path, tokens: int) -> None:
        metadata = _metadata(path)
        lines = (f"{self._tokenizer}|{self._token_bytes}", str(tokens), _for_people(tokens))
        metadata.write_text("\n".join(lines), encoding="utf-8", newline="\n")
        fsync_path(metadata)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _metadata(path: Path) -> Path:
    return path.with_name(f"{path.name}.metadata")


def _sha256(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first bytes; empty where there is none."""
    digest, left = hashlib.sha256(), sys.maxsize if size is None else size
    with suppress(OSError), path.open("rb") as file:
        while block := file.read(min(left, _READ_BYTES)):
            digest.update(block)
            left -= len(block)
        return digest.hexdigest() if size is None or left == 0 else ""
    return ""


def write_index(path: Path, ends: Sequence[int]) -> None:
    """Write the `.index` of the token file ``path``: document ends, little-endian uint64; fsynced."""
    index = _index(path)
    index.write_bytes(np.array(ends, dtype="<u8").tobytes())
    fsync_path(index)


def describe_shard(root: Path, name: str, ends: Sequence[int]) -> Shard:
    """Return the manifest's entry of a shard whose files are complete; reads them for their hashes.

    Args:
        root: The dataset's folder.
        name: The token file, relative to it.
        ends: The document ends, in tokens.
    """
    path = root / name
    return Shard(
        name=name,
        bytes=path.stat().st_size,
        sha256=shard_file_sha256(path),
        index_sha256=shard_file_sha256(_index(path)),
        start=0,
        tokens=int(ends[-1]) if len(ends) else 0,
        documents=len(ends),
    )


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's name for a `.metadata` file: a Hub id, or its hash; never a local path."""
    return SMOLLM2_HUB_ID if tokenizer.sha256 == SMOLLM2_TOKENIZER_SHA256 else f"sha256:{tokenizer.sha256}"


def _for_people(tokens: int) -> str:
    for size, unit in ((10**9, "GT"), (10**6, "MT"), (10**3, "kT")):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens} T"
