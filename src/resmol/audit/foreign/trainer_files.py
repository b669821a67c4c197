"""Read what transformers' Trainer leaves: each ``trainer_state.json``, and names of files; nothing is unpickled."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.errors import DataError
from resmol.system.user_paths import user_path

STATE = "trainer_state.json"
MAX_STATE_BYTES = 256 * 1024 * 1024  # of a run with a million logged steps
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")
_PICKLES = (".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Log:
    """One logged training step; a number that was not logged, or is no number, is None."""

    step: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    epoch: float | None
    tokens: float | None
    seconds: float | None


@dataclass(frozen=True)
class State:
    """What a ``trainer_state.json`` says.

    Attributes:
        name: Of its folder, for messages.
        global_step: The step after which it was written.
        plan: ``max_steps`` and ``train_batch_size``, as far as they are there.
        logging_steps: Every so many steps were to be logged; None if it does not say.
        counters: What can only grow: epoch, tokens, floating-point operations.
        history: Every entry of ``log_history``, evaluations too, as it is.
    """

    name: str
    global_step: int
    plan: dict[str, int]
    logging_steps: int | None
    counters: dict[str, float]
    history: tuple[dict[str, Any], ...]

    @property
    def logs(self) -> list[Log]:
        """The logged training steps, in the order of the file."""
        return [_log(entry) for entry in self.history if "loss" in entry and _whole(entry.get("step")) is not None]


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``checkpoint-N``.

    Attributes:
        path: The folder.
        step: N; None for a folder of another name.
        state: What its ``trainer_state.json`` says; None where it cannot be read.
        problem: Why it cannot be read.
        weights: Its safetensors files.
        pickles: Names of files that would run code if they were read.
    """

    path: Path
    step: int | None
    state: State | None
    problem: str
    weights: tuple[Path, ...]
    pickles: tuple[str, ...]


@dataclass(frozen=True)
class ForeignRun:
    """The checkpoints of a run by step, and every state, that of the end included, in the order of their steps."""

    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    states: tuple[State, ...]

    @property
    def last(self) -> State:
        """The state that knows most."""
        return self.states[-1]


def read_trainer_files(folder: str | Path) -> ForeignRun:
    """Read the folder that a Trainer wrote (``output_dir``), or one of its checkpoints.

    Raises:
        DataError: There is no checkpoint of a Trainer, or no state that can be read.
    """
    place = user_path(folder)
    found = [path for path in place.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    if not found and (place / STATE).is_file():
        found = [place]
    checkpoints = sorted((_checkpoint(path) for path in found), key=lambda one: one.step or 0)
    states = [one.state for one in checkpoints if one.state is not None]
    if place not in found and (place / STATE).is_file():
        final, _ = _state(place / STATE, "the end")
        states += [final] if final else []
    if not states:
        why = next((f": {one.path.name}: {one.problem}" for one in checkpoints), "")
        raise DataError(
            f"{place} holds no state of a transformers Trainer{why}",
            fix=f"name the output_dir of a Trainer, whose folders checkpoint-N hold {STATE}",
        )
    return ForeignRun(place, tuple(checkpoints), tuple(sorted(states, key=lambda state: state.global_step)))


def _checkpoint(path: Path) -> Checkpoint:
    state, problem = _state(path / STATE, path.name)
    named = _CHECKPOINT.fullmatch(path.name)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return Checkpoint(
        path,
        int(named[1]) if named else None,
        state,
        problem,
        tuple(file for file in files if file.suffix == ".safetensors"),
        tuple(file.name for file in files if file.suffix in _PICKLES),
    )


def _state(path: Path, name: str) -> tuple[State | None, str]:
    """Return what a file says; None and the reason where it says nothing."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
        if len(content) > MAX_STATE_BYTES:
            return None, f"{STATE} is longer than {MAX_STATE_BYTES:,} bytes"
        found = json.loads(content)
    except FileNotFoundError:
        return None, f"there is no {STATE}"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{STATE} cannot be read ({type(error).__name__})"
    history = found.get("log_history") if isinstance(found, dict) else None
    step = _whole(found.get("global_step")) if isinstance(found, dict) else None
    if step is None or not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        return None, f"{STATE} has no global_step and log_history"
    plan = {key: _whole(found.get(key)) for key in ("max_steps", "train_batch_size")}
    counters = {key: _number(found.get(key)) for key in ("epoch", "num_input_tokens_seen", "total_flos")}
    return State(
        name,
        step,
        {key: value for key, value in plan.items() if value is not None},
        _whole(found.get("logging_steps")),
        {key: value for key, value in counters.items() if value is not None},
        tuple(history),
    ), ""


def _log(entry: dict[str, Any]) -> Log:
    names = ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "train_runtime")
    return Log(int(entry["step"]), *(_number(entry.get(name)) for name in names))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
