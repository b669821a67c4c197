"""The mistakes of other reproductions, each put into our code, and the check that notices it.

`make mistakes` prints them as a table: row, mistake, caught by.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "mistakes"))  # the parts of this test; they hold no tests of their own

import architecture
import publishing
import resuming
import text
import training
from bench import Bench, Guard, Mistake
from references import baselines_once
from tiny import TrainTiny

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer

ALL: list[Mistake] = sorted(
    [*architecture.MISTAKES, *training.MISTAKES, *resuming.MISTAKES, *text.MISTAKES, *publishing.MISTAKES],
    key=lambda m: m.row,
)
GUARDS: list[Guard] = list(dict.fromkeys(mistake.guard for mistake in ALL))


@pytest.fixture(scope="module", autouse=True)
def references_are_computed_once() -> Iterator[None]:
    """A mistake in our code changes nothing about transformers' results."""
    with baselines_once():
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistakes") / "straight"


@pytest.fixture
def bench(
    tmp_path: Path,
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    short_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    train_tiny: TrainTiny,
    straight: Path,
) -> Bench:
    if not straight.exists():  # before any mistake is put in
        train_tiny(straight, 24, data=str(short_dataset.root))
    return Bench(tmp_path, tiny_config, tiny_dataset, short_dataset, tiny_tokenizer, train_tiny, straight)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_healthy_code_passes(guard: Guard, bench: Bench) -> None:
    assert guard(bench) == set()


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: f"{mistake.row}: {mistake.words}")
def test_the_mistake_is_caught(
    mistake: Mistake, bench: Bench, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    with monkeypatch.context() as patch:
        mistake.put_in(patch)
        found = mistake.guard(bench)
    record_property("mistake", (mistake.row, mistake.words, sorted(found)))
    missed = {wanted for wanted in mistake.caught_by if not any(name.startswith(wanted) for name in found)}
    assert not missed, f"not caught by {missed}, but by {found or 'nothing'}"


def test_every_row_has_its_mistake() -> None:
    assert {mistake.row for mistake in ALL} == set(range(1, 26))


def test_the_table_can_be_made() -> None:
    """pytest refuses to start in a process that has imported the package."""
    script = Path(__file__).parent / "mistakes" / "table.py"
    only = ["--collect-only", "-k", "every_row"]
    done = subprocess.run([sys.executable, str(script), *only], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_mistakes.py: 1" in done.stdout  # collected
    assert "caught by" in done.stdout
