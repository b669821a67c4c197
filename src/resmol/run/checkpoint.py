"""Saving and loading checkpoints: by the commit protocol of system/atomic_io.py, verified before they are believed.

A checkpoint is a directory ``step-00005000`` with

* ``model.safetensors``: the weights, float32, Hugging Face's names (it is the weight file of an export),
* ``config.json``: the architecture, so that the directory is complete without its run,
* ``optimizer.safetensors``: the optimizer's moments: two of each parameter of AdamW, one of each of Muon,
* ``averaged.safetensors``: the averaged weights, where the run keeps an average,
* ``state.json``: everything else that the next step depends on,
* ``manifest.json``: size and sha256 of each file, a digest of each tensor; written last, it is the commit.

Nothing in it is a pickle. checkpoint_manifest.py describes the files and decides whether a directory is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckpointError, DiskFull
from resmol.model.llama import CausalLM
from resmol.run.checkpoint_manifest import (
    AVERAGED,
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    FileEntry,
    Manifest,
    SavedState,
    checkpoint_name,
    corrupt,
    file_entry,
    list_checkpoints,
    open_checkpoint,
    read_manifest,
    step_of,
)
from resmol.system.atomic_io import commit_staged, fsync_path, remove_directory, stage_directory
from resmol.system.locks import unless_being_read
from resmol.system.safetensors_header import Header, read_header

ADAMW_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # torch.optim's names
STORED_TYPES = {  # safetensors' names; every type that its header may name
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


# --- saving --------------------------------------------------------------------------------------------------


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


def stage_checkpoint(
    folder: Path, state: SavedState, tensors: CheckpointTensors, *, parent: str | None
) -> StagedCheckpoint:
    """Write the files of a checkpoint, and read them back: all of a save that needs the tensors, or a processor.

    Args:
        folder: The ``checkpoints`` directory of a run.
        state: What to write into ``state.json``.
        tensors: What to write; it is written as it is, and must be float32.
        parent: The sha256 of the manifest of the checkpoint before.

    Raises:
        DiskFull: No room. Nothing of the new checkpoint is left, and all older ones are.
        OSError: Any other failure of the disk, with the same consequence.
    """
    files = {name: _in_main_memory(group) for name, group in tensors.files.items()}
    # Digests of what is in memory, taken before anything is written: a fault between memory and disk shows.
    digests = {name: digest_all(group) for name, group in files.items()}
    names, entries = (*files, STATE, CONFIG), dict[str, FileEntry]()

    def write_files(temporary: Path) -> None:
        with ThreadPoolExecutor(len(names)) as pool:  # writing and hashing release the interpreter
            list(pool.map(lambda name: save_tensors(files[name], temporary / name), files))
            (temporary / CONFIG).write_text(
                json.dumps(tensors.config.to_hf(), indent=2) + "\n", encoding="utf-8", newline="\n"
            )
            (temporary / STATE).write_bytes(state.to_bytes())
            found = pool.map(lambda name: file_entry(temporary / name, digests.get(name, {})), names)
            entries.update(zip(names, found, strict=True))

    final = folder / checkpoint_name(state.step)
    quarantine(final)
    with _with_size_in_message(tensors.bytes):
        temporary = stage_directory(final, write_files)
    manifest = Manifest(step=state.step, parent=parent, permanent=state.permanent, files=entries)
    return StagedCheckpoint(temporary, final, manifest)


def commit_checkpoint(staged: StagedCheckpoint) -> Manifest:
    """Make a checkpoint durable: all of a save that waits for the disk. Raises what `stage_checkpoint` raises.

    A crash at any instant leaves all of it or nothing.
    """
    with _with_size_in_message(staged.manifest.bytes):
        commit_staged(staged.temporary, staged.final, lambda _: staged.manifest.to_bytes())
    return staged.manifest


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
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def digest_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each tensor; hashing runs on two threads, since it releases the interpreter."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _in_main_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are written: on a CPU the very same, of a GPU one copy, to be hashed and written."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of ordinary files; the library's own is for the user alone (0600).

    Raises:
        OSError: The disk failed, or is full.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors' errors are texts
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def quarantine(final: Path) -> None:
    """Rename a corrupt checkpoint, or whatever has its name, out of the way; it may be evidence, so it is kept."""
    if final.exists():
        number = 1
        while (aside := final.with_name(f"corrupt-{final.name}-{number}")).exists():
            number += 1
        final.rename(aside)
        fsync_path(final.parent)


# --- loading -------------------------------------------------------------------------------------------------


def load_into(checkpoint: Checkpoint, model: CausalLM, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill a model, and an optimizer where one is given, from a verified checkpoint.

    Raises:
        CheckpointError: Names, shapes, types or values are not those of this model.
    """
    load_tensors(checkpoint, WEIGHTS, weight_tensors(model))
    if optimizer is None:
        return
    allocate_moments(optimizer, checkpoint.state.loss_scale.updates(checkpoint.state.step))
    load_tensors(checkpoint, OPTIMIZER, moment_tensors(model, optimizer))


