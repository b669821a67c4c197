"""Import a folder that datatrove tokenized, in place: only a manifest and missing indexes are added."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from resmol.data.shard_writer import describe_shard, write_index
from resmol.data.shards import (
    MANIFEST,
    SPLITS,
    Dataset,
    Manifest,
    Shard,
    Split,
    TokenizerFacts,
    open_dataset,
    token_dtype,
    token_width,
)
from resmol.data.source_facts import InputFacts, SourceFacts
from resmol.data.token_file import TokenFile
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.atomic_io import full_disk_is_an_error, write_durable
from resmol.system.wording import counted
from resmol.version import __version__

logger = logging.getLogger(__name__)

_SCAN_TOKENS = 1 << 22


def is_token_folder(folder: Path) -> bool:
    """Return whether a folder holds `.ds` files, itself or in train/ and val/, but no manifest of ours."""
    return folder.is_dir() and not (folder / MANIFEST).exists() and bool(_token_files(folder))


def import_datatrove(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.01,
    near_duplicates: int | None = None,
) -> Dataset:
    """Read a folder of `.ds` files once, write its manifest, and return it as a dataset.

    Subfolders train/ and val/ become the splits. Without them, the last documents are held out, about
    ``val_fraction`` of the tokens: datatrove shuffles the documents of a file, so its end is a fair sample.

    Args:
        folder: The folder; a missing `.ds.index` is made from the end-of-document tokens.
        tokenizer: The tokenizer that the tokens were made with, which the files do not record.
        val_fraction: Share of the tokens to hold out, in [0, 1).
        near_duplicates: How many documents MinHash left out; None where nobody looked for them.

    Raises:
        UsageError: The folder already has a manifest, or ``val_fraction`` is outside [0, 1).
        DataError: There are no `.ds` files, or they are inconsistent with each other or with the tokenizer.
    """
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} already has a manifest.json", fix=f"use it as it is: --data {folder}")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}", fix="give a share from 0 up to, but not including, 1")
    files = _token_files(folder)
    if not files:
        raise DataError(f"{folder} holds no .ds files", fix="name the folder into which datatrove wrote its tokens")
    width = _token_bytes(folder, files, tokenizer)
    with full_disk_is_an_error(folder):
        shards, ends = _describe_all(folder, files, tokenizer, width)
    splits = _split_by_folder(shards) or _split_by_position(shards, ends, val_fraction)
    manifest = _manifest(folder, tokenizer, width, shards, splits, val_fraction)
    if near_duplicates is not None:
        facts = {"dedup": "minhash", "duplicates": near_duplicates}
        manifest = manifest.model_copy(update={"source": manifest.source.model_copy(update=facts)})
    write_durable(folder / MANIFEST, manifest.to_json())
    return open_dataset(folder)


def _token_files(folder: Path) -> list[str]:
    here = sorted(path.name for path in folder.glob("*.ds"))
    below = [f"{split}/{path.name}" for split in SPLITS for path in sorted((folder / split).glob("*.ds"))]
    return here or below


def _token_bytes(folder: Path, files: list[str], tokenizer: Tokenizer) -> int:
    """Return the bytes of a token that the first `.metadata` states, or else those that the vocabulary needs."""
    metadata = folder / f"{files[0]}.metadata"
    if metadata.is_file():
        with metadata.open("rb") as file:
            first_line = file.readline(4096).decode("utf-8", errors="replace").strip()
        stated = first_line.rpartition("|")[2]
        if stated in ("2", "4"):
            return int(stated)
    return token_width(tokenizer.vocab_size)


def _describe_all(
    folder: Path, files: list[str], tokenizer: Tokenizer, width: int
) -> tuple[list[Shard], list[Int64[np.ndarray, " _"]]]:
    shards, all_ends, open_ends = [], [], 0
    for name in files:
        tokens = _tokens_of(folder / name, width)
        ends_by_token = _scan(tokens, tokenizer, name)
        ends = _index_of(folder / name, len(tokens), ends_by_token)
        open_ends += len(np.setdiff1d(ends, ends_by_token))
        shards.append(describe_shard(folder, name, ends.tolist()))
        all_ends.append(ends)
    if open_ends:
        logger.info(
            f"data: {counted(open_ends, 'document')} without token {tokenizer.eos_id} at the end, which document masks "
            "need"
        )
    return shards, all_ends


def _tokens_of(path: Path, width: int) -> TokenFile:
    size = path.stat().st_size
    if path.is_symlink() or size == 0 or size % width:
        raise DataError(
            f"{path} is not a file of {width}-byte tokens ({counted(size, 'byte')})",
            fix="links and empty files are refused; leave out the file, or tokenize again",
        )
    return TokenFile(path, token_dtype(width))


def _scan(tokens: TokenFile, tokenizer: Tokenizer, name: str) -> Int64[np.ndarray, " n"]:
    """Return the position after each end-of-document token (`DataError` for ids outside the vocabulary)."""
    ends = [np.zeros(0, dtype=np.int64)]
    count = len(tokens)
    for start in range(0, count, _SCAN_TOKENS):
        block = tokens.read(start, min(start + _SCAN_TOKENS, count))
        if int(block.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"{name} holds token {int(block.max())}, the vocabulary ends before {tokenizer.vocab_size}",
                fix="name the tokenizer that made these tokens: --tokenizer PATH",
            )
        ends.append(np.flatnonzero(block == tokenizer.eos_id).astype(np.int64) + start + 1)
    return np.concatenate(ends)


def _index_of(path: Path, tokens: int, ends_by_token: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " n"]:
    index = path.with_name(f"{path.name}.index")
    if not index.exists():
        ends = ends_by_token if tokens in ends_by_token[-1:] else np.append(ends_by_token, tokens)
        write_index(path, ends.tolist())
        return ends
    if index.is_symlink() or index.stat().st_size % 8:
        raise DataError(f"{index} is not a list of 8-byte numbers", fix="remove it; it is then made from the tokens")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    if len(ends) == 0 or ends[-1] != tokens or ends[0] < 0 or (np.diff(ends) < 0).any():
        raise DataError(
            f"{index} does not match {counted(tokens, 'token')}", fix="remove it; it is then made from the tokens"
        )
    return ends


def _split_by_folder(shards: list[Shard]) -> tuple[Split, Split] | None:
    if "/" not in shards[0].name:
        return None
    train, val = ([shard for shard in shards if shard.name.startswith(f"{split}/")] for split in SPLITS)
    return Split.of(train), Split.of(val)


def _split_by_position(
    shards: list[Shard], ends: list[Int64[np.ndarray, " _"]], val_fraction: float
) -> tuple[Split, Split]:
    """Hold out the last documents, from the last document end that leaves at least ``val_fraction`` of the tokens."""
    total = sum(shard.tokens for shard in shards)
    starts = np.cumsum([0, *(shard.tokens for shard in shards)])
    borders = np.concatenate([one + start for one, start in zip(ends, starts, strict=False)])
    wanted = total - round(val_fraction * total)
    place = int(np.searchsorted(borders, wanted, side="right")) - 1
    border = int(borders[place]) if place >= 0 else wanted  # a single document is cut by position
    train, val = [], []
    for shard, one, start in zip(shards, ends, starts, strict=False):
        cut = min(max(border - int(start), 0), shard.tokens)
        before = int(np.searchsorted(one, cut, side="right"))
        if cut > 0:
            inside = before + (cut not in one[before - 1 : before])
            train.append(shard.model_copy(update={"tokens": cut, "documents": inside}))
        if cut < shard.tokens:
            part = {"start": cut, "tokens": shard.tokens - cut, "documents": shard.documents - before}
            val.append(shard.model_copy(update=part))
    return Split.of(train), Split.of(val)


def _manifest(
    folder: Path,
    tokenizer: Tokenizer,
    width: int,
    shards: list[Shard],
    splits: tuple[Split, Split],
    val_fraction: float,
) -> Manifest:
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode("ascii")).hexdigest()
    size = sum(shard.bytes for shard in shards)
    facts = InputFacts(name=folder.resolve().name, files=len(shards), bytes=size, sha256=digest)
    whole = splits[0].documents + splits[1].documents == sum(shard.documents for shard in shards)
    return Manifest.model_validate(
        {
            "created_with": f"resmol {__version__}",
            "tokenizer": TokenizerFacts(
                sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
            ),
            "token_bytes": width,
            "train": splits[0],
            "val": splits[1],
            "source": SourceFacts(
                inputs=(facts,),
                documents=sum(shard.documents for shard in shards),
                empty_documents=0,
                text_bytes=0,
                replacements=0,
                untokenizable_bytes=0,
                forced_cuts=0,
                held_out="none" if splits[1].tokens == 0 else "documents" if whole else "position",
                val_fraction=val_fraction,
                seed=0,
            ),
        }
    )
