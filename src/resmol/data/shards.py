"""Token shards on disk: the `.ds` layout of datatrove, plus a manifest that makes it checkable.

For each shard, three files (huggingface/datatrove, ``pipeline/tokens/tokenizer.py``, class
``TokenizedFile``)::

    00000.ds            token ids, little-endian, 2 bytes each up to a vocabulary of 65,536, else 4
    00000.ds.index      the end of each document in tokens from the start of the shard, little-endian uint64
    00000.ds.metadata   three lines of text: tokenizer|bytes per token, number of tokens, that number for
    people

and one `manifest.json` for the folder, written last. It comes from outside like any file: names, sizes and
sums are checked before a token is read. docs/data-format.md describes every field.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int64, Integer
from pydantic import Field, ValidationError, model_validator

from resmol.config.strict_model import StrictModel
from resmol.data.source_facts import Count, Digest, SourceFacts
from resmol.data.token_file import TokenFile
from resmol.errors import DataError
from resmol.system.atomic_io import file_sha256
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "resmol-dataset"
SPLITS = ("train", "val")

_MAX_MANIFEST_BYTES = 64 << 20
_NAME = re.compile(r"(?:(?:train|val)/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.ds", re.ASCII)


class Shard(StrictModel):
    """One token file and the part of it that belongs to a split (all of it, in shards that resmol wrote)."""

    name: str
    bytes: Count
    sha256: Digest
    index_sha256: Digest
    start: Count
    tokens: Count
    documents: Count


class Split(StrictModel):
    """The shards of train or val, in order."""

    tokens: Count
    documents: Count
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Split:
        """Return the split that consists of ``shards``."""
        tokens, documents = sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)
        return cls(tokens=tokens, documents=documents, shards=tuple(shards))

    @model_validator(mode="after")
    def _sums_match(self) -> Split:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("tokens is not the sum over the shards")
        if self.documents != sum(shard.documents for shard in self.shards):
            raise ValueError("documents is not the sum over the shards")
        return self


class TokenizerFacts(StrictModel):
    """The tokenizer that made the tokens."""

    sha256: Digest
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31)]
    eos_id: Count


class Manifest(StrictModel):
    """The content of `manifest.json`."""

    format: Literal["resmol-dataset"] = "resmol-dataset"
    format_version: Literal[1] = 1
    created_with: str
    tokenizer: TokenizerFacts
    token_bytes: Literal[2, 4]
    train: Split
    val: Split
    source: SourceFacts

    @model_validator(mode="after")
    def _shards_are_sound(self) -> Manifest:
        for shard in (*self.train.shards, *self.val.shards):
            if not _NAME.fullmatch(shard.name):
                raise ValueError(f"shard name {shard.name!r} is not a plain relative name")
            if shard.bytes % self.token_bytes or (shard.start + shard.tokens) * self.token_bytes > shard.bytes:
                raise ValueError(f"{shard.name}: bytes, start and tokens do not fit together")
        return self

    def to_json(self) -> bytes:
        """Return the bytes of the file: sorted keys, indented, with a newline at the end."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode("utf-8")


