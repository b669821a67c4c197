"""The folder in which a preparation is at work, and what the next one needs to go on after an interruption.

::

    OUT.unfinished/lock     held by the process that is at work
    OUT.unfinished/data/    what is going to be OUT
    OUT.unfinished/state    SHA-256 of the rest; arrays (.npz), replaced as a whole by `write_durable`

The state is bound to what the result depends on: inputs, options, tokenizer, versions. Another one is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from resmol.system.atomic_io import write_durable
from resmol.system.locks import exclusive_lock

State = dict[str, np.ndarray]
SAVE_SECONDS = 30.0  # between two saves
SAVE_SHARE = 0.05  # of the time goes into saving at most, however large the state
_DIGEST_BYTES = hashlib.sha256().digest_size


class UnusableStateError(Exception):
    """What was kept cannot be gone on with; the message says why."""


def as_array(value: Any) -> np.ndarray:
    """Return what JSON can hold as an array of a `State`."""
    return np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8)


def from_array(array: np.ndarray) -> Any:
    """Return what `as_array` was given, with lists for tuples."""
    return json.loads(array.tobytes())


def with_prefix(prefix: str, state: State) -> State:
    """Return a part of a larger state, its names behind a prefix."""
    return {f"{prefix}.{name}": array for name, array in state.items()}


def part_of(state: State, prefix: str) -> State:
    """Return what `with_prefix` was given."""
    return {name.removeprefix(f"{prefix}."): one for name, one in state.items() if name.startswith(f"{prefix}.")}


class UnfinishedWork:
    """A folder of work that can be gone on with.

    Args:
        folder: The folder.
        identity: What the work depends on, by name; None for work that is never saved.

    Attributes:
        folder: The folder.
        data: What will be the result.
        is_saved: Whether there is a state to go on from.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object] | None) -> None:
        self._identity = identity
        self._file = folder / "state"
        self._due = time.monotonic() + SAVE_SECONDS
        self.folder = folder
        self.data = folder / "data"
        self.is_saved = False

    def is_due(self) -> bool:
        """Return whether it is time to save."""
        return self._identity is not None and time.monotonic() >= self._due

    def save(self, state: State) -> None:
        """Replace the state; the files that it speaks of are durable already."""
        begun, content = time.monotonic(), io.BytesIO()
        np.savez(content, identity=as_array(self._identity), **state)  # type: ignore[arg-type]
        write_durable(self._file, hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())
        self.is_saved = True
        self._due = time.monotonic() + max(SAVE_SECONDS, (time.monotonic() - begun) / SAVE_SHARE)

    def load(self) -> State | None:
        """Return the state, None where there is none.

        Raises:
            UnusableStateError: It is damaged, or belongs to other work.
        """
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            raise UnusableStateError("its state is damaged")
        with np.load(io.BytesIO(content[_DIGEST_BYTES:]), allow_pickle=False) as arrays:
            state = dict(arrays)
        then, now = from_array(state.pop("identity")), json.loads(json.dumps(self._identity))
        changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        if changed:
            raise UnusableStateError(f"it was begun with another {' and another '.join(changed)}")
        self.is_saved = True
        return state

    def remove(self) -> None:
        """Remove what was kept."""
        self.is_saved = False
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self.data, ignore_errors=True)


@contextmanager
def unfinished_work(out: Path, identity: Mapping[str, object] | None) -> Iterator[UnfinishedWork]:
    """Hold the folder beside ``out`` in which it is made; remove it at the end, unless there is a saved state.

    Args:
        out: The result.
        identity: What it depends on, by name, each of which JSON can hold; None for what cannot be done again, and is
            never saved.

    Raises:
        RunInUse: Another process is at work there.
    """
    folder = out.with_name(f"{out.name}.unfinished")
    work = UnfinishedWork(folder, identity)
    with exclusive_lock(folder / "lock"):
        try:
            yield work
        finally:
            if not (work.is_saved and work.data.exists()):
                work.remove()
                with suppress(OSError):  # where what is open stays
                    (folder / "lock").unlink()
                    folder.rmdir()
