"""Saving checkpoints, by the commit protocol of system/atomic_io.py.

A checkpoint is a directory ``step-00005000`` with

* ``model.safetensors``: the weights, float32, Hugging Face's names (it is the weight file of an export),
* ``config.json``: the architecture, so that the directory is complete without its run,
* ``optimizer.safetensors``: the optimizer's moments: two of each parameter of AdamW, one of each of Muon,
* ``averaged.safetensors``: the averaged weights, where the run keeps an average,
* ``state.json``: everything else that the next step depends on,
* ``manifest.json``: size and sha256 of each file, a digest of each tensor; written last, it is the commit.

Nothing in it is a pickle. checkpoint_manifest.py describes the files and decides whether a directory is whole;
checkpoint_load.py reads them, retention.py removes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import DiskFull
from resmol.model.llama import CausalLM
from resmol.run.checkpoint_manifest import (
    AVERAGED,
    CONFIG,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    FileEntry,
    Manifest,
    SavedState,
    checkpoint_name,
)
from resmol.run.ranks import ONE_RANK, Ranks, balanced, together
from resmol.run.tensor_files import as_bytes, create_tensor_file, layout, stored_digest, write_shard
from resmol.run.tensor_shards import TensorShard, shard_of
from resmol.system.atomic_io import (
    abandoned_on_error,
    commit_staged,
    file_sha256,
    fsync_path,
    full_disk_is_an_error,
    stage_directory,
)
from resmol.system.safetensors_header import Header

ADAMW_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # torch.optim's names
WRITERS = 4  # threads that write and hash
Item: TypeAlias = tuple[str, str]  # a file and a tensor in it; or a file and "", which is all of it


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint, file by file, and the architecture that they belong to."""

    config: ModelConfig
    files: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(
        cls, model: CausalLM, optimizer: torch.optim.Optimizer, averaged: Mapping[str, Tensor] | None = None
    ) -> CheckpointTensors:
        """Return the weights, moments and averaged weights themselves: they change with the next step."""
        files = {WEIGHTS: weight_tensors(model), OPTIMIZER: moment_tensors(model, optimizer)}
        return cls(model.config, files if averaged is None else {**files, AVERAGED: averaged})

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


@dataclass(frozen=True)
class StagedCheckpoint:
    """A checkpoint whose files are written and hashed; none of it is durable, and it has no name yet."""

    temporary: Path
    final: Path
    manifest: Manifest


@dataclass(frozen=True)
class _Piece:
    """What this rank writes of a tensor."""

    file: str
    name: str
    shard: TensorShard


def stage_checkpoint(
    folder: Path, state: SavedState, tensors: CheckpointTensors, *, parent: str | None, ranks: Ranks = ONE_RANK
) -> StagedCheckpoint:
    """Write the files of a checkpoint, and read them back: all of a save that needs the tensors, or a processor.

    All ranks call it. Rank 0 creates the files; then each rank writes what it holds of the tensors to its place.

    Args:
        folder: The ``checkpoints`` directory of a run.
        state: What to write into ``state.json``: that of rank 0.
        tensors: What to write; it is written as it is, and must be float32.
        parent: The sha256 of the manifest of the checkpoint before.
        ranks: Who writes it.

    Raises:
        DiskFull: No room. Nothing of the new checkpoint is left, and all older ones are.
        OSError: Any other failure of the disk, with the same consequence. Both are raised by all ranks.
        ProcessLost: Another rank died or did not do its part in time, with the same consequence.
    """
    final = folder / checkpoint_name(state.step)
    with _with_size_in_message(tensors.bytes):
        layouts = {file: layout(group) for file, group in tensors.files.items()}
        made = together(ranks, f"create {final.name}", lambda: _create_files(final, state, tensors, layouts, ranks))
        temporary = final.with_name(made[0])
        with full_disk_is_an_error(final), _abandoned_by_rank_0(temporary, ranks):
            headers = {file: header for file, (header, _) in layouts.items()}
            files = _write_and_hash(temporary, tensors, headers, ranks)
    manifest = Manifest(step=state.step, parent=parent, permanent=state.permanent, files=files)
    return StagedCheckpoint(temporary, final, manifest)


def _create_files(
    final: Path,
    state: SavedState,
    tensors: CheckpointTensors,
    layouts: Mapping[str, tuple[Header, bytes]],
    ranks: Ranks,
) -> str | None:
    """Create the directory and its files on rank 0, those with tensors in their full size; return its name."""
    if ranks.rank:
        return None

    def create(temporary: Path) -> None:
        for file, (header, head) in layouts.items():
            create_tensor_file(temporary / file, header, head)
        config = json.dumps(tensors.config.to_hf(), indent=2) + "\n"
        (temporary / CONFIG).write_text(config, encoding="utf-8", newline="\n")
        (temporary / STATE).write_bytes(state.to_bytes())

    quarantine(final)
    return stage_directory(final, create).name


