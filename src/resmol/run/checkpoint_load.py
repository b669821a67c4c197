"""Loading checkpoints: each rank reads what it holds, and all of it is compared with the manifest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from resmol.model.llama import CausalLM
from resmol.run.checkpoint import allocate_moments, digest, moment_tensors, weight_tensors
from resmol.run.checkpoint_manifest import OPTIMIZER, WEIGHTS, Checkpoint, corrupt
from resmol.run.ranks import ONE_RANK, Ranks, balanced, together
from resmol.run.tensor_files import read_shard, stored_digest
from resmol.run.tensor_shards import shard_of
from resmol.system.safetensors_header import Header, read_header

_Part: TypeAlias = tuple[str, int, int, str]  # a tensor, the elements of it that a rank has read, and their sha256


def load_into(
    checkpoint: Checkpoint, model: CausalLM, optimizer: torch.optim.Optimizer | None = None, ranks: Ranks = ONE_RANK
) -> None:
    """Fill a model, and an optimizer where one is given, from a verified checkpoint (raises as `load_tensors`)."""
    load_tensors(checkpoint, WEIGHTS, weight_tensors(model), ranks)
    if optimizer is None:
        return
    allocate_moments(optimizer, checkpoint.state.loss_scale.updates(checkpoint.state.step))
    load_tensors(checkpoint, OPTIMIZER, moment_tensors(model, optimizer), ranks)


def load_tensors(checkpoint: Checkpoint, name: str, targets: Mapping[str, Tensor], ranks: Ranks = ONE_RANK) -> None:
    """Fill tensors, or what this rank holds of them, from a safetensors file of a verified checkpoint.

    Args:
        checkpoint: The checkpoint.
        name: The file, such as `AVERAGED`.
        targets: The file must hold exactly their names and shapes, in float32, all finite.
        ranks: All of them call this, each with what it holds.

    Raises:
        CheckpointError: The file holds something else, or the checkpoint has no such file. Where a rank has read other
            bytes than were saved, or some that are not finite, all ranks raise it.
        ProcessLost: Another rank died, or did not do its part in time.
    """
    path, entry = checkpoint.path / name, checkpoint.manifest.files.get(name)
    if entry is None:
        raise corrupt(path, "is missing, and the configuration of its run asks for it")
    header, digests = read_header(path), entry.tensors
    shapes = {name: (info.dtype, tuple(info.shape)) for name, info in header.tensors.items()}
    expected = {name: ("F32", tuple(t.shape)) for name, t in targets.items()}
    if shapes != expected:
        wrong = min({*shapes, *expected}, key=lambda name: (shapes.get(name) == expected.get(name), name))
        raise corrupt(path, f"holds {wrong} as {shapes.get(wrong)}; this model has {expected.get(wrong)}")
    not_finite: list[str] = []

    def fill(name: str) -> _Part:
        shard = shard_of(targets[name])
        values = read_shard(path, header, name, shard)
        if not bool(torch.isfinite(values).all()):
            not_finite.append(name)
        shard.local.copy_(values)
        return name, shard.start, shard.end, digest(values)

    with ThreadPoolExecutor(2) as pool:  # hashing and copying release the interpreter
        parts = list(pool.map(fill, targets))
    whole = [part for part in parts if part[2] - part[1] == math.prod(expected[part[0]][1])]
    report = {
        "changed": [name for name, _, _, found in whole if found != digests.get(name)],
        "not finite": sorted(not_finite),
        "parts": [part for part in parts if part not in whole],
    }
    reports = ranks.exchange(f"load {name}", report)
    changed = {name for report in reports for name in report["changed"]}
    changed |= _changed_parts(path, header, digests, [report["parts"] for report in reports], ranks)
    if changed:
        raise corrupt(path, f"gave other bytes for {min(changed)} than were in memory when it was saved")
    if bad := [name for report in reports for name in report["not finite"]]:
        raise corrupt(path, f"holds NaN or infinity in {min(bad)}")


def _changed_parts(
    path: Path, header: Header, digests: Mapping[str, str], parts: Sequence[Sequence[Any]], ranks: Ranks
) -> set[str]:
    """Return the tensors of which a rank has read other bytes than were saved, where ranks have read parts.

    The manifest has no digests of parts. So the ranks share the tensors; of each, one rank hashes the file's bytes, to
    be compared with the manifest, and those of each part, to be compared with what its reader has in memory.
    """
    found: dict[str, set[tuple[int, int, str]]] = {}
    for name, start, end, read in itertools.chain.from_iterable(parts):
        found.setdefault(name, set()).add((start, end, read))
    if not found:
        return set()
    sizes = {(path.name, name): header.tensors[name].end - header.tensors[name].start for name in sorted(found)}
    own = [name for (_, name), rank in balanced(sizes, ranks.world_size).items() if rank == ranks.rank]

    def is_changed(name: str) -> bool:
        if stored_digest(path, header, name) != digests.get(name):
            return True
        return any(stored_digest(path, header, name, start, end) != read for start, end, read in found[name])

    def check() -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            return [name for name, changed in zip(own, pool.map(is_changed, own), strict=True) if changed]

    return {name for names in together(ranks, f"verify {path.name}", check) for name in names}
