"""llama.cpp, an implementation that shares no line with ours, gets out of a GGUF export what we put in."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from test_gguf import described
from tiny import TrainTiny
from transformers import AutoModelForCausalLM

from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed
from resmol.interop.description import Description
from resmol.interop.export import export_gguf, gguf_writer, verify_export
from resmol.interop.export import gguf as gguf_export
from resmol.interop.export.gguf_parity import LLAMA_CPP, compare_gguf
from resmol.interop.export.gguf_writer import write_gguf
from resmol.interop.export.parity import HARD_TEXTS, TRANSFORMERS
from resmol.interop.load import load_model
from resmol.model.llama import CausalLM

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.interop

GENUINE = {"vocab_size": 49_152, "hidden_size": 96}


def opened(file: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, **options)


@pytest.fixture
def run(tmp_path: Path, train_tiny: TrainTiny) -> Path:
    train_tiny(tmp_path / "run", 10, "model.hidden_size=96")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def genuine_file(
    genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small model with SmolLM2's whole vocabulary."""
    model = CausalLM.empty(tiny_config.model.model_copy(update=GENUINE))
    model.init_weights(0)
    path = tmp_path_factory.mktemp("gguf") / "genuine.gguf"
    write_gguf(path, model.requires_grad_(False), described(genuine_tokenizer), "float32", Description("genuine"))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_logits_are_ours_within_the_error_of_the_type(run: Path, tmp_path: Path, dtype: str) -> None:
    export = export_gguf(run, tmp_path / "out", dtype=dtype)
    assert all_passed(export.checks)
    manifest = verify_export(tmp_path / "out")
    assert manifest.facts["readers"] == ["transformers", "llama.cpp"]
    names = {check.name for check in manifest.checks}
    assert {"logits, llama.cpp", "token ids, llama.cpp", "logits, transformers"} <= names
    assert ("greedy tokens, llama.cpp" in names) is (dtype == "float32")


def test_greedy_text_is_equal_in_resmol_transformers_and_llama_cpp(run: Path, tmp_path: Path) -> None:
    export_gguf(run, tmp_path / "out")
    file = tmp_path / "out" / "run-F32.gguf"
    ours = load_model(run)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file.name)
    llama = opened(file, type_k=0, type_v=0)
    for prompt in ("ka lo mi", "ver 12  34", "the"):
        text = ours.generate(prompt, max_new_tokens=24, temperature=0.0)
        ids = ours.tokenizer.encode(prompt)
        continued = theirs.generate(
            theirs.dummy_inputs["input_ids"].new_tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        assert ours.tokenizer.decode(continued, skip_special_tokens=True) == text
        llama.reset()
        tokens = list(islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), 24))
        spoken = llama.detokenize(tokens[: tokens.index(0)] if 0 in tokens else tokens)
        assert spoken.decode(errors="replace") == text  # a small vocabulary may end inside of a character


def test_the_genuine_vocabulary_gives_the_genuine_ids(genuine_file: Path, genuine_tokenizer: Tokenizer) -> None:
    llama = opened(genuine_file)
    assert llama.tokenize(b"a  1", special=True) == [81, 256, 33]  # and no token in front
    assert (llama.token_bos(), llama.token_eos()) == (0, 0)
    for text in HARD_TEXTS:
        assert llama.tokenize(text.encode(), special=True) == genuine_tokenizer.encode(text), text
    special = "<|endoftext|>"
    assert llama.tokenize(special.encode(), special=False) != [0]  # text that merely looks like one


def test_the_genuine_ids_on_hard_cases_and_real_text(
    genuine_file: Path, genuine_tokenizer: Tokenizer, shared_dir: Path
) -> None:
    llama = opened(genuine_file)
    data = shared_dir / "data"
    texts = json.loads((data / "unicode" / "hard_cases.json").read_text(encoding="utf-8"))
    for path in sorted(item for item in data.rglob("*") if item.is_file()):
        content = path.read_text(encoding="utf-8", errors="replace")
        texts += [content[start : start + 4000] for start in range(0, 80_000, 20_000)]
    assert len(texts) > 50
    wrong = [text for text in texts if llama.tokenize(text.encode(), special=True) != genuine_tokenizer.encode(text)]
    assert [text[:80] for text in wrong] == []


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize("fault", ["permutation", "theta", "bos"])
def test_faults_that_llama_cpp_notices(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: str
) -> None:
    """Also behind the wider tolerance of a quantised type, and with nobody else looking."""
    monkeypatch.setattr(gguf_export, "gguf_readers", lambda: [LLAMA_CPP])
    metadata = gguf_writer.gguf_metadata
    named = "logits, llama.cpp"
    if fault == "permutation":
        monkeypatch.setattr(gguf_writer, "permuted", lambda values, heads: values)
    elif fault == "theta":
        changed = {"llama.rope.freq_base": 10_000.0}
        monkeypatch.setattr(gguf_writer, "gguf_metadata", lambda config: metadata(config) | changed)
    else:
        named, genuine = "token ids, llama.cpp", gguf_writer.GGUFWriter.add_add_bos_token
        monkeypatch.setattr(gguf_writer.GGUFWriter, "add_add_bos_token", lambda self, _value: genuine(self, True))
    with pytest.raises(CheckFailed, match=named):
        export_gguf(run, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_another_rule_for_digits_is_noticed(
    genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = gguf_writer.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf_writer.GGUFWriter, "add_tokenizer_pre", lambda self, _name: genuine(self, "gpt-2"))
    model = CausalLM.empty(tiny_config.model.model_copy(update=GENUINE))
    model.init_weights(0)
    file = tmp_path / "x.gguf"
    tokenizer = described(genuine_tokenizer)
    write_gguf(file, model.requires_grad_(False), tokenizer, "float32", Description("x"))
    checks = compare_gguf(model, tokenizer, file, "float32", [LLAMA_CPP])
    assert [check.name for check in checks if not check.passed] == ["token ids, llama.cpp"]


def test_the_comparison_with_transformers_alone_is_another_one(run: Path, tmp_path: Path) -> None:
    loaded = load_model(run)
    file = tmp_path / "x.gguf"
    tokenizer = described(loaded.tokenizer)
    write_gguf(file, loaded.model, tokenizer, "float32", Description("x"))
    both = compare_gguf(loaded.model, tokenizer, file, "float32", [TRANSFORMERS, LLAMA_CPP])
    alone = compare_gguf(loaded.model, tokenizer, file, "float32", [TRANSFORMERS])
    assert {check.name for check in both} - {check.name for check in alone} == {
        "logits, llama.cpp", "token ids, llama.cpp", "greedy tokens, llama.cpp",
    }  # fmt: skip