def _write_and_hash(
    temporary: Path, tensors: CheckpointTensors, headers: Mapping[str, Header], ranks: Ranks
) -> dict[str, FileEntry]:
    """Write what this rank holds of the tensors, then hash its share of the files; return the entries of all."""
    pieces = _pieces(tensors, ranks)
    digests: dict[str, dict[str, str]] = {file: {} for file in (*headers, STATE, CONFIG)}
    for found in together(ranks, "write a checkpoint", lambda: _write_pieces(temporary, headers, pieces)):
        for file, name, value in found:
            digests[file][name] = value
    # A tensor that no rank holds as a whole is hashed in the file, in which every range is what was in memory.
    sizes = {(file, ""): (temporary / file).stat().st_size for file in digests}
    sizes |= {
        (file, name): info.end - info.start
        for file, header in headers.items()
        for name, info in header.tensors.items()
        if name not in digests[file]
    }
    own = [item for item, rank in balanced(sizes, ranks.world_size).items() if rank == ranks.rank]
    sha256 = dict[str, str]()
    for found in together(ranks, "hash a checkpoint", lambda: _hash(temporary, headers, own)):
        for file, name, value in found:
            if name:
                digests[file][name] = value
            else:
                sha256[file] = value
    return {
        file: FileEntry(bytes=sizes[file, ""], sha256=sha256[file], tensors=dict(sorted(found.items())))
        for file, found in digests.items()
    }


def _pieces(tensors: CheckpointTensors, ranks: Ranks) -> list[_Piece]:
    """Return what this rank writes, the largest first: of a part that several ranks hold, one of them writes all."""
    shards = {
        (file, name): shard_of(tensor, ranks.rank, ranks.world_size)
        for file, group in tensors.files.items()
        for name, tensor in group.items()
    }
    writers = dict[Item, int]()
    for copies in sorted({shard.copies for shard in shards.values()}):
        sizes = {item: math.prod(shard.shape) for item, shard in shards.items() if shard.copies == copies}
        writers |= balanced(sizes, copies)
    pieces = [_Piece(*item, shard) for item, shard in shards.items() if writers[item] == shard.copy]
    return sorted(pieces, key=lambda piece: -piece.shard.local.numel())


def _write_pieces(temporary: Path, headers: Mapping[str, Header], pieces: list[_Piece]) -> list[tuple[str, str, str]]:
    """Write the pieces; return the digests of those that are whole tensors, as they were in memory before."""

    def write(piece: _Piece) -> tuple[str, str, str] | None:
        values = piece.shard.local.cpu().contiguous()  # on a CPU the very same, of a GPU one copy
        found = digest(values) if piece.shard.is_whole else None
        write_shard(temporary / piece.file, headers[piece.file], piece.name, piece.shard, values)
        return None if found is None else (piece.file, piece.name, found)

    with ThreadPoolExecutor(WRITERS) as pool:  # writing and hashing release the interpreter
        return [found for found in pool.map(write, pieces) if found is not None]


def _hash(temporary: Path, headers: Mapping[str, Header], own: list[Item]) -> list[tuple[str, str, str]]:
    """Hash files and tensors in files; return each with its sha256."""

    def sha256(item: Item) -> tuple[str, str, str]:
        file, name = item
        path = temporary / file
        return file, name, stored_digest(path, headers[file], name) if name else file_sha256(path)

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(sha256, own))


def commit_checkpoint(staged: StagedCheckpoint, ranks: Ranks = ONE_RANK) -> Manifest:
    """Make a checkpoint durable: all of a save that waits for the disk. Raises what `stage_checkpoint` raises.

    A crash at any instant leaves all of it or nothing. The other ranks sync first what they have written, which no sync
    of rank 0 does where they run on other hosts; then rank 0 commits.
    """

    def sync() -> None:
        if ranks.rank:
            for file in sorted(staged.manifest.files):
                fsync_path(staged.temporary / file)

    def commit() -> None:
        if not ranks.rank:
            commit_staged(staged.temporary, staged.final, lambda _: staged.manifest.to_bytes())

    name = staged.final.name
    with _with_size_in_message(staged.manifest.bytes), _abandoned_by_rank_0(staged.temporary, ranks):
        with full_disk_is_an_error(staged.final):
            together(ranks, f"sync {name}", sync)
        together(ranks, f"commit {name}", commit)
    return staged.manifest


@contextmanager
def _abandoned_by_rank_0(temporary: Path, ranks: Ranks) -> Iterator[None]:
    """Let rank 0 remove the directory where any rank fails."""
    with nullcontext() if ranks.rank else abandoned_on_error(temporary):
        yield


@contextmanager
def _with_size_in_message(size: int) -> Iterator[None]:
    try:
        yield
    except DiskFull as error:
        raise DiskFull(f"{error.what} (the checkpoint needs {size:,} bytes)", fix=error.fix) from error


def weight_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Return the weights by Hugging Face's names; a tied output layer is the embedding and is not written twice."""
    tied = model.config.tie_word_embeddings
    return {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def moment_tensors(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of an optimizer that has taken a step, by name: ``<parameter>.exp_avg`` and so on."""
    kept = _moments_of_parameters(optimizer)
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in kept[parameter]
    }


def allocate_moments(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Give an optimizer the state that it has after so many updates, with moments of zeros, which are to be filled."""
    for parameter, moments in _moments_of_parameters(optimizer).items():
        state = {moment: torch.zeros_like(parameter) for moment in moments}
        count = {"step": torch.tensor(float(updates), device=parameter.device)} if moments == ADAMW_MOMENTS else {}
        optimizer.state[parameter] = {**count, **state}


def _moments_of_parameters(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    return {
        parameter: ADAMW_MOMENTS if "betas" in group else MUON_MOMENTS
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(as_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def digest_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each tensor; hashing runs on two threads, since it releases the interpreter."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def quarantine(final: Path) -> None:
    """Rename a corrupt checkpoint, or whatever has its name, out of the way; it may be evidence, so it is kept."""
    if final.exists():
        number = 1
        while (aside := final.with_name(f"corrupt-{final.name}-{number}")).exists():
            number += 1
        final.rename(aside)
        fsync_path(final.parent)
