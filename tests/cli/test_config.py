"""`resmol config` prints what a run would be made with, and lists what there is to choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny

from resmol.__main__ import run
from resmol.config.load import load_config, load_preset, preset_names
from resmol.config.run_config import RunConfig, drift_classes
from resmol.model.flops import total_parameters
from resmol.run.directory import RunDir


def printed(capsys: Any, *arguments: str) -> str:
    assert run(["config", *arguments], debug=True) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("preset", preset_names())
def test_what_it_prints_is_a_file_for_config(preset: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "own.toml"
    file.write_text(printed(capsys, "--preset", preset, "--lr", "1e-4", "--set", "name=own"), encoding="utf-8")
    assert load_config(file) == load_preset(preset, ["optimizer.lr=1e-4", "name=own"])
    assert printed(capsys, "--config", str(file)) == file.read_text(encoding="utf-8")


def test_a_run_s_own(tmp_path: Path, train_tiny: TrainTiny, capsys: Any) -> None:
    train_tiny(tmp_path / "run", 2)
    stored = RunDir(tmp_path / "run").load_config()
    assert RunConfig.parse(json.loads(printed(capsys, str(tmp_path / "run"), "--json")), "printed") == stored
    assert "lr = 0.5\n" in printed(capsys, str(tmp_path / "run"), "--set", "optimizer.lr=0.5")


@pytest.mark.parametrize("arguments", [[], ["r", "--preset", "nano"], ["--fields", "no such word"]])
def test_what_it_cannot_print(arguments: list[str], capsys: Any) -> None:
    assert run(["config", *arguments], debug=False) == 2
    assert capsys.readouterr().out == ""


def test_the_fields(capsys: Any) -> None:
    found = json.loads(printed(capsys, "--fields", "--json"))["fields"]
    assert {field["key"]: field["drift"] for field in found} == drift_classes()
    section = json.loads(printed(capsys, "--fields", "optimizer", "--json"))["fields"]
    assert {field["key"].partition(".")[0] for field in section} == {"optimizer"}
    by_word = json.loads(printed(capsys, "--fields", "Gradient norm", "--json"))["fields"]
    assert [field["key"] for field in by_word] == ["optimizer.clip_norm"]
    table = printed(capsys, "--fields", "precision")
    assert all(word in table for word in ("runtime.precision", '"auto"', "B", "bfloat16, float16)"))


def test_the_presets(capsys: Any) -> None:
    found = {row["name"]: row for row in json.loads(printed(capsys, "--presets", "--json"))["presets"]}
    assert sorted(found) == preset_names()
    for name, row in found.items():
        assert row["parameters"] == total_parameters(load_preset(name).model)
        assert row["tokens_per_step"] == load_preset(name).batch.global_batch_tokens
        assert row["summary"]
        assert not row["summary"].startswith("#")
    table = printed(capsys, "--presets")
    assert all(word in table for word in ("134,515,008", "smollm2-360m", "two CPU cores"))
