"""config.json: both spellings of theta, refusals by name, and a round trip through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.config.hf_fields import MUST_BE, WITHOUT_INFLUENCE
from resmol.config.load import load_preset, preset_names
from resmol.config.model_config import ModelConfig, end_token_ids, parse_hf_config, read_model_config
from resmol.errors import ConfigError, DataError, NetworkError

# The shape of a published config.json, at a size of our own.
GENUINE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.1,
    "intermediate_size": 256,
    "is_llama_config": True,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 512,
}
MISSING = object()


def table(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (GENUINE | changes).items() if value is not MISSING}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_hf_config(table(**changes))
    return caught.value.what


# --- what is read -------------------------------------------------------------------------------------------


def test_the_fields_are_taken_as_they_are() -> None:
    config = parse_hf_config(GENUINE)
    assert {name: GENUINE[name] for name in ModelConfig.model_fields} == config.model_dump()
    assert config.head_dim == 16


def test_the_genuine_file_is_the_preset(shared_dir: Path) -> None:
    assert read_model_config(shared_dir / "reference" / "config.json") == load_preset("smollm2-135m").model


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e5},
        {"rope_theta": MISSING, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}},
        {"rope_theta": MISSING, "rope_parameters": {"rope_theta": 100000}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 100000}},
        {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": None},
    ],
)
def test_theta_is_found_in_both_spellings(changes: dict[str, Any]) -> None:
    assert parse_hf_config(table(**changes)).rope_theta == 100000.0


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_token_id_0_is_an_id(name: str) -> None:
    """The mistake this guards against: ``config.eos_token_id or default``."""
    assert getattr(parse_hf_config(table(**{name: 0})), name) == 0


def test_a_missing_end_is_not_guessed() -> None:
    assert "eos_token_id: Field required" in refusal(eos_token_id=MISSING)
    assert "eos_token_id: Field required" in refusal(eos_token_id=MISSING, bos_token_id=MISSING)


@pytest.mark.parametrize(
    ("value", "first", "ends"),
    [(3, 3, (3,)), ([3], 3, (3,)), ([3, 5], 3, (3, 5)), ([700, 5], 5, (700, 5)), (None, 0, ()), (0, 0, (0,))],
)
def test_a_text_may_have_several_ends_or_none(value: Any, first: int, ends: tuple[int, ...]) -> None:
    assert parse_hf_config(table(eos_token_id=value)).eos_token_id == first
    assert end_token_ids(table(eos_token_id=value)) == ends


@pytest.mark.parametrize("value", [MISSING, None])
def test_what_may_be_missing_has_the_librarys_value(value: Any) -> None:
    """Against transformers: the first Llama's file has no key/value heads, others no tying and no initializer."""
    names = ("num_key_value_heads", "tie_word_embeddings", "initializer_range", "hidden_act")
    for name in names:
        read = parse_hf_config(table(**{name: value}))
        theirs = LlamaConfig(**{key: item for key, item in GENUINE.items() if key != name})
        assert getattr(read, name) == getattr(theirs, name), name
    assert parse_hf_config(table(bos_token_id=value, eos_token_id=7)).bos_token_id == 7


# --- what cannot change a number ------------------------------------------------------------------------------

NEUTRAL: list[dict[str, Any]] = [
    {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    {"transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True, "unsloth_version": "2024.11.9"},
    {"_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "attn_implementation": None},
    {"return_dict": True, "tokenizer_class": "GPT2Tokenizer", "id2label": {"0": "a"}, "problem_type": None},
    {"pretraining_tp": 2},
    {"hidden_act": "swish"},
    {"rope_scaling": {}},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default", "factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 1}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 128}},
    {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default", "type": "default"}},
    {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {"rope_theta": 100000, "rope_type": "default"}},
    {"rope_scaling": {"type": "default"}, "original_max_position_embeddings": 64},
    {"gradient_checkpointing": True, "base_model_name_or_path": "x/y", "pad_token": "[PAD]", "num_local_experts": 0},
    {"layer_types": ["full_attention", "full_attention"]},
    {"sliding_window": None, "quantization_config": None, "attention_bias": None, "rope_interleaved": None},
    {"partial_rotary_factor": 1.0, "use_sliding_window": False, "pruned_heads": {}, "is_encoder_decoder": False},
    {"temperature": 0.7, "max_length": 20, "bad_words_ids": None, "num_beams": 1, "repetition_penalty": 1.2},
]  # fmt: skip


@pytest.mark.parametrize("changes", NEUTRAL, ids=lambda changes: "-".join(changes))
def test_what_leaves_the_numbers_alone_is_accepted(changes: dict[str, Any]) -> None:
    assert parse_hf_config(table(**changes)) == parse_hf_config(GENUINE)


@pytest.mark.parametrize("changes", [c for c in NEUTRAL if {*c} & {"rope_scaling", "rope_parameters"}])
def test_neutral_scaling_turns_as_none_does_in_transformers(changes: dict[str, Any]) -> None:
    def cosines(**more: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**table(**more) | {"num_hidden_layers": 1}))
        found: torch.Tensor = model.model.rotary_emb(torch.zeros(1), torch.arange(128)[None])[0]
        return found

    torch.testing.assert_close(cosines(**changes), cosines(), atol=1e-5, rtol=0)


