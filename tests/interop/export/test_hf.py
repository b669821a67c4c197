"""An export is what was trained: read back by transformers, refused when anything differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import TrainTiny
from tokenizers import Tokenizer as Rust
from transformers import AutoModelForCausalLM, AutoTokenizer

from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, UsageError
from resmol.interop.export import export_hf, hf
from resmol.interop.export.exported_tokenizer import ExportedTokenizer, exported_tokenizer
from resmol.interop.export.parity import HARD_TEXTS, ReadBack, compare_with_transformers, logits_check
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.resolve import Source
from resmol.interop.special_tokens import SpecialTokens
from resmol.model.llama import CausalLM
from resmol.model.shapes import tensor_shapes


@pytest.fixture
def run(tmp_path: Path, train_tiny: TrainTiny) -> Path:
    train_tiny(tmp_path / "run", 20)
    return tmp_path / "run"


def test_the_export_of_a_run_is_its_checkpoint(run: Path, tmp_path: Path) -> None:
    export = export_hf(run, tmp_path / "out")
    assert all_passed(export.checks)
    saved = load_file(run / "checkpoints" / "step-00000020" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    assert (tmp_path / "out" / "training" / "ledger.jsonl").read_bytes() == (run / "ledger.jsonl").read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "A Llama of 20,088 parameters, trained from scratch" in card.text
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert f"{[r for r in ledger if r['kind'] == 'step'][-1]['tokens_seen']:,} tokens" in card.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_says_what_we_say(run: Path, tmp_path: Path, dtype: Any) -> None:
    export_hf(run, tmp_path / "out", dtype=dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {hf.DTYPES[dtype]}
    ids = torch.arange(40)[None] * 11 % 512
    ours = hf.rounded(load_model(run).model, dtype)
    torch.testing.assert_close(theirs.float()(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_keys_are_those_of_the_architecture(tmp_path: Path, train_tiny: TrainTiny, tied: bool) -> None:
    train_tiny(tmp_path / "run", 2, f"model.tie_word_embeddings={str(tied).lower()}")
    export_hf(tmp_path / "run", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert {n: tuple(t.shape) for n, t in tensors.items()} == tensor_shapes(load_model(tmp_path / "run").config)


def test_the_genuine_tokenizer_through_autotokenizer(
    genuine_tokenizer: Tokenizer, tmp_path: Path, shared_dir: Path
) -> None:
    """The ids of the genuine file, digits included, on the hard cases and on all text at hand."""
    (tmp_path / "tokenizer.json").write_bytes(genuine_tokenizer.data)
    exported = ExportedTokenizer(genuine_tokenizer, SpecialTokens({"eos_token": 0, "pad_token": 16}, (0,)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(exported.config(8192)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    theirs, rust = AutoTokenizer.from_pretrained(tmp_path), Rust.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs("a  1")["input_ids"] == [81, 256, 33]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in (shared_dir / "data").rglob("*") if p.is_file()]
    assert texts
    for text in (*HARD_TEXTS, *(text[start : start + 20_000] for text in texts for start in range(0, 200_000, 20_000))):
        assert theirs(text)["input_ids"] == rust.encode(text).ids == genuine_tokenizer.encode(text)
    assert theirs.decode([81, 256, 33]) == "a  1"


def test_a_class_that_drops_the_digits_step_is_noticed(
    genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SmolLM2's own tokenizer_config.json names; transformers 5 makes [81, 216, 216, 33] of "a  1" with it."""
    config = tiny_config.model.model_copy(update={"vocab_size": 49_152})
    model = CausalLM.empty(config)
    model.init_weights(0)
    loaded = LoadedModel(model.eval(), Source("huggingface", tmp_path, config), lambda: genuine_tokenizer)
    exported, genuine = exported_tokenizer(loaded), ExportedTokenizer.config
    for number, table in enumerate([{}, {"tokenizer_class": "GPT2Tokenizer"}]):
        monkeypatch.setattr(ExportedTokenizer, "config", lambda *a, _table=table: genuine(*a) | _table)
        (tmp_path / str(number)).mkdir()
        hf.write_folder(loaded, exported, tmp_path / str(number), "float32")
    healthy, mutant = (compare_with_transformers(model, exported, tmp_path / name) for name in "01")
    assert all_passed(healthy)
    failed = {check.name: check.measured for check in mutant if not check.passed}
    assert {"token ids", "tokenizer(text)"} <= failed.keys()
    assert "'a  1'" in failed["token ids"]


def _cloned_head(patch: pytest.MonkeyPatch) -> None:
    genuine = hf.write_folder

    def write(loaded: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        genuine(loaded, tokenizer, folder, *rest)
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))

    patch.setattr(hf, "write_folder", write)


def _other_theta(patch: pytest.MonkeyPatch) -> None:
    genuine = hf.write_folder

    def write(loaded: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        genuine(loaded, tokenizer, folder, *rest)
        table = json.loads((folder / "config.json").read_text())
        table |= {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
        (folder / "config.json").write_text(json.dumps(table))

    patch.setattr(hf, "write_folder", write)


def _rounded_weights(patch: pytest.MonkeyPatch) -> None:
    genuine = hf.weight_tensors
    patch.setattr(hf, "weight_tensors", lambda model: {n: t.half() for n, t in genuine(model).items()})


@pytest.mark.parametrize(
    ("put_in", "named"),
    [
        (_cloned_head, "logits"),
        (_other_theta, "logits"),
        (_rounded_weights, "logits"),
    ],
)
def test_what_differs_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_in: Any, named: str
) -> None:
    put_in(monkeypatch)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckFailed, match=named):
        export_hf(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        export_hf(run, tmp_path / "out")


@pytest.mark.parametrize("row", [0, 1])
def test_a_logit_that_is_no_number_is_a_difference(tiny_config: RunConfig, row: int) -> None:
    """Also in the second comparison: max() of a number and NaN is the number."""
    model = CausalLM.empty(tiny_config.model)
    model.init_weights(0)
    inputs = [[1, 2, 3], [4, 5]]
    theirs = [model(torch.tensor([ids]))[0].detach() for ids in inputs]
    assert logits_check("logits", model, inputs, ReadBack(theirs, [], [])).passed
    theirs[row][1, 7] = torch.nan
    assert not logits_check("logits", model, inputs, ReadBack(theirs, [], [])).passed
