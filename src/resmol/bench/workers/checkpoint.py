"""The measured processes of `resmol bench checkpoint` besides training itself: our load, the peers, the disk."""

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

from resmol.bench.workers.main import Metrics, answer
from resmol.config.load import load_config
from resmol.run.checkpoint import load_into, moment_tensors, weight_tensors
from resmol.run.checkpoint_manifest import open_checkpoint
from resmol.system.atomic_io import fsync_path
from resmol.train.build import new_state
from resmol.train.loop import TrainState
from resmol.train.parallel import Runtime

PIECE = 1 << 24


def fresh_state(config_file: Path) -> TrainState:
    """Return a model and an optimizer whose moments exist, as after a step."""
    state = new_state(load_config(config_file), Runtime(0, 1, torch.device("cpu"), None))
    for parameter in state.model.parameters():
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return state


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return everything that a checkpoint of it holds: weights and moments, by name."""
    tensors = {**weight_tensors(state.model), **moment_tensors(state.model, state.optimizer)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_ours(task: Mapping[str, Any]) -> Metrics:
    """Verify a checkpoint and fill model and optimizer from it, as a resume does."""
    path, state = Path(task["checkpoint"]), fresh_state(Path(task["config"]))
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    load_into(checkpoint, state.model, state.optimizer)
    return {"load_seconds": time.perf_counter() - started}


def save_and_load_peer(task: Mapping[str, Any]) -> Metrics:
    """Save the same tensors by torch.save or by safetensors, make them durable, and load them back into place.

    ``stalled_seconds`` is the call that its users make; ``save_seconds`` includes the fsync that they leave out.
    """
    state, path = fresh_state(Path(task["config"])), Path(task["out"])
    tensors = state_tensors(state)
    started = time.perf_counter()
    if task["who"] == "torch":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    saved = time.perf_counter()
    fsync_path(path)
    durable = time.perf_counter()
    loaded = torch.load(path, weights_only=True) if task["who"] == "torch" else load_file(path)
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])
    return {
        "save_seconds": durable - started,
        "stalled_seconds": saved - started,
        "load_seconds": time.perf_counter() - durable,
        "bytes": path.stat().st_size,
    }


def disk_limit(task: Mapping[str, Any]) -> Metrics:
    """Write as many bytes, fsync them, read them back; and hash them, since both directions of ours do."""
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
    "ours": load_ours, "torch": save_and_load_peer, "safetensors": save_and_load_peer, "disk": disk_limit,
}  # fmt: skip


if __name__ == "__main__":
    answer(lambda task: ROLES[task["who"]](task))
