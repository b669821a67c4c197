"""From text to a tokenizer, and from there through every command, by its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import synthetic_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from resmol.__main__ import run
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*words, "--json"], debug=True) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_tokenizer_of_ones_own_goes_through_every_command(
    tmp_path: Path, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"tokenizer.sha256": load_preset("nano").tokenizer.sha256, "model.vocab_size": 49_152}
    Path("tiny.toml").write_text(tiny_config.replace(settings).to_toml(), encoding="utf-8")
    Path("in.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in synthetic_texts(200)))
    text = ["--input", "in.jsonl", "--text-field", "t"]
    made = printed(capsys, "tokenizer", "train", "tok", *text, "--vocab-size", "300")
    assert made["vocab_size"] == 300
    prepared = printed(capsys, "prepare", "data", *text, "--tokenizer", "tok")
    assert prepared["tokenizer"] == {"sha256": made["sha256"], "vocab_size": 300, "eos_id": 0}
    assert run(["prepare", "data", "--stats"], debug=True) == 0
    assert "characters a token" in capsys.readouterr().out
    arguments = ["--config", "tiny.toml", "--data", "data", "--tokenizer", "tok"]
    assert printed(capsys, "train", "run", *arguments, "--steps", "2")["step"] == 2
    assert printed(capsys, "train", "run", *arguments, "--steps", "3")["step"] == 3
    assert printed(capsys, "evaluate", "run")["bits_per_byte"] > 0
    assert printed(capsys, "generate", "run", "--prompt", "ka", "--max-new-tokens", "4")
    assert run(["export", "run", "out"], debug=True) == 0
    theirs, sample = AutoTokenizer.from_pretrained("out"), "kalomi  12 é"
    assert theirs(sample)["input_ids"] == AutoTokenizer.from_pretrained("tok")(sample)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained("out")
    assert (model.config.vocab_size, model.config.eos_token_id) == (320, 0)
    assert printed(capsys, "evaluate", "out", "--data", "data")["tokens"] > 0


def test_its_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    words = ["tokenizer", "train", str(tmp_path / "tok"), "--input", str(tmp_path / "a.txt")]
    assert run([*words, "--vocab-size", "5000"], debug=False) == 3
    assert "fix: give --vocab-size 259 or less, or more text" in capsys.readouterr().err
    assert run(words, debug=False) == 2
    assert "--vocab-size" in capsys.readouterr().err
    assert run([*words[:3], "--vocab-size", "300"], debug=False) == 2
    assert "give either --input or --corpus" in capsys.readouterr().err