def test_everything_that_the_library_writes_for_any_model_is_known() -> None:
    """The attributes of PretrainedConfig in the installed version; those that name an architecture must be neutral."""
    attributes = {*LlamaConfig().to_dict(), *LlamaConfig(num_labels=3, id2label={0: "a"}).to_dict()}
    architecture = {*ModelConfig.model_fields, "head_dim", "rope_parameters"}
    assert attributes - architecture <= {*WITHOUT_INFLUENCE, *MUST_BE}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": MISSING}, "rope_theta is missing"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": MISSING, "rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        (
            {"rope_parameters": {"rope_theta": 10000.0}},
            "(100000) and rope_parameters.rope_theta (10000.0) disagree",
        ),
        ({"rope_theta": True}, "rope_theta is True, not a number"),
        ({"rope_theta": "100000"}, "rope_theta is 100000, not a number"),
        ({"rope_theta": [100000]}, "not a number"),
        ({"rope_theta": {}}, "not a number"),
        ({"rope_theta": [1], "rope_parameters": {"rope_theta": [2]}}, "disagree"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "not a number"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1e5}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], not a table"),
        ({"rope_scaling": {"rope_theta": 10000.0}}, "and rope_scaling.rope_theta (10000.0) disagree"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "only rotation without scaling"),
        ({"rope_parameters": {"factor": 4.0}}, "only rotation without scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only rotation without scaling"),
        ({"rope_scaling": {"type": "linear"}}, "only rotation without scaling"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 1.0}}, "only rotation without scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 1.0}}, "only rotation without scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.2}}, "only rotation without scaling"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}},
            "only rotation without scaling",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0}, "original_max_position_embeddings": 64},
            "only rotation without scaling",
        ),
        ({"rope_scaling": {"type": 1, "factor": 1.0}}, "only rotation without scaling"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], not a table"),
    ],
)
def test_a_theta_that_is_missing_or_contradictory_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_bias", True),
        ("attention_bias", 0),
        ("attention_dropout", 0.1),
        ("mlp_bias", True),
        ("model_type", "mistral"),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("logit_scale", 0.5),
        ("num_experts", 8),
        ("rope_traditional", True),
        ("embedding_multiplier", 12.0),
        ("pruned_heads", {"0": [1]}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ],
)
def test_another_architecture_is_refused_by_name(name: str, value: Any) -> None:
    assert f"{name} is {value!r}; only " in refusal(**{name: value})


@pytest.mark.parametrize("name", MUST_BE)
def test_every_field_with_one_meaning_has_values_that_are_refused(name: str) -> None:
    assert f"{name} is 'x'; only " in refusal(**{name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "modeling.Evil"}),
        ("sliding_window", 4096),
        ("quantization_config", {"bits": 4}),
        ("no_rope_layers", [1]),
        ("attn_temperature", True),
    ],
)
def test_an_unknown_field_is_refused_by_name(name: str, value: Any) -> None:
    assert f"{name}: unknown field" in refusal(**{name: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 100}, "hidden_size (100) is not a multiple of num_attention_heads (6)"),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) is not a multiple of num_key_value_heads (4)"),
        ({"hidden_size": 90}, "the head size (15) is odd"),
        ({"head_dim": 64}, "head_dim (64) is not hidden_size / num_attention_heads (16)"),
        ({"eos_token_id": 512}, "vocab_size (512)"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "512"}, "vocab_size"),
        ({"vocab_size": 512.5}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"initializer_range": float("nan")}, "initializer_range"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [0.5]}, "eos_token_id"),
        ({"eos_token_id": [700]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ],
)
def test_a_shape_or_value_that_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**changes)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "eos_token_id",
    ],
)  # fmt: skip
def test_a_missing_field_is_not_guessed(name: str) -> None:
    assert name in refusal(**{name: MISSING})


