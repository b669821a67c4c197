"""Short options set the fields that the table says, and nothing else; contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny

from resmol.__main__ import run
from resmol.bench.ablate import Ablation
from resmol.cli import app
from resmol.cli.field_options import COMPUTED, FIELD_OPTIONS
from resmol.cli.fixes import options_of_commands
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig, flatten
from resmol.data.loader import Loader
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError, UsageError
from resmol.run.directory import RunDir
from resmol.train.start import train_model

PRESET = "smollm2-135m"
VALUES = {  # another value than the preset's for every option -> what changes
    "--lr": ("1e-4", {"optimizer.lr": 1e-4}),
    "--batch-size": ("16", {"batch.global_batch_tokens": 16 * 2048}),
    "--micro-batch-size": ("4", {"batch.micro_batch_size": 4}),
    "--seq-len": ("1024", {"data.seq_len": 1024}),
    "--warmup-steps": ("7", {"schedule.warmup_steps": 7}),
    "--weight-decay": ("0.5", {"optimizer.weight_decay": 0.5}),
    "--seed": ("3", {"train.seed": 3, "data.seed": 3}),
    "--device": ("cpu", {"runtime.device": "cpu"}),
    "--precision": ("bfloat16", {"runtime.precision": "bfloat16"}),
    "--compile": ("off", {"runtime.compile": "off"}),
    "--threads": ("2", {"runtime.threads": 2}),
    "--save-every": ("9", {"checkpoint.every": 9}),
    "--eval-every": ("9", {"evaluation.every": 9}),
    "--log-every": ("9", {"logging.every": 9}),
}


def resolved(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert run(["config", *arguments, "--json"], debug=True) == 0
    return flatten(RunConfig.parse(json.loads(capsys.readouterr().out), "printed"))


def refused(capsys: Any, *arguments: str) -> str:
    assert run(list(arguments), debug=False) == 2
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("option", FIELD_OPTIONS)
def test_an_option_sets_its_field_and_no_other(option: str, capsys: Any) -> None:
    value, changes = VALUES[option]
    before = flatten(load_preset(PRESET))
    found = resolved(capsys, "--preset", PRESET, option, value)
    assert {key: new for key, new in found.items() if new != before[key]} == changes


def test_they_are_options_of_the_commands_that_compute_with_a_configuration() -> None:
    commands = options_of_commands(app)
    for command, names in (("train", FIELD_OPTIONS), ("reproduce", FIELD_OPTIONS), ("ablate", COMPUTED)):
        assert set(names) <= commands[command]
    assert "--warmup" in commands["train"]


def test_a_batch_size_chooses_a_micro_batch_that_divides_it(capsys: Any) -> None:
    for windows, micro in ((8, 8), (6, 6), (20, 5), (7, 7), (11, 1), (64, 8)):
        found = resolved(capsys, "--preset", "smollm2-135m", "--batch-size", str(windows))
        assert (found["batch.global_batch_tokens"], found["batch.micro_batch_size"]) == (windows * 2048, micro)
    both = ("--batch-size", "6", "--seq-len", "256")
    found = resolved(capsys, "--preset", "nano", *both, "--micro-batch-size", "3")
    assert (found["batch.global_batch_tokens"], found["batch.micro_batch_size"]) == (6 * 256, 3)
    text = refused(capsys, "config", "--preset", "nano", *both, "--micro-batch-size", "4")
    assert "batch.windows_per_step (6) is not a multiple of batch.micro_batch_size (4)" in text


@pytest.mark.parametrize("windows", ["0", "-1", "1.5", "two", "true"])
def test_a_batch_size_is_a_whole_number(windows: str, capsys: Any) -> None:
    assert "give a whole number" in refused(capsys, "config", "--preset", "nano", "--batch-size", windows)


def test_a_length_that_does_not_fit_names_the_batch_that_does(capsys: Any) -> None:
    text = refused(capsys, "config", "--preset", "nano", "--seq-len", "256")
    assert "--set batch.windows_per_step=1 makes them fit" in text
    assert resolved(capsys, "--preset", "nano", "--seq-len", "256", "--set", "batch.windows_per_step=1")


@pytest.mark.parametrize(
    ("given", "contradiction"),
    [
        (["--lr", "1e-3", "--set", "optimizer.lr=2e-3"], True),
        (["--lr", "1e-3", "--set", " optimizer.lr = 0.001"], False),
        (["--seed", "1", "--set", "data.seed=2"], True),
        (["--batch-size", "4", "--set", "batch.global_batch_tokens=256"], True),
        (["--batch-size", "4", "--set", "optimizer.lr=1"], False),
    ],
)
def test_set_may_repeat_an_option_and_not_contradict_it(given: list[str], contradiction: bool, capsys: Any) -> None:
    command = ["config", "--preset", "nano", *given]
    if contradiction:
        assert "contradict each other" in refused(capsys, *command)
    else:
        assert run(command, debug=True) == 0


def test_a_run_keeps_them_and_a_changed_one_is_a_drift(
    tmp_path: Path, tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer, capsys: Any
) -> None:
    (tmp_path / "tiny.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
    start = ["--config", str(tmp_path / "tiny.toml"), "--tokenizer", str(tiny_tokenizer.path)]
    command = ["train", str(tmp_path / "run"), "--data", str(tiny_dataset.root), *start, "--lr", "0.02"]
    assert run([*command, "--batch-size", "6", "--steps", "2"], debug=True) == 0
    stored = RunDir(tmp_path / "run").load_config()
    assert (stored.optimizer.lr, stored.batch.global_batch_tokens, stored.batch.micro_batch_size) == (0.02, 96, 2)
    assert run([*command, "--batch-size", "6", "--steps", "3"], debug=True) == 0
    assert "optimizer.lr" in refused(capsys, "train", str(tmp_path / "run"), "--lr", "0.03", "--steps", "4")


def test_epochs_are_passes_over_the_training_part(
    tmp_path: Path, train_tiny: TrainTiny, tiny_config: RunConfig, short_dataset: Dataset, messages: list[str]
) -> None:
    train_tiny(tmp_path / "run", 1, data=str(short_dataset.root), config=tiny_config)
    loader = Loader(short_dataset.train, seq_len=16, micro_batch_size=2, grad_accum_steps=2, seed=0, eos_id=0)
    done = train_model(None, tmp_path / "run", epochs=1.5)
    assert done.step == -(-3 * loader.n_windows // 8)  # ceil(1.5 epochs / 4 windows a step)
    assert (done.step - 1) * 4 < 1.5 * loader.n_windows <= done.windows_seen
    assert any(line.startswith(f"epochs: 1.5 of {loader.n_windows} windows") for line in messages)


@pytest.mark.parametrize("given", [["--epochs", "0"], ["--epochs", "nan"], ["--epochs", "1", "--steps", "3"]])
def test_epochs_that_are_no_length(given: list[str], tmp_path: Path, capsys: Any) -> None:
    assert "--epochs" in refused(capsys, "train", str(tmp_path / "run"), "--preset", "nano", *given)
    assert not (tmp_path / "run").exists()


def test_epochs_of_several_processes_need_prepared_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "input.txt").write_text("ka lo", encoding="utf-8")
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    command = ["train", str(tmp_path / "run"), "--preset", "nano", "--data", str(tmp_path / "input.txt")]
    assert "resmol prepare" in refused(capsys, *command, "--epochs", "1")


def test_one_value_of_an_ablation_is_no_factor() -> None:
    ablation = Ablation(load_preset("nano"), ("data.seq_len=32", "optimizer.lr=1e-3,3e-3"))
    assert ablation.base().data.seq_len == 32
    assert ablation.overrides() == [("optimizer.lr=1e-3",), ("optimizer.lr=3e-3",)]
    alone = Ablation(load_preset("nano"), ("runtime.attention=eager",))
    assert alone.overrides()[0] == ()
    with pytest.raises((ConfigError, UsageError)):
        Ablation(load_preset("nano"), ("optimizer.lr",)).overrides()
