"""The evaluation harness of others runs on an export, and its log-probabilities are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TrainTiny

from resmol.interop.export import export_hf
from resmol.interop.load import LoadedModel, load_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.interop

QUESTIONS = [
    {"text": "ka lo mi", "choices": ["ner", "ta 12", "the an"], "label": 1},
    {"text": "ver ing", "choices": ["lo", "shu", "é ß"], "label": 0},
    {"text": "the 7  8", "choices": ["an", "ka ka", "9"], "label": 2},
    {"text": "mi\nta", "choices": ["ver", "ner lo", "the"], "label": 0},
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A multiple-choice task of our own, as lm-eval describes tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS), encoding="utf-8")
    description = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "data.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "made_up.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
    return folder


def harness(model: Path, task: Path, scratch: Path) -> tuple[float, list[list[float]]]:
    """Run ``lm-eval`` as docs/benchmarks.md says; return its accuracy and the log-probability of each choice."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--tasks", "made_up", "--include_path", str(task), "--device", "cpu", "--batch_size", "1",
        "--log_samples", "--output_path", str(scratch / "results"),
    ]  # fmt: skip
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = os.environ | offline | {"HF_HOME": str(scratch / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (scratch / "results").rglob("results_*.json")
    (samples,) = (scratch / "results").rglob("samples_made_up_*.jsonl")
    accuracy = json.loads(results.read_text(encoding="utf-8"))["results"]["made_up"]["acc,none"]
    lines = sorted((json.loads(line) for line in samples.read_text("utf-8").splitlines()), key=lambda s: s["doc_id"])
    return accuracy, [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]


@torch.no_grad()
def log_probability(loaded: LoadedModel, text: str, continuation: str) -> float:
    """Sum of log p(token | all before) over the tokens of the continuation."""
    whole, given = loaded.tokenizer.encode(text + continuation), len(loaded.tokenizer.encode(text))
    scores = loaded.model(torch.tensor([whole]))[0].log_softmax(-1)
    return float(sum(scores[place - 1, whole[place]] for place in range(given, len(whole))))


def test_lm_eval_finds_our_log_probabilities(tmp_path: Path, train_tiny: TrainTiny, task: Path) -> None:
    train_tiny(tmp_path / "run", 20)
    export_hf(tmp_path / "run", tmp_path / "out")
    accuracy, theirs = harness(tmp_path / "out", task, tmp_path)
    loaded = load_model(tmp_path / "run")
    ours = [[log_probability(loaded, q["text"], f" {choice}") for choice in q["choices"]] for q in QUESTIONS]
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, abs=1e-3)
    right = [max(range(3), key=row.__getitem__) == q["label"] for row, q in zip(ours, QUESTIONS, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(right))