def load_tensors(checkpoint: Checkpoint, name: str, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors from a safetensors file of a verified checkpoint.

    Args:
        checkpoint: The checkpoint.
        name: The file, such as `AVERAGED`.
        targets: The file must hold exactly their names and shapes, in float32, all finite.

    Raises:
        CheckpointError: The file holds something else, or the checkpoint has no such file.
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

    def fill(name: str) -> None:
        tensor = stored_tensor(path, name, header)
        if digest(tensor) != digests.get(name):
            raise corrupt(path, f"gave other bytes for {name} than were in memory when it was saved")
        if not bool(torch.isfinite(tensor).all()):
            raise corrupt(path, f"holds NaN or infinity in {name}")
        targets[name].copy_(tensor)

    with ThreadPoolExecutor(2) as pool:  # hashing and copying release the interpreter
        list(pool.map(fill, targets))


def stored_tensor(path: Path, name: str, header: Header | None = None) -> Tensor:
    """Read one tensor of a safetensors file.

    It is read and not mapped, which costs the same time: some file systems cannot map files, a mapped file that shrinks
    kills the process, and its pages count as the process's memory.

    Args:
        path: The file.
        name: The tensor.
        header: The file's header; None reads it.

    Raises:
        CheckpointError: The file ends within the tensor, or its header breaks a rule.
        OSError: It cannot be read.
    """
    header = header or read_header(path)
    info = header.tensors[name]
    content = bytearray(info.end - info.start)
    with path.open("rb") as file:
        file.seek(header.header_bytes + info.start)
        if file.readinto(content) != len(content):
            raise corrupt(path, f"ends within {name}")
    if not content:
        return torch.empty(info.shape, dtype=STORED_TYPES[info.dtype])
    return torch.frombuffer(content, dtype=STORED_TYPES[info.dtype]).reshape(info.shape)


# --- retention -----------------------------------------------------------------------------------------------


def prune(folder: Path, keep_last: int, keep: Collection[int] = ()) -> list[str]:
    """Remove old checkpoints: the newest ``keep_last``, those of the steps ``keep`` and the permanent ones stay.

    The newest is read back and verified first; if it is corrupt, nothing is removed. One that another process is
    reading stays until the next time.

    Returns:
        The names of the checkpoints that were removed.

    Raises:
        CheckpointError: The newest checkpoint is corrupt.
    """
    paths = list_checkpoints(folder)
    expired = [path for path in paths[keep_last:] if not (step_of(path) in keep or _is_permanent(path))]
    if expired:
        open_checkpoint(paths[0]).verify()
    removed = []
    for path in expired:
        with unless_being_read(path / MANIFEST) as free:
            if free:
                remove_directory(path)
                removed.append(path.name)
    return removed


def _is_permanent(path: Path) -> bool:
    try:
        return read_manifest(path).permanent
    except CheckpointError:
        return True  # corrupt: never deleted, it may be evidence
