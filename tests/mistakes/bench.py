"""What the guards work with, and what a mistake is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.train.parallel import Runtime
from resmol.train.step import TrainState

RUNTIME = Runtime.single()


@dataclass(frozen=True)
class Bench:
    """The tiny run of the suite: configuration, data, and a function that starts or resumes it."""

    folder: Path
    config: RunConfig
    data: Dataset
    short_data: Dataset  # an epoch of about 15 steps
    tokenizer: Tokenizer
    train: Callable[..., TrainState]
    straight: Path  # an uninterrupted run of 24 steps on the short data


Guard = Callable[[Bench], set[str]]
PutIn = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mistake:
    """A mistake of another reproduction.

    Attributes:
        row: Its number.
        words: What is wrong.
        put_in: Puts it into our code.
        guard: The checks that must notice; it returns the names of those that fail, none for healthy code.
        caught_by: Checks that must be among them (the beginning of the name).
    """

    row: int
    words: str
    put_in: PutIn
    guard: Guard
    caught_by: frozenset[str]


def mistake(row: int, words: str, put_in: PutIn, guard: Guard, *caught_by: str) -> Mistake:
    """Make a `Mistake`."""
    return Mistake(row, words, put_in, guard, frozenset(caught_by))


def replaced(target: str, by: Any) -> PutIn:
    """Return what replaces a name of the package."""
    return lambda patch: patch.setattr(target, by)
