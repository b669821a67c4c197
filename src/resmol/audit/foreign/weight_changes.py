"""The weights of a Trainer's checkpoints: whether they changed from one to the next, and are finite."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from resmol.audit.foreign.trainer_files import Checkpoint
from resmol.checks import Check, check_problems
from resmol.errors import CheckpointError, DataError
from resmol.system.safetensors_header import TensorInfo, read_header
from resmol.system.untrusted_text import listed
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 * 1024 * 1024
_EXPONENTS = {  # the bits that are all 1 in an infinity and in a NaN (IEEE 754, bfloat16)
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0000000000000),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint: name -> sha256 of its bytes; names of those that are not finite; or a problem."""

    name: str
    digests: dict[str, str]
    not_finite: tuple[str, ...]
    problem: str


def weight_changes(checkpoints: Sequence[Checkpoint]) -> Check:
    """Check that every tensor is finite, and that none stopped learning that learned before.

    A tensor that never changes was frozen, which can be meant: it is named. All of them unchanged between two
    checkpoints, or one that learned before, is a failure.

    Args:
        checkpoints: Of one run, in the order of their steps.
    """
    logger.info("reading the weights of every checkpoint")
    read = [_read(one) for one in checkpoints if one.weights]
    problems = [f"{one.name}: {one.problem}" for one in read if one.problem]
    problems += [f"{one.name}: {listed(one.not_finite, 3)} not finite" for one in read if one.not_finite]
    whole = [one for one in read if not one.problem]
    learned: set[str] = set()
    frozen = set[str].intersection(*(set(one.digests) for one in whole)) if whole else set()
    for before, after in pairwise(whole):
        shared = before.digests.keys() & after.digests.keys()
        same = {name for name in shared if before.digests[name] == after.digests[name]}
        if shared and same == shared:
            problems.append(f"no weight changed from {before.name} to {after.name}")
        elif stopped := sorted(same & learned):
            problems.append(
                f"{counted(len(stopped), 'tensor')} did not change from {before.name} to {after.name}, and did before: "
                + listed(stopped, 2)
            )
        learned = (learned | shared) - same
        frozen &= same
    never = f"; frozen throughout: {listed(sorted(frozen), 2)}" if frozen and len(whole) > 1 else ""
    measured = f"{counted(len(read), 'checkpoint')} with safetensors{never}"
    expected = "finite, and every tensor that learns goes on learning"
    return check_problems("weights", problems, measured, expected, "weights frozen, or rounded away, after a resume")


def _read(checkpoint: Checkpoint) -> Weights:
    digests: dict[str, str] = {}
    not_finite: list[str] = []
    try:
        for path in checkpoint.weights:
            header = read_header(path)
            for name, info in header.tensors.items():
                digests[name], finite = _look_at(path, header.header_bytes, info)
                not_finite += [] if finite else [name]
    except (CheckpointError, DataError) as error:
        return Weights(checkpoint.path.name, {}, (), error.what)
    except OSError as error:
        return Weights(checkpoint.path.name, {}, (), f"cannot be read ({error.strerror})")
    return Weights(checkpoint.path.name, digests, tuple(not_finite), "")


def _look_at(path: Path, data_start: int, info: TensorInfo) -> tuple[str, bool]:
    """Return the digest of a tensor's bytes, and whether its numbers are finite, with a block of it in memory."""
    digest, finite, remaining = hashlib.sha256(), True, info.end - info.start
    with path.open("rb") as file:
        file.seek(data_start + info.start)
        while remaining > 0 and (block := file.read(min(BLOCK_BYTES, remaining))):
            digest.update(block)
            remaining -= len(block)
            if info.dtype in _EXPONENTS:
                kind, mask = _EXPONENTS[info.dtype]
                bits = np.frombuffer(block, kind)
                finite = finite and not bool(((bits & bits.dtype.type(mask)) == mask).any())
    return digest.hexdigest(), finite
