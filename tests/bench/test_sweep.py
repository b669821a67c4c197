"""Whole runs over several seeds: paired differences, the record that a stopped sweep goes on from, what is refused."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from resmol.bench.learning import Curve, Point, for_learning, measure_learning
from resmol.bench.paired_stats import mean_interval
from resmol.bench.sweep import Sweep, SweepResult, sweep_settings
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, UsageError
from resmol.run.ledger import read_ledger, select

FACTOR = ("optimizer.lr=0.01,0.02",)
Loss = Callable[[RunConfig], float]


def pretend(loss: Loss) -> Callable[[RunConfig, Path, str], Curve]:
    """A measurer that trains nothing."""

    def measure(config: RunConfig, _folder: Path, _data: str) -> Curve:
        return (Point(step=config.train.steps, tokens=640, seconds=2.0, loss=1.0, bits_per_byte=loss(config)),)

    return measure


def better_by_a_tenth(config: RunConfig) -> float:
    """The luck of a seed is ten times the difference that the learning rate makes."""
    return 2.0 + config.train.seed - (0.1 if config.optimizer.lr == 0.02 else 0.0) + 0.001 * (config.data.seed % 2)


@pytest.fixture
def sweep(tiny_config: RunConfig, tiny_dataset: Dataset, tmp_path: Path) -> Sweep:
    return Sweep(tiny_config, FACTOR, (), str(tiny_dataset.root), 3, 10, tmp_path / "records" / "lr.json")


def finished(sweep: Sweep, loss: Loss = better_by_a_tenth) -> SweepResult:
    (*_, result) = sweep_settings(sweep, pretend(loss))
    return result


def test_a_difference_is_paired_by_seed(sweep: Sweep) -> None:
    result = finished(sweep)
    assert not result.missing
    text = StringIO()
    result.render(Console(file=text, width=200))
    assert "-0.1000 (-0.1000 to -0.1000): better" in text.getvalue()
    assert "better" in result.markdown()
    assert [cell["seed"] for cell in result.to_dict()["cells"]] == [8, 8, 9, 9, 10, 10]


def test_noise_of_the_same_size_shows_no_difference(sweep: Sweep) -> None:
    noise = {(0.01, 8): 0.1, (0.02, 8): 0.0, (0.01, 9): 0.0, (0.02, 9): 0.1, (0.01, 10): 0.0, (0.02, 10): 0.0}
    result = finished(sweep, lambda config: 2.0 + noise[config.optimizer.lr, config.train.seed])
    assert "no difference shown" in result.markdown()


def test_one_seed_is_called_one_seed(sweep: Sweep) -> None:
    result = finished(Sweep(sweep.config, FACTOR, (), sweep.data, 1, 10, sweep.record))
    assert "-0.1000 (one seed)" in result.markdown()
    assert "--seeds 3" in result.remarks()[0]


def test_the_interval_holds_95_percent_of_students_distribution() -> None:
    """Against the integral of the distribution's density, by trapezoids."""
    values = [2.31, 2.42, 2.17, 2.50]
    found, freedom = mean_interval(values), len(values) - 1
    reach = (found.high - found.mean) / (statistics.stdev(values) / math.sqrt(len(values)))
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    width = reach / 10_000
    inside = sum((1 + (n * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(-10_000, 10_000)) * width
    assert scale * inside == pytest.approx(0.95, abs=1e-4)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.low + found.high == pytest.approx(2 * found.mean)
    assert found.excludes_zero
    assert not mean_interval([-1.0, 1.0, 0.5]).excludes_zero


def test_a_stopped_sweep_goes_on_and_repeats_nothing(sweep: Sweep) -> None:
    trained: list[tuple[float, int]] = []

    def counted(config: RunConfig) -> float:
        if len(trained) == 2:
            trained.append((0.0, 0))
            raise KeyboardInterrupt
        trained.append((config.optimizer.lr, config.train.seed))
        return better_by_a_tenth(config)

    with pytest.raises(KeyboardInterrupt):
        finished(sweep, counted)
    result = finished(sweep, counted)
    assert trained == [(0.01, 8), (0.02, 8), (0.0, 0), (0.01, 9), (0.02, 9), (0.01, 10), (0.02, 10)]
    assert not result.missing
    more = Sweep(sweep.config, FACTOR, ("optimizer.lr=0.03 optimizer.beta1=0.8",), sweep.data, 3, 10, sweep.record)
    assert finished(more, counted).record.ends(("optimizer.lr=0.03", "optimizer.beta1=0.8"), range(8, 11)).keys() == {
        8,
        9,
        10,
    }
    assert len(trained) == 10, "other variants are added to the record"


def test_a_configuration_alone_is_a_table_and_can_begin_with_any_seed(sweep: Sweep) -> None:
    """Seeds 9 and 10 first, those of the configuration later: one record, and nothing is trained twice."""
    trained: list[int] = []

    def counted(config: RunConfig) -> float:
        trained.append(config.train.seed)
        return float(config.train.seed)

    late = Sweep(sweep.config, ("train.seed=9", "data.seed=9"), (), sweep.data, 2, 10, sweep.record)
    assert list(finished(late, counted).seeds) == trained == [9, 10]
    result = finished(Sweep(sweep.config, (), (), sweep.data, 3, 10, sweep.record), counted)
    assert trained == [9, 10, 8]
    (row,) = result.cells()
    assert row[:3] == ["as configured", mean_interval([8.0, 9.0, 10.0]).show(), ""]


def test_a_record_of_something_else_is_refused(sweep: Sweep) -> None:
    finished(sweep)
    assert sweep.record is not None
    longer = Sweep(sweep.config, FACTOR, (), sweep.data, 3, 20, sweep.record)
    with pytest.raises(UsageError, match=r"another configuration: its train\.steps is 10, and 20 is asked for"):
        finished(longer)
    text = sweep.record.read_text(encoding="utf-8")
    sweep.record.write_text(text.replace(json.loads(text)["data_fingerprint"], "0" * 64), encoding="utf-8")
    with pytest.raises(UsageError, match="another text"):
        finished(sweep)
    sweep.record.write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="is no record of runs that learn"):
        finished(sweep)


def test_a_record_from_before_a_field_had_it_at_its_default(sweep: Sweep) -> None:
    finished(sweep)
    assert sweep.record is not None
    record = json.loads(sweep.record.read_text(encoding="utf-8"))
    assert record["base"].pop("train.fingerprint_steps") == 0
    sweep.record.write_text(json.dumps(record), encoding="utf-8")
    assert not finished(sweep).missing
    other = Sweep(sweep.config, (*FACTOR, "train.fingerprint_steps=3"), (), sweep.data, 3, 10, sweep.record)
    with pytest.raises(UsageError, match=r"its train\.fingerprint_steps is 0, and 3 is asked for"):
        finished(other)


def test_a_run_that_fails_is_a_row_with_its_reason(sweep: Sweep) -> None:
    def diverges(config: RunConfig) -> float:
        if config.optimizer.lr == 0.02:
            raise CheckFailed("the loss is not finite", fix="")
        return 2.0

    assert "failed: the loss is not finite" in finished(sweep, diverges).markdown()
    again = finished(sweep)
    assert "failed" not in again.markdown(), "the same command tries it again"
    assert len(again.record.cells) == 6


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"steps": 0}, {"factors": ("optimizer.lr",)}])
def test_what_is_no_sweep_is_refused(sweep: Sweep, changes: dict[str, object]) -> None:
    arguments = {"config": sweep.config, "factors": FACTOR, "seeds": 3, "steps": 10, **changes}
    with pytest.raises(UsageError):
        next(sweep_settings(Sweep(**arguments)))  # type: ignore[arg-type] # the keywords are its own


def test_a_real_run_has_a_curve(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    averaging = for_learning(tiny_config, 20, 10).replace({"averaging.fraction": 0.5, "averaging.every": 1})
    curve = measure_learning(averaging, tmp_path, str(tiny_dataset.root))
    assert [point.step for point in curve] == list(range(2, 21, 2))
    assert curve[-1].loss < curve[0].loss
    assert curve[-1].tokens > 9 * curve[0].tokens > 0
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    assert [point.loss for point in curve] == [record["averaged_loss"] for record in select(records, "eval")]
    steps = select(records, "step")
    assert curve[-1].seconds == pytest.approx(sum(record["seconds"] for record in steps), abs=1e-3)
