"""Runs of several ranks without torchrun: one process imports PyTorch, and forks the ranks of each run.

What FSDP2 and the compiler import is imported here as well, once. Started as a program, it reads the runs from standard
input as JSON and writes what they computed to a folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed.fsdp
from torch import Tensor

from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.loader import Batch, StepBatch
from resmol.run.checkpoint import allocate_moments
from resmol.run.tensor_shards import shard_of
from resmol.train.build import new_state
from resmol.train.gradients import replicated
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.step import TrainState, train_step

MICRO_BATCHES, TOKENS = 4, 16
SMALL = [  # the preset of the 1.7B model, at reduced depth and width
    "model.vocab_size=4096", "model.hidden_size=96", "model.intermediate_size=128", "model.num_hidden_layers=3",
    "model.num_attention_heads=3", "model.num_key_value_heads=3", f"data.seq_len={TOKENS}",
    "batch.micro_batch_size=1", f"batch.global_batch_tokens={MICRO_BATCHES * TOKENS}", "schedule.warmup_steps=1",
    "runtime.device=cpu", "runtime.precision=float32", "runtime.matmul_backend=mkl", "runtime.compile=off",
    "runtime.activation_checkpointing=off", "runtime.threads=1", "averaging.fraction=0.5", "averaging.every=1",
]  # fmt: skip


class Run(NamedTuple):
    """A run of some steps.

    Attributes:
        world_size: Number of ranks.
        overrides: Laid over `SMALL`.
        steps: How many.
        reopened: After which step to build everything anew, as a resume does.
    """

    world_size: int
    overrides: tuple[str, ...] = ()
    steps: int = 2
    reopened: int = 0


class Outcome(NamedTuple):
    """What a run computed.

    Attributes:
        losses: Of each step.
        norms: Of each step's gradient.
        initial: The initial weights, whole.
        tensors: Weights, moments and averages after the last step, whole.
        held: Numbers that rank 0 holds of them.
        rows: The rows of the embedding that each rank holds.
        kept: Bytes of the blocks' weights, or of copies of them, that rank 0 has between forward and backward pass.
    """

    losses: list[float]
    norms: list[float]
    initial: dict[str, Tensor]
    tensors: dict[str, Tensor]
    held: int
    rows: list[int]
    kept: int


def run_all(runs: dict[str, Run], folder: Path) -> dict[str, Outcome]:
    """Execute the runs, one after the other."""
    words = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    text = json.dumps(runs)
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Outcome(**torch.load(folder / f"{name}.pt")) for name in runs}


def config_of(run: Run) -> RunConfig:
    return load_preset("smollm2-1.7b", [*SMALL, *run.overrides])


def batch_of(step: int, vocabulary: int, runtime: Runtime) -> StepBatch:
    """Return a rank's share of made-up micro-batches; their targets differ in number."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocabulary, (MICRO_BATCHES, TOKENS + 1), generator=draw)
    targets = ids[:, 1:].clone()
    targets[0, 5:] = -100
    rows = range(MICRO_BATCHES)
    batches = [Batch(ids[r : r + 1, :-1], targets[r : r + 1], None, (r,), int((targets[r] >= 0).sum())) for r in rows]
    share = MICRO_BATCHES // runtime.world_size
    own = batches[runtime.rank * share : (runtime.rank + 1) * share]
    return StepBatch(own, sum(b.tokens for b in batches), window_digest="", windows_seen=0, epoch=0.0)


def opened(config: RunConfig, runtime: Runtime, before: TrainState | None = None) -> TrainState:
    """Return a state as a start builds it, or as a resume does, from the tensors of another one."""
    state = new_state(config, runtime)
    if before is not None:
        state.step = before.step
        allocate_moments(state.optimizer, before.step)
        files = before.tensors().files
        for file, group in state.tensors().files.items():
            for name, tensor in group.items():
                shard_of(tensor).local.copy_(shard_of(files[file][name]).local)
    if runtime.world_size > 1 and runtime.mesh is None:
        state.ddp = replicated(state.model, runtime)
    return state


def be_rank(rank: int, port: int, run: Run, file: Path) -> None:
    torch.set_num_threads(1)
    if run.world_size > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(run.world_size),
        )  # fmt: skip
    config = config_of(run)
    with open_runtime(config) as runtime:
        state, results = opened(config, runtime), []
        initial = whole_tensors(state, "model.safetensors")
        for step in range(run.steps):
            if run.reopened and step == run.reopened:
                state = opened(config, runtime, state)
            results.append(train_step(state, batch_of(step, config.model.vocab_size, runtime), config, runtime))
        tensors, rows = whole_tensors(state), torch.zeros(run.world_size, dtype=torch.long)
        rows[rank] = len(shard_of(state.model.model.embed_tokens.weight).local)
        runtime.all_reduce_sum(rows)
        kept = kept_for_backward(state, config, runtime)
        held = sum(shard_of(t).local.numel() for group in state.tensors().files.values() for t in group.values())
        if rank == 0:
            losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
            outcome = Outcome(losses, norms, initial, tensors, held, rows.tolist(), kept)  # type: ignore[arg-type]
            torch.save(outcome._asdict(), file)


def kept_for_backward(state: TrainState, config: RunConfig, runtime: Runtime) -> int:
    """Count what a forward pass keeps that has the shape of a block's weight, as it is or transposed."""
    shapes = {tuple(weight.shape) for weight in state.model.model.layers.parameters() if weight.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ids = torch.zeros((1, TOKENS), dtype=torch.long)
        with runtime.autocast():
            loss = state.model.loss(ids, ids, None, config.runtime.loss_chunk_tokens)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in kept
        if tuple(tensor.shape) in shapes and type(tensor) in (Tensor, torch.nn.Parameter)
    }
    found = sum(storage.nbytes() for storage in storages.values())
    loss.backward()
    return found


def whole_tensors(state: TrainState, file: str = "") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, or of one of its files, gathered from all ranks."""
    found = {}
    for one, group in state.tensors().files.items() if state.optimizer.state else initial_files(state):
        for name, tensor in group.items() if file in ("", one) else ():
            placed: Any = tensor.detach()
            found[f"{one}/{name}"] = (placed.full_tensor() if hasattr(placed, "full_tensor") else placed).clone()
    return found


def initial_files(state: TrainState) -> Any:
    return {"model.safetensors": dict(state.model.named_parameters())}.items()


def main() -> None:
    fork, folder = multiprocessing.get_context("fork"), Path(sys.argv[1])
    for name, fields in json.load(sys.stdin).items():
        run = Run(*fields)
        with socket.socket() as free:  # rank 0 opens the store: a process with threads should not fork
            free.bind(("127.0.0.1", 0))
            arguments = (free.getsockname()[1], run, folder / f"{name}.pt")
        ranks = [fork.Process(target=be_rank, args=(rank, *arguments)) for rank in range(run.world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(200)
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{name}: exit codes {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    main()
