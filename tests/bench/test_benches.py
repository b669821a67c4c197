"""The benches themselves on tiny models: every process runs once and does the same work as ours."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from resmol.bench.checkpoint import CheckpointBench, checkpoint_contest, saved
from resmol.bench.comparison import Comparison
from resmol.bench.generate import GenerateBench, equal_tokens, generation_contests
from resmol.bench.prepare import PrepareBench, preparation_contest
from resmol.bench.profile import trace_training
from resmol.bench.scaling import Scaling, known_points, measure_point, scale
from resmol.bench.startup import StartBench, command, starting_contests, time_to_first_step
from resmol.bench.train import TrainBench, parse_batch, training_contests
from resmol.bench.workers import roofline
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.resolve import Text
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.data.tokenizer_files import cache_path
from resmol.errors import CheckFailed, ConfigError, DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger


def quiet(_: str) -> None:
    pass


@pytest.fixture
def tokenizer_in_cache(tiny_tokenizer: Tokenizer, own_cache: Path) -> Tokenizer:
    path = cache_path(tiny_tokenizer.sha256, own_cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_tokenizer.data)
    return tiny_tokenizer


def without_limit(contest: Comparison) -> Comparison:
    """Leave out the slow limit and the control, whose processes are those of others."""
    contest.contenders = [one for one in contest.contenders if one.kind in ("ours", "peer")]
    return contest


def test_batches_are_windows_by_tokens() -> None:
    assert parse_batch("2x512") == (2, 512)
    for wrong in ("2", "0x5", "2x", "x", "-1x5", "2x5x6"):
        with pytest.raises(UsageError, match="is no batch"):
            parse_batch(wrong)


def test_what_cannot_be_is_refused(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="repeats"):
        TrainBench(tiny_config, repeats=0)
    with pytest.raises(UsageError, match="no peer"):
        TrainBench(tiny_config, peer="litgpt")
    with pytest.raises(UsageError, match="precision"):
        TrainBench(tiny_config, precision="float8")
    with pytest.raises(ConfigError, match="seq_len"):
        TrainBench(tiny_config, batches=((1, 65),)).configurations()
    with pytest.raises(UsageError, match="context of 64"):
        GenerateBench(tiny_config, prompt=60, new=5)
    monkeypatch.setattr("resmol.bench.machine._version", lambda _package: None)
    with pytest.raises(DataError, match="needs transformers"):
        TrainBench(tiny_config, peer="transformers")


def test_trainer_comes_to_our_loss(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    """The same weights, windows, order, targets and optimizer: a peer that does other work has another mean loss."""
    wanted = TrainBench(
        tiny_config, ("data.document_mask=false", "optimizer.lr=0.01"), ((3, 16),), peer="transformers", steps=4
    )
    held = without_limit(training_contests(wanted, tmp_path, str(tiny_dataset.root), quiet)[0])
    held.contenders = held.contenders[:2]  # the tuned one compiles, which takes a minute
    held.run(1, 0, quiet)
    ours, peer = (one.measurements[0] for one in held.contenders)
    assert ours["mean_loss"] == pytest.approx(peer["mean_loss"], abs=2e-4)
    assert len(peer["step_seconds"]) == len(ours["step_seconds"]) == 4
    assert "mean losses differ by" in held.markdown()


def test_generate_gives_equal_tokens(tiny_config: RunConfig, tmp_path: Path) -> None:
    held = without_limit(generation_contests(GenerateBench(tiny_config, (2,), 8, 6, "transformers"), tmp_path)[0])
    held.contenders = held.contenders[:2]
    held.run(1, 0, quiet)
    assert "gave the same 12 of 12 tokens" in held.markdown()
    assert held.contenders[1].measurements[0]["prefill_seconds"] > 0
    assert equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == (4, 6)


def test_prepare_counts_the_same_tokens(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "input.txt"
    text.write_text("the king and the kalo mi ner 17. \n" * 3000, encoding="utf-8")
    held = preparation_contest(PrepareBench(Text(inputs=(str(text),)), 1), tiny_tokenizer, tmp_path, quiet)
    held = without_limit(held)
    held.run(1, 0, quiet)
    assert len({one.measurements[0]["tokens"] for one in held.contenders}) == 1
    assert all(one.measurements[0]["megabytes_per_second"] > 0 for one in held.contenders)


def test_checkpoints_are_saved_and_loaded(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    held = without_limit(checkpoint_contest(CheckpointBench(tiny_config), tmp_path, str(tiny_dataset.root)))
    held.run(1, 0, quiet)
    for one in held.contenders:
        assert not one.failure
        assert one.measurements[0]["load_seconds"] > 0
    assert not (tmp_path / "peer").exists()


def test_starts_are_timed(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    for held in starting_contests(StartBench(tiny_config), tmp_path, str(tiny_dataset.root)):
        held.run(1, 0, quiet)
        assert all(one.values("seconds")[0] > 0 for one in held.contenders)


def test_the_first_step_ends_within_its_process(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    started = time.perf_counter()
    seconds = time_to_first_step(tiny_config, tmp_path, str(tiny_dataset.root))["seconds"]
    step = effective_steps(read_ledger(RunDir(tmp_path / "run").ledger).records)[1]
    assert step["seconds"] < seconds < time.perf_counter() - started


def test_a_start_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="no such thing"):
        command(["-c", "raise SystemExit('no such thing')"])


def test_a_save_in_the_background_says_for_how_long_training_stood_still() -> None:
    record: Any = {"kind": "save", "step": 1, "seconds": 3.0, "bytes": 5}
    assert saved([record])["stalled_seconds"] == 3.0
    assert saved([{**record, "stalled_seconds": 0.5}])["stalled_seconds"] == 0.5
    with pytest.raises(CheckFailed, match="saved nothing"):
        saved([])


def test_points_are_kept_and_failures_shown(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmol.bench.scaling.load_preset", lambda _name: tiny_config)
    measured: list[int] = []

    def measure(_wanted: Any, config: RunConfig, *_: Any) -> dict[str, Any]:
        measured.append(config.data.seq_len)
        point = {"estimated_bytes": 1 << 20, "flops_per_token": 10**9}
        if config.data.seq_len == 64:
            return {**point, "outcome": "did not fit in memory"}
        return {**point, "outcome": "measured", "tokens_per_second": 50.0, "peak_bytes": 1 << 30, "step_seconds": [0.5]}

    wanted = Scaling(("tiny",), (64, 16, 128, 32), (1,))
    scale(wanted, tmp_path, "", tmp_path / "out", quiet, measure)
    assert measured == [16, 32, 64]  # the cheap ones first; 128 is beyond the context
    with (tmp_path / "out" / "points.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"cut off')
    scale(wanted, tmp_path, "", tmp_path / "out", quiet, measure)
    assert measured == [16, 32, 64, 64]
    assert len(known_points(tmp_path / "out")) == 2
    written = (tmp_path / "out" / "scaling.md").read_text(encoding="utf-8")
    assert "| tiny | 1 x 16 | 0.500 | 50 | 1,024 | 1 | 1.000 | 50 |  |" in written
    assert "did not fit in memory" in written
    assert (tmp_path / "out" / "scaling.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_point_without_memory_is_a_result(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    wanted = Scaling(("tiny",), (16,), (1,), memory_bytes=80 << 20)
    point = measure_point(wanted, with_overrides(tiny_config, []), tmp_path, str(tiny_dataset.root))
    assert point["outcome"] == "did not fit in memory"


def test_a_trace_is_written(tiny_config: RunConfig, tiny_dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    table = trace_training(tiny_config, str(tiny_dataset.root), file, steps=1, warmup=1)
    assert "aten::mm" in table
    names = {event.get("name") for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"]}
    assert "aten::mm" in names


def test_the_limit_process_answers(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS_PER_PRODUCT", 0.0)
    monkeypatch.setattr(roofline, "bandwidth", lambda: {"read_bytes_per_second": 1e9, "update_bytes_per_second": 1e9})
    task = {"of": "training", "model": tiny_config.model.model_dump(), "rows": 2, "seq_len": 16}
    found = roofline.measure_limit({**task, "precision": "float32", "threads": 0})
    assert found["tokens_per_second"] > found["with_update"] > 0


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"seconds": 0.0}, {"seconds": float("nan")}, {"seconds": -5.0}, {"memory_bytes": -1}]
)
def test_a_scaling_that_cannot_be_measured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).removesuffix('_bytes')}"):
        Scaling(("tiny",), (16,), (1,), **wrong)
