"""The benchmarks on tiny models: every process runs once and does the same work as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resmol.bench.checkpoint import CheckpointBench, checkpoint_comparison, first_save
from resmol.bench.comparison import Comparison
from resmol.bench.generate import GenerateBench, equal_tokens, generation_comparisons
from resmol.bench.prepare import PrepareBench, parse_size, preparation_comparison
from resmol.bench.profile import trace_training
from resmol.bench.text_formats import FORMATS
from resmol.bench.train import TrainBench, parse_batch, training_comparisons
from resmol.bench.workers import roofline
from resmol.config.run_config import RunConfig
from resmol.data.chunking import ReadCounts
from resmol.data.readers import read_inputs
from resmol.data.resolve import Text
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, ConfigError, DataError, UsageError


def without_roofline(comparison: Comparison) -> Comparison:
    """Leave out the slow roofline and the control, which is measured by the same process as the reference."""
    comparison.variants = [one for one in comparison.variants if one.kind in ("reference", "other")]
    return comparison


def test_batches_are_windows_by_tokens() -> None:
    assert parse_batch("2x512") == (2, 512)
    for wrong in ("2", "0x5", "2x", "x", "-1x5", "2x5x6"):
        with pytest.raises(UsageError, match="is no batch"):
            parse_batch(wrong)


def test_what_cannot_be_is_refused(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="repeats"):
        TrainBench(tiny_config, repeats=0)
    with pytest.raises(UsageError, match="no peer"):
        TrainBench(tiny_config, baseline="litgpt")
    with pytest.raises(UsageError, match="precision"):
        TrainBench(tiny_config, precision="float8")
    with pytest.raises(ConfigError, match="seq_len"):
        TrainBench(tiny_config, batches=((1, 65),)).configurations()
    with pytest.raises(UsageError, match="context of 64"):
        GenerateBench(tiny_config, prompt=60, new=5)
    monkeypatch.setattr("resmol.bench.machine._version", lambda _package: None)
    with pytest.raises(DataError, match="needs transformers"):
        TrainBench(tiny_config, baseline="transformers")


def test_trainer_comes_to_our_loss(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    """The same weights, windows, order, targets and optimizer: a peer that does other work has another mean loss."""
    wanted = TrainBench(
        tiny_config.replace({"optimizer.embedding_lr_scale": 4.0}),
        ("data.document_mask=false", "optimizer.lr=0.01"),
        ((3, 16),),
        baseline="transformers",
        steps=4,
    )
    held = without_roofline(training_comparisons(wanted, tmp_path, str(tiny_dataset.root))[0])
    held.variants = held.variants[:2]  # the tuned one compiles, which takes a minute
    held.run(1, 0)
    ours, theirs = (one.measurements[0] for one in held.variants)
    assert ours["mean_loss"] == pytest.approx(theirs["mean_loss"], abs=2e-4)
    assert len(theirs["step_seconds"]) == len(ours["step_seconds"]) == 4
    assert "mean losses differ by" in held.markdown()


def test_generate_gives_equal_tokens(tiny_config: RunConfig, tmp_path: Path) -> None:
    held = without_roofline(generation_comparisons(GenerateBench(tiny_config, (2,), 8, 6, "transformers"), tmp_path)[0])
    held.variants = held.variants[:2]
    held.run(1, 0)
    assert "generated the same 12 of 12 tokens" in held.markdown()
    assert held.variants[1].measurements[0]["prefill_seconds"] > 0
    assert equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == (4, 6)


@pytest.mark.interop
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_llama_cpp_decodes_the_same_model(
    tiny_config: RunConfig, tokenizer_in_cache: Tokenizer, tmp_path: Path, precision: str
) -> None:
    """In float32 its tokens are ours: architecture, weights and prompt are the same."""
    pytest.importorskip("llama_cpp")
    bench = GenerateBench(tiny_config, (1,), 8, 6, "llama.cpp", precision=precision)
    held = without_roofline(generation_comparisons(bench, tmp_path)[0])
    held.run(1, 0)
    names = ["llama.cpp F32"] if precision == "float32" else ["llama.cpp F16", "llama.cpp Q8_0"]
    peers = [one for one in held.variants if one.kind == "other"]
    assert [one.name for one in peers] == names
    assert all(len(one.measurements[0]["tokens"][0]) == 6 for one in peers)
    assert precision == "bfloat16" or "llama.cpp F32 generated the same 6 of 6 tokens" in held.markdown()


@pytest.mark.parametrize(("batches", "overrides"), [((1, 2), {}), ((1,), {"runtime.device": "cuda"})])
def test_what_llama_cpp_does_not_decode_here_is_refused(
    tiny_config: RunConfig, batches: tuple[int, ...], overrides: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="decodes one text on a processor"):
        GenerateBench(tiny_config.replace(overrides), batches, 8, 6, "llama.cpp")


def test_prepare_counts_the_same_tokens(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "input.txt"
    text.write_text("the king and the kalo mi ner 17. \n" * 3000, encoding="utf-8")
    formats = ("jsonl", "jsonl.zst", "parquet-one-row-group")
    bench = PrepareBench(Text(inputs=(str(text),)), 200_000, formats)
    held = without_roofline(preparation_comparison(bench, tiny_tokenizer, tmp_path))
    held.run(1, 0)
    assert len({one.measurements[0]["tokens"] for one in held.variants}) == 1
    assert all(one.measurements[0]["megabytes_per_second"] > 0 for one in held.variants)
    assert all(one.measurements[0]["bytes_above_base"] > 0 for one in held.variants)


def test_the_same_documents_are_written_in_each_format(tmp_path: Path) -> None:
    documents = ['one, "two"\n three', "é 漢字", "x " * 3000]
    for name, (ending, write) in FORMATS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(documents, folder / f"text{ending}")
        found = ["".join(one.pieces) for one in read_inputs([folder]).read(ReadCounts())]
        whole = "".join(documents)
        assert found == {"txt": [whole], "txt-one-line": [whole.replace("\n", " ")]}.get(name, documents), name


@pytest.mark.parametrize(("text", "size"), [("1GB", 10**9), ("2.5MB", 2_500_000), ("10 kB", 10_000)])
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(UsageError, match="--size"):
        parse_size(f"{text}ytes")


def test_checkpoints_are_saved_and_loaded(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    held = without_roofline(checkpoint_comparison(CheckpointBench(tiny_config), tmp_path, str(tiny_dataset.root)))
    held.run(1, 0)
    for one in held.variants:
        assert not one.failure
        assert one.measurements[0]["load_seconds"] > 0
    assert not (tmp_path / "baseline").exists()


def test_the_stall_of_a_save_in_the_background_is_shorter_than_the_save() -> None:
    record: Any = {"kind": "save", "step": 1, "seconds": 3.0, "bytes": 5, "stall_seconds": 0.5}
    assert first_save([record])["save_seconds"] == 3.0
    assert first_save([record])["stall_seconds"] == 0.5
    with pytest.raises(CheckFailed, match="saved nothing"):
        first_save([])


def test_a_trace_is_written(tiny_config: RunConfig, tiny_dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    table = trace_training(tiny_config, str(tiny_dataset.root), file, steps=1, warmup=1)
    assert "aten::mm" in table
    names = {event.get("name") for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"]}
    assert "aten::mm" in names


def test_the_roofline_of_training_is_measured(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS_PER_MATMUL", 0.0)
    monkeypatch.setattr(roofline, "bandwidth", lambda: {"read_bytes_per_second": 1e9, "update_bytes_per_second": 1e9})
    task = {"of": "training", "model": tiny_config.model.model_dump(), "rows": 2, "seq_len": 16}
    found = roofline.measure_roofline({**task, "precision": "float32", "threads": 0, "device": "cpu"})
    assert found["tokens_per_second"] > found["with_update"] > 0
