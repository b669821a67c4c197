"""Worker of `resmol bench checkpoint` for all but the training: our load, the baselines, the disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmol.bench.workers.main import Metrics, worker_main
from resmol.config.load import load_config
from resmol.run.checkpoint import allocate_moments, moment_tensors, weight_tensors
from resmol.run.checkpoint_load import load_into
from resmol.run.checkpoint_manifest import open_checkpoint
from resmol.system.atomic_io import fsync_path
from resmol.train.build import new_state
from resmol.train.parallel import Runtime
from resmol.train.step import TrainState

PIECE = 1 << 24


def fresh_state(config_file: Path) -> TrainState:
    """Return a model and an optimizer with moments, as after a step."""
    state = new_state(load_config(config_file), Runtime.single())
    allocate_moments(state.optimizer, 1)
    return state


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return the tensors of its checkpoint, weights and moments, by name."""
    tensors = {**weight_tensors(state.model), **moment_tensors(state.model, state.optimizer)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_with_resmol(task: Mapping[str, Any]) -> Metrics:
    """Verify a checkpoint and fill model and optimizer from it, as a resume does."""
    path, state = Path(task["checkpoint"]), fresh_state(Path(task["config"]))
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    load_into(checkpoint, state.model, state.optimizer)
    return {"load_seconds": time.perf_counter() - started}


def save_and_load_baseline(task: Mapping[str, Any]) -> Metrics:
    """Save the same tensors with torch.save or safetensors, fsync them, and load them back into place.

    ``stall_seconds`` is the call that their users make; ``save_seconds`` includes the fsync that users leave out.
    """
    state, path = fresh_state(Path(task["config"])), Path(task["out"])
    tensors = state_tensors(state)
    started = time.perf_counter()
    if task["role"] == "torch":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    saved = time.perf_counter()
    fsync_path(path)
    durable = time.perf_counter()
    loaded = torch.load(path, weights_only=True) if task["role"] == "torch" else load_file(path)
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])
    return {
        "save_seconds": durable - started,
        "stall_seconds": saved - started,
        "load_seconds": time.perf_counter() - durable,
        "bytes": path.stat().st_size,
    }


def disk_roofline(task: Mapping[str, Any]) -> Metrics:
    """Write and fsync as many bytes, read them back, and hash some, as resmol does in both directions."""
    path, size, piece = Path(task["out"]), int(task["bytes"]), os.urandom(PIECE)
    pieces = -(-size // PIECE)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as out:
        for _ in range(pieces):
            out.write(piece)
        os.fsync(out.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as back:
        while back.read(PIECE):
            pass
    read = time.perf_counter()
    hashlib.sha256(piece * 8).hexdigest()
    hashed = time.perf_counter() - read
    return {
        "save_seconds": written - started,
        "load_seconds": read - written,
        "write_bytes_per_second": pieces * PIECE / (written - started),
        "sha256_bytes_per_second": 8 * PIECE / hashed,
    }


ROLES: dict[str, Callable[[Mapping[str, Any]], Metrics]] = {
    "resmol": load_with_resmol, "torch": save_and_load_baseline, "safetensors": save_and_load_baseline,
    "disk": disk_roofline,
}  # fmt: skip


if __name__ == "__main__":
    worker_main(lambda task: ROLES[task["role"]](task))
