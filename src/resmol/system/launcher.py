"""What a launcher such as torchrun told this process: its rank among the processes of a run.

The variables are a set. One of them alone is left over from another launch, or a launch went wrong, and a process that
believed it would train beside the run: a rank other than 0 writes no record, and nobody waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from resmol.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NODE_SIZE = "LOCAL_WORLD_SIZE"  # torchrun sets it as well, other launchers need not
# Where other launchers count the processes that they started; each of these would train alone.
OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
    "PMI_SIZE": "mpiexec (MPICH, Intel MPI)",
    "MV2_COMM_WORLD_SIZE": "mpirun (MVAPICH2)",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
}
MAX_PORT = 65535
RANK_0_SECONDS = 10.0  # another rank's message comes so much later, if this rank is then still there
WITH_TORCHRUN = "start the ranks with torchrun (docs/distributed.md)"


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of a run; a process that no launcher started is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def this_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what torchrun's variables say: all of them, or none.

    Raises:
        UsageError: Some are missing or empty, or contradict each other; or another launcher started several processes.
    """
    if not any(name in environment for name in VARIABLES):
        _refuse_other_launchers(environment)
        return Launch()
    _require_all(environment)
    _number("MASTER_PORT", environment, 1, MAX_PORT)
    world_size = _number("WORLD_SIZE", environment, 1)
    rank = _number("RANK", environment, 0, world_size - 1, of="WORLD_SIZE")
    node = _number(NODE_SIZE, environment, 1, world_size, of="WORLD_SIZE") if environment.get(NODE_SIZE) else 0
    last = (node or world_size) - 1
    local_rank = _number("LOCAL_RANK", environment, 0, last, of=NODE_SIZE if node else "WORLD_SIZE")
    return Launch(rank, world_size, local_rank, node or 1)


def wait_for_rank_zero(environment: Mapping[str, str] = os.environ) -> None:
    """Let rank 0 print an error first: as soon as it has ended, torchrun ends this rank, which may have the same one.

    What is wrong with a command is wrong on every rank, and one message says more than sixteen.
    """
    if all(environment.get(name) for name in VARIABLES) and environment["RANK"] != "0":
        time.sleep(RANK_0_SECONDS)


def _require_all(environment: Mapping[str, str]) -> None:
    given = [name for name in VARIABLES if environment.get(name, "").strip()]
    empty = [name for name in VARIABLES if name in environment and name not in given]
    absent = [name for name in VARIABLES if name not in environment]
    if not empty and not absent:
        return
    found = [f"{_listed(names)} {word}" for names, word in ((given, "set"), (empty, "empty"), (absent, "not set"))
             if names]  # fmt: skip
    raise UsageError(
        f"a launcher's variables are only partly there: {'; '.join(found)}",
        fix=f"to train in one process: unset {' '.join((*given, *empty))}; or {WITH_TORCHRUN}, which sets all of them",
    )


def _listed(names: list[str]) -> str:
    joined = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"{joined} {'are' if len(names) > 1 else 'is'}"


def _number(
    name: str, environment: Mapping[str, str], least: int, most: int | None = None, *, of: str | None = None
) -> int:
    text = environment[name].strip()
    if text.isdecimal() and len(text) < 10 and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    wanted = f"a whole number from {least} on" if most is None else f"a whole number from {least} to {most}"
    beside = f" beside a {of} of {environment[of]}" if of else ""
    raise UsageError(
        f"{name} is {text!r}; it has to be {wanted}{beside}",
        fix=f"to train in one process: unset {' '.join(VARIABLES)}; or {WITH_TORCHRUN}, which sets all of them",
    )


def _refuse_other_launchers(environment: Mapping[str, str]) -> None:
    for name, launcher in OTHER_LAUNCHERS.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UsageError(
                f"{launcher} started {count} processes of this command ({name}), and each would train alone",
                fix=f"let {launcher.split()[0]} start one process per node, torchrun, which starts the ranks "
                "(docs/distributed.md); or one process in all",
            )
