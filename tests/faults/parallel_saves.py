"""Ranks that save one checkpoint together, one of which dies at a call: what is left is looked at.

The ranks are forks of one process, which ends the others when one dies, as torchrun does. What they save is made up;
the save, the messages and the disk are the package's own. Runs in a child of the fork server, as the drills do.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import shim
import torch
import torch.distributed as dist
from drills import WAYS
from safetensors.torch import load_file
from several_ranks import Strategy, held_by
from torch import Tensor

from resmol.config.load import load_preset
from resmol.errors import CheckpointError
from resmol.run.checkpoint import CheckpointTensors, commit_checkpoint, stage_checkpoint
from resmol.run.checkpoint_manifest import AVERAGED, OPTIMIZER, WEIGHTS, SavedState, list_checkpoints, newest_valid
from resmol.run.ranks import ONE_RANK, Ranks
from resmol.system.atomic_io import remove_leftovers
from resmol.train.rank_messages import RankMessages

# One that FSDP2 cuts in uneven parts, one that leaves ranks without a row, one that it cuts evenly.
SHAPES = {"even": (8, 4), "odd": (5, 3), "short": (1,)}
BEFORE, NEW = 5, 10
GRACE_SECONDS = 0.05  # that the others may go on for, at every other point

Files = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Scene:
    """Who saves: the strategy and, for each rank, what it holds."""

    strategy: Strategy
    held: list[Files]

    @property
    def world_size(self) -> int:
        return len(self.held)


def values_after(step: int) -> dict[str, dict[str, Tensor]]:
    """Return what there is to save after a step; every value depends on the tensor, its place and the step."""
    return {
        file: {
            f"{file}.{name}": 1000.0 * number + step + torch.arange(torch.Size(shape).numel()).view(shape) / 100
            for name, shape in SHAPES.items()
        }
        for number, file in enumerate((WEIGHTS, OPTIMIZER, AVERAGED))
    }


def save(folder: Path, step: int, files: Files, ranks: Ranks) -> None:
    state = SavedState(
        step=step, tokens_seen=0, windows_seen=0, config_sha256="", data_fingerprint="", ledger_head="",
        random_state="", permanent=False,
    )  # fmt: skip
    tensors = CheckpointTensors(load_preset("nano").model, files)
    commit_checkpoint(stage_checkpoint(folder, state, tensors, parent=None, ranks=ranks), ranks.for_thread())


def crash_points(strategy: Strategy, world_size: int, folder: Path, share: int = 1) -> tuple[int, list[int], list[str]]:
    """Let each rank die at every call of a parallel save, in each of `WAYS`; read after each.

    Args:
        strategy: How the ranks share the tensors.
        world_size: Number of ranks.
        folder: Where; it must exist.
        share: Try every share-th point only.

    Returns:
        The number of points tried, that of calls of each rank, and the problems.
    """
    scene = Scene(strategy, [held_by(values_after(NEW), strategy, rank, world_size) for rank in range(world_size)])
    template = folder / "template"
    template.mkdir()
    save(template, BEFORE, values_after(BEFORE), ONE_RANK)
    calls, problems = [], []
    for rank in range(world_size):
        place = shutil.copytree(template, folder / f"rehearsal-{rank}")
        codes, counted = _die_at(scene, place, rank, "count", 1, folder / "note")
        calls.append(counted)
        problems += [] if set(codes) == {0} and counted else [f"rank {rank} fails without a crash: {codes}"]
    points = [(rank, number, way) for rank in range(world_size)
              for number, way in itertools.product(range(1, calls[rank] + 1), WAYS)]  # fmt: skip
    for point, (rank, number, way) in list(enumerate(points))[share // 2 :: share]:
        place = shutil.copytree(template, folder / f"point-{point}")
        codes, acknowledged = _die_at(scene, place, rank, way, number, folder / "note", GRACE_SECONDS * (point % 2))
        found = [] if codes[rank] == shim.KILLED else [f"ended with {codes}"]
        found += read(place, acknowledged)
        problems += [f"{way} of call {number} of rank {rank}: {text}" for text in found]
        shutil.rmtree(place)
    return len(points[share // 2 :: share]), calls, problems


def _die_at(
    scene: Scene, place: Path, victim: int, way: str, number: int, note: Path, grace: float = 0.0
) -> tuple[list[int], int]:
    """Save, with one rank that dies; return the exit codes, and the step acknowledged (or the victim's calls)."""
    note.write_text("0")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = {}
    for rank in range(scene.world_size):
        pid = os.fork()
        if pid == 0:
            os._exit(_be_rank(scene, place, rank, store.port, note, (way, number) if rank == victim else None))
        ranks[pid] = rank
    codes = [0] * scene.world_size
    left = dict(ranks)
    while left:
        pid, status = os.wait()
        codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status and left:
            time.sleep(grace)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes, int((note.with_suffix(".calls") if way == "count" else note).read_text())


def _be_rank(scene: Scene, place: Path, rank: int, port: int, note: Path, fault: tuple[str, int] | None) -> int:
    try:
        connection = dist.TCPStore("127.0.0.1", port, is_master=False)
        if fault is not None:
            shim.arm(place, fault[0], k=fault[1])
        save(place, NEW, scene.held[rank], RankMessages(connection, rank, scene.world_size))
        if fault is not None:
            note.with_suffix(".calls").write_text(str(shim.disarm()))
        note.write_text(str(NEW))
    except BaseException as error:
        print(f"rank {rank}: {error}", flush=True)
        return 1
    return 0


def read(place: Path, acknowledged: int) -> list[str]:
    """Look at the checkpoints as a resume does; return what is wrong."""
    remove_leftovers(place)
    found = []
    for path in list_checkpoints(place):
        try:
            newest_valid(place, {}, only=path.name)
        except CheckpointError as error:
            found.append(f"committed, but not whole: {error.what}")
    if found:
        return found
    checkpoint, _ = newest_valid(place, {})
    step = checkpoint.state.step
    if step not in (BEFORE, NEW) or step < acknowledged:
        found.append(f"came back at step {step}; {acknowledged} was acknowledged")
    for file, group in values_after(step).items():
        stored = load_file(checkpoint.path / file)
        wrong = [name for name in {*group, *stored} if not torch.equal(stored[name], group[name])]
        found += [f"{name} is not that of step {step}" for name in wrong]
    return found


def play(out: Path, strategy: Strategy, world_size: int, folder: Path, share: int) -> int:
    """Play the crash points in this child, and write what `crash_points` returns to ``out``."""
    out.write_text(json.dumps(crash_points(strategy, world_size, folder, share)), encoding="utf-8")
    return 0
