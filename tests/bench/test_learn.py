"""Time to quality: who trains, when we are where the others end, and that both are measured on the same text."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from resmol.bench.learn import (
    OURS,
    TUNED_RATES,
    LearnBench,
    LearnResult,
    compare_learning,
    learn_once,
    seconds_to_reach,
    trainer_name,
    trainer_task,
)
from resmol.bench.learning import Curve, Point
from resmol.bench.learning_plot import learning_svg
from resmol.bench.subprocess_runs import run_worker
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset, open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.train.build import make_loader, new_state
from resmol.train.evaluate import evaluate
from resmol.train.parallel import Runtime

RATES = {trainer_name(rate): rate for rate in (3e-4, *TUNED_RATES)}


def line(last: float, seconds: float) -> Curve:
    """A curve that falls straight from 4 bits per byte at 0 seconds."""
    return tuple(
        Point(step=n, tokens=64 * n, seconds=seconds * n / 4, loss=1.0, bits_per_byte=4 - (4 - last) * n / 4)
        for n in range(1, 5)
    )


def pretend(name: str, config: RunConfig, _folder: Path, _data: str) -> Curve:
    """We end at 2.0 after 10 s; the Trainer takes 20 s, usually to 3.0, and with the rate 3e-3 to 2.5."""
    luck = 0.001 * config.train.seed
    if name == OURS:
        return line(2.0 + luck, 10.0)
    return line((2.5 if RATES[name] == 3e-3 else 3.0) + luck, 20.0)


@pytest.fixture
def bench(tiny_config: RunConfig, tiny_dataset: Dataset, tmp_path: Path) -> LearnBench:
    return LearnBench(tiny_config, (), str(tiny_dataset.root), 2, 8, tmp_path / "learn.json")


def finished(bench: LearnBench) -> LearnResult:
    (*_, result) = compare_learning(bench, pretend)
    return result


def test_the_trainer_is_tuned_on_the_first_seed_alone(bench: LearnBench) -> None:
    result = finished(bench)
    assert result.tuned == trainer_name(3e-3)
    runs = [(cell.settings[0], cell.seed) for cell in result.record.cells]
    assert sorted(seed for name, seed in runs if name in RATES) == [8] * 4 + [9] * 2
    assert (trainer_name(3e-3), 9) in runs


def test_the_ratio_is_that_of_the_seconds_to_the_same_loss(bench: LearnBench) -> None:
    """3.0 lies half-way of our ten seconds, 2.5 at three quarters; the Trainer takes twenty for either."""
    result = finished(bench)
    usual, tuned = (result.ratio(trainer_name(rate)) for rate in (3e-4, 3e-3))
    assert usual is not None
    assert tuned is not None
    assert usual.middle == pytest.approx(4.0, rel=1e-2)
    assert tuned.middle == pytest.approx(20 / 7.5, rel=1e-2)
    assert usual.low < 4.01 < usual.high * 1.01
    text = StringIO()
    result.render(Console(file=text, width=200))
    assert "2.67x" in text.getvalue()
    assert "2.67x" in result.markdown()
    assert result.to_dict()["complete"]


def test_a_loss_that_is_never_reached_has_no_ratio(bench: LearnBench) -> None:
    (*_, result) = compare_learning(bench, lambda name, *_: line(3.5 if name == OURS else 3.0, 10.0))
    assert result.ratio(trainer_name(3e-4)) is None
    assert "not with 2 of 2 seeds" in result.markdown()


def test_a_stopped_comparison_goes_on(bench: LearnBench) -> None:
    for _, result in zip(range(3), compare_learning(bench, pretend), strict=False):
        assert result.next_run() is not None
    assert len(result.record.cells) == 2
    assert "not finished" in result.heading
    assert finished(bench).next_run() is None
    assert len(finished(bench).record.cells) == 8, "five with the first seed and three with the second"


def test_the_time_to_a_loss() -> None:
    curve = line(2.0, 8.0)  # 3.5, 3.0, 2.5, 2.0 after 2, 4, 6, 8 s
    assert seconds_to_reach(curve, 2.75) == pytest.approx(5.0)
    assert seconds_to_reach(curve, 3.9) == 2.0
    assert seconds_to_reach(curve, 1.9) is None
    assert seconds_to_reach((), 1.9) is None


def test_the_plot_has_a_line_for_each_run(bench: LearnBench) -> None:
    svg = learning_svg(finished(bench))
    assert svg.startswith("<svg")
    for name in (OURS, trainer_name(3e-4), trainer_name(3e-3)):
        assert svg.count(name) == 1, "in the legend, once for all seeds"


def test_a_planned_decay_keeps_its_share(bench: LearnBench) -> None:
    planned = with_overrides(
        bench.config, ["schedule.warmup_steps=2", "schedule.decay_start=30", "schedule.decay_steps=10"]
    )
    schedule = LearnBench(planned, steps=8).resolved().schedule
    assert (schedule.decay_start, schedule.decay_steps) == (6, 2)
    assert LearnBench(planned).resolved().train.steps == 40
    with pytest.raises(UsageError, match="ends within the warm-up"):
        LearnBench(planned, steps=2).resolved()


def test_both_are_measured_on_the_same_text(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    """A Trainer that hardly learns has the held-out loss of our initial weights, as resmol measures it."""
    config = LearnBench(with_overrides(tiny_config, ["data.document_mask=false"]), steps=2).resolved()
    metrics = run_worker(
        "resmol.bench.workers.learn_transformers", trainer_task(config, 1e-12, tmp_path, str(tiny_dataset.root)),
        tmp_path,
    )  # fmt: skip
    loader = make_loader(config, open_dataset(tiny_dataset.root).val)
    windows, tokenizer = config.evaluation.windows, tokenizer_in_cache
    spelled = tokenizer.spelled_end_bytes(loader.spelled_ends(windows))
    batches, model = loader.sequential(4, windows), new_state(config, Runtime.single()).model
    ours = evaluate(model, batches, tokenizer.byte_lengths(), Runtime.single(), spelled_bytes=spelled)
    assert [point["step"] for point in metrics["curve"]] == [1, 2]
    assert metrics["curve"][-1]["loss"] == pytest.approx(ours.loss, rel=1e-5)
    assert metrics["curve"][-1]["bits_per_byte"] == pytest.approx(ours.bits_per_byte, rel=1e-5)


def test_the_trainer_learns(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    config = LearnBench(tiny_config, steps=12).resolved()
    curve = learn_once(trainer_name(1e-2), config, tmp_path, str(tiny_dataset.root))
    assert [(point.step, point.tokens) for point in curve] == [(n, n * 64) for n in range(1, 13)]
    assert curve[-1].loss < curve[0].loss
