"""Which tokenizer a model gets when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf
from tokenizers import Tokenizer as RustTokenizer

from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError
from resmol.interop import model_tokenizer
from resmol.interop.load import load_model


def test_without_a_tokenizer_of_its_own_a_model_of_another_size_does_not_get_smollm2s(tmp_path: Path) -> None:
    """Llama's 128,256 tokens were read with SmolLM2's 49,152: fluent nonsense, and no word about it."""
    reference(vocab_size=50_000).save_pretrained(tmp_path / "hf")
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    for source in (tmp_path / "hf", path):
        loaded = load_model(source)
        with pytest.raises(DataError, match=r"holds no tokenizer\.json, and SmolLM2's is another") as caught:
            _ = loaded.tokenizer
        assert "put the model's tokenizer.json beside the weights" in caught.value.fix


def test_without_a_tokenizer_of_its_own_a_model_of_smollm2s_size_gets_it(
    tmp_path: Path, genuine_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file only if the tokens in its header are the same."""
    monkeypatch.setattr(model_tokenizer, "load_tokenizer", lambda **_: genuine_tokenizer)
    reference(vocab_size=49_152).save_pretrained(tmp_path / "hf")
    assert load_model(tmp_path / "hf").tokenizer is genuine_tokenizer
    vocabulary = RustTokenizer.from_str(genuine_tokenizer.data.decode())
    tokens = [vocabulary.id_to_token(index) for index in range(49_152)]
    config = GGUF_CONFIG.model_copy(update={"vocab_size": 49_152, "hidden_size": 12})
    weights = hf_weights(config)
    key = "tokenizer.ggml.tokens"
    assert load_model(write_gguf(tmp_path / "a.gguf", config, weights, **{key: tokens})).tokenizer is genuine_tokenizer
    assert load_model(write_gguf(tmp_path / "b.gguf", config, weights)).tokenizer is genuine_tokenizer
    tokens[17], tokens[18] = tokens[18], tokens[17]
    other = load_model(write_gguf(tmp_path / "c.gguf", config, weights, **{key: tokens}))
    with pytest.raises(DataError, match="tokens are not those of SmolLM2"):
        _ = other.tokenizer