class TokenStream:
    """The tokens of one split as one sequence, read where it is asked for.

    Attributes:
        root: The folder of the dataset.
        shards: The shards in order.
        vocab_size: Ids must be below this.
    """

    def __init__(self, root: Path, shards: Sequence[Shard], *, token_bytes: int, vocab_size: int) -> None:
        self.root = root
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self._dtype = token_dtype(token_bytes)
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def read(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Return the tokens [start, stop), across shard borders.

        Raises:
            DataError: An id outside the vocabulary (with its shard and offset), or a shard that shrank.
            IndexError: The range is not inside the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            number = bisect.bisect_right(self._ends, position)
            offset = position - (self._ends[number] - self.shards[number].tokens)
            count = min(stop, self._ends[number]) - position
            tokens[position - start : position - start + count] = self._slice(number, offset, count)
            position += count
        return tokens

    def _slice(self, number: int, offset: int, count: int) -> Integer[np.ndarray, " n"]:
        shard = self.shards[number]
        path, first = self.root / shard.name, shard.start + offset
        try:
            piece = TokenFile(path, self._dtype).read(first, first + count)
        except (OSError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        # Checked here, on the processor: on a GPU a bad id would be an assertion much later, without a name.
        if int(piece.max()) >= self.vocab_size:
            bad = int(np.argmax(piece >= self.vocab_size))
            raise DataError(
                f"{shard.name}: token {first + bad} is {int(piece[bad])} of {self.vocab_size}",
                fix="the shard is damaged or was made with another tokenizer; prepare the data again",
            )
        return piece


@dataclass(frozen=True)
class Dataset:
    """A prepared folder.

    Attributes:
        root: The folder.
        train: The tokens to train on.
        val: The held-out tokens; may be empty.
        tokenizer_sha256: The hash of the `tokenizer.json` that made the tokens.
        vocab_size: Its vocabulary.
        eos_id: The token at the end of each document.
        fingerprint: SHA-256 over all that determines the tokens and their order; the folder's path does not.
        manifest: All that is recorded about the data.
    """

    root: Path
    train: TokenStream
    val: TokenStream
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    fingerprint: str
    manifest: Manifest

    def __repr__(self) -> str:
        train, val = counted(len(self.train), "token"), counted(len(self.val), "held-out token")
        return f"Dataset({self.root}: {train} to train on, {val}, fingerprint {self.fingerprint[:12]})"


def open_dataset(root: Path) -> Dataset:
    """Open a prepared folder: validate the manifest and the size of every file; read no tokens.

    Raises:
        DataError: No manifest, an invalid one, or a file that is missing, a link, or of another size.
    """
    manifest = _read_manifest(root / MANIFEST)
    for shard in (*manifest.train.shards, *manifest.val.shards):
        _require_files(root, shard)
    facts = manifest.tokenizer
    width = {"token_bytes": manifest.token_bytes, "vocab_size": facts.vocab_size}
    return Dataset(
        root=root,
        train=TokenStream(root, manifest.train.shards, **width),
        val=TokenStream(root, manifest.val.shards, **width),
        tokenizer_sha256=facts.sha256,
        vocab_size=facts.vocab_size,
        eos_id=facts.eos_id,
        fingerprint=fingerprint(manifest),
        manifest=manifest,
    )


def verify_shards(dataset: Dataset) -> None:
    """Compare the SHA-256 of every shard and index with the manifest (about 1.4 GB/s).

    Raises:
        DataError: A file differs; the message names the first one.
    """
    files: dict[str, str] = {}
    for shard in (*dataset.manifest.train.shards, *dataset.manifest.val.shards):
        files[shard.name] = shard.sha256
        files[f"{shard.name}.index"] = shard.index_sha256
    for name, expected in files.items():
        path = dataset.root / name
        if shard_file_sha256(path) != expected:
            raise _damaged(path, "its sha256 is not the one in manifest.json")
    logger.info(f"data: {counted(len(files), 'file')} in {dataset.root} verified against manifest.json")


def fingerprint(manifest: Manifest) -> str:
    """Return a SHA-256 that is equal for two folders exactly when they hold the same tokens in the same order."""
    identity = {
        "format_version": manifest.format_version,
        "tokenizer": manifest.tokenizer.sha256,
        "token_bytes": manifest.token_bytes,
        "train": [[shard.sha256, shard.start, shard.tokens] for shard in manifest.train.shards],
        "val": [[shard.sha256, shard.start, shard.tokens] for shard in manifest.val.shards],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("ascii")).hexdigest()


def token_width(vocab_size: int) -> Literal[2, 4]:
    """Return the bytes per token, by datatrove's rule: 4 above a vocabulary of 65,536, else 2."""
    return 4 if vocab_size > (1 << 16) else 2


def token_dtype(token_bytes: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Return the type of a token on disk: little-endian, also on a big-endian machine."""
    return np.dtype("<u2") if token_bytes == 2 else np.dtype("<u4")


def shard_file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of the dataset (`DataError` when it cannot be read)."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error


def _read_manifest(path: Path) -> Manifest:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path.parent} is not a prepared data folder: {path.name}: {error.strerror}",
            fix="make one with: resmol prepare OUT --input TEXT",
        ) from error
    if len(text) > _MAX_MANIFEST_BYTES:
        raise _damaged(path, "it is larger than 64 MB")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{place}: {first['msg']}" if place else first["msg"]) from error


def _require_files(root: Path, shard: Shard) -> None:
    path = root / shard.name
    index = path.with_name(f"{path.name}.index")
    for file in (path, index):
        # A link could lead out of the folder, to data that the manifest does not vouch for.
        if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
            raise _damaged(file, "it is missing, or a link")
    if path.stat().st_size != shard.bytes:
        raise _damaged(path, f"it has {counted(path.stat().st_size, 'byte')}, the manifest says {shard.bytes:,}")
    if index.stat().st_size % 8:
        raise _damaged(index, "it is not a list of 8-byte numbers")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} cannot be used: {why}", fix="restore the folder, or prepare the data again")