def test_the_stated_head_size_may_agree() -> None:
    assert parse_hf_config(table(head_dim=16)).head_dim == 16


def test_all_problems_are_reported_at_once() -> None:
    what = refusal(rope_theta=MISSING, attention_bias=True, auto_map={}, vocab_size=MISSING)
    for expected in (
        "rope_theta is missing",
        "attention_bias is True",
        "auto_map: unknown",
        "vocab_size: Field required",
    ):
        assert expected in what


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GENUINE, indent=2), encoding="utf-8")
    return path


def test_a_file_and_its_folder_are_the_same(config_json: Path) -> None:
    assert read_model_config(config_json) == read_model_config(str(config_json.parent)) == parse_hf_config(GENUINE)


def test_every_truncation_is_refused(config_json: Path) -> None:
    whole = config_json.read_bytes()
    for length in range(len(whole)):
        config_json.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="may be truncated"):
            read_model_config(config_json)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "holds a list, not an object"),
        (b"3", "holds a int, not an object"),
        (b"null", "holds a NoneType, not an object"),
        (b"\xff\xfe\x00", "is not sound JSON"),
        (b"[" * 100_000, "is not sound JSON"),
        (b'{"rope_theta": 100000, "rope_theta": 10000}', "has the key 'rope_theta' twice"),
        (b" " * 1_000_001, "has over 1000000 bytes"),
    ],
    ids=["list", "number", "null", "bytes", "depth", "duplicate", "size"],
)
def test_what_is_no_object_is_refused(content: bytes, expected: str, config_json: Path) -> None:
    config_json.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_model_config(config_json)


@pytest.mark.parametrize("source", ["nowhere", "nowhere/config.json", "/nowhere/at/all", "./a/b", "a/b/c"])
def test_a_missing_file_is_a_data_error(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_model_config(source)
    assert not isinstance(caught.value, NetworkError)


def test_a_folder_without_a_config_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_a_hub_id_is_fetched_from_the_hub(config_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, **_options: Any) -> str:
        asked.append((repo_id, filename))
        return str(config_json)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resmol.system.hub_download.require_answer", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_model_config("HuggingFaceTB/SmolLM2-135M") == parse_hf_config(GENUINE)
    assert asked == [("HuggingFaceTB/SmolLM2-135M", "config.json")]


def test_a_hub_that_cannot_be_reached_is_a_network_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_arguments: Any, **_options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resmol.system.hub_download.require_answer", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(NetworkError, match=r"HuggingFaceTB/SmolLM2-135M/config\.json .*no route to host"):
        read_model_config("HuggingFaceTB/SmolLM2-135M")


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_transformers_reads_back_the_same_model(name: str, tmp_path: Path) -> None:
    model = load_preset(name).model
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()), encoding="utf-8")
    theirs = LlamaConfig.from_pretrained(tmp_path)
    for field, value in model.model_dump().items():
        if field != "rope_theta":  # transformers 5 keeps it in rope_parameters only
            assert getattr(theirs, field) == value, field
    assert theirs.rope_parameters == {"rope_theta": model.rope_theta, "rope_type": "default"}
    assert theirs.head_dim == model.head_dim
    assert not theirs.attention_bias
    assert not theirs.mlp_bias


@pytest.mark.parametrize("name", preset_names())
def test_what_transformers_writes_is_read_back(name: str, tmp_path: Path) -> None:
    """Its file has the fields of version 5; whatever it adds must be known to leave the numbers alone."""
    model = load_preset(name).model
    LlamaConfig(**model.to_hf()).save_pretrained(tmp_path)
    assert read_model_config(tmp_path) == model


def test_both_spellings_are_written() -> None:
    written = parse_hf_config(GENUINE).to_hf("bfloat16")
    assert (written["rope_theta"], written["rope_parameters"]["rope_theta"]) == (100000.0, 100000.0)
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert parse_hf_config(written) == parse_hf_config(GENUINE)
