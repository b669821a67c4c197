"""A GGUF export is what was trained: read back by transformers, within the type's error, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from huggingface_hub import ModelCard
from tiny import TrainTiny
from transformers import AutoTokenizer

from resmol.__main__ import run as resmol
from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, DataError, UsageError
from resmol.interop.description import Description
from resmol.interop.export import export_gguf, gguf_parity, gguf_writer, verify_export
from resmol.interop.export import gguf as gguf_export
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.export.gguf_parity import compare_gguf
from resmol.interop.export.gguf_vocab import gguf_vocabulary
from resmol.interop.export.gguf_writer import as_kind, write_gguf
from resmol.interop.export.parity import HARD_TEXTS, TRANSFORMERS
from resmol.interop.export.publish import plan_publication
from resmol.interop.gguf_header import read_gguf_header
from resmol.interop.gguf_names import gguf_config, gguf_tensors
from resmol.interop.load import load_model
from resmol.interop.special_tokens import SpecialTokens
from resmol.model.llama import CausalLM

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
WIDE = "model.hidden_size=96"  # whose rows Q8_0 can cut into blocks of 32


def described(tokenizer: Tokenizer) -> ExportedTokenizer:
    """A tokenizer as the export of a run describes it."""
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), tokenizer.eos_id)
    return ExportedTokenizer(tokenizer, SpecialTokens(roles, (tokenizer.eos_id,)))


@pytest.fixture(autouse=True)
def only_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say the same with and without llama.cpp; what it reads is tested in test_llama_cpp.py."""
    monkeypatch.setattr(gguf_export, "gguf_readers", lambda: [TRANSFORMERS])


@pytest.fixture
def run(tmp_path: Path, train_tiny: TrainTiny) -> Path:
    train_tiny(tmp_path / "run", 5, WIDE)
    return tmp_path / "run"


def exported(run: Path, out: Path, dtype: str) -> Path:
    assert all_passed(export_gguf(run, out, dtype=dtype).checks)
    return out / f"run-{DTYPES[dtype]}.gguf"


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_export_of_a_run_is_its_checkpoint(run: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    file = exported(run, out, dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {DTYPES[dtype]}
    assert "output.weight" not in kinds  # tied
    ours, again = load_model(run), load_model(out)  # our own reader, which was there before
    assert again.tokenizer.sha256 == ours.tokenizer.sha256
    allowed = {"F32": 0.0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 1e-2}[DTYPES[dtype]]
    for name, weight in ours.model.state_dict().items():
        assert (again.model.state_dict()[name] - weight).abs().max() <= allowed * weight.abs().max()


def test_the_folder_holds_what_its_readers_need(run: Path, tmp_path: Path) -> None:
    export_gguf(run, tmp_path / "out", dtype="q8_0")
    manifest = verify_export(tmp_path / "out")
    assert (manifest.kind, manifest.facts["dtype"], manifest.facts["readers"]) == ("gguf", "q8_0", ["transformers"])
    assert {check.name for check in manifest.checks} == {
        "weights", "cast", "logits, transformers", "greedy tokens, transformers", "token ids, transformers",
        "the card's code, transformers", "tokenizer(text), transformers", "a padded batch, transformers",
        "special tokens, transformers", "pipeline, transformers",
    }  # fmt: skip
    assert {"run-Q8_0.gguf", "Modelfile", "README.md", "tokenizer.json"} <= manifest.files.keys()
    assert (tmp_path / "out" / "training" / "ledger.jsonl").read_bytes() == (run / "ledger.jsonl").read_bytes()
    modelfile = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert modelfile[:2] == ["FROM ./run-Q8_0.gguf", 'TEMPLATE """{{ .Prompt }}"""']
    assert 'PARAMETER stop "<|endoftext|>"' in modelfile
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.base_model) == (None, "gguf", None)
    assert 'gguf_file="run-Q8_0.gguf"' in card.text
    plan = plan_publication(tmp_path / "out", "me/tiny-gguf", space=False)
    assert plan.repo_type == "model"
    assert "run-Q8_0.gguf" in plan.files
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")  # as the card says
    ours = load_model(run).tokenizer
    assert [theirs(text)["input_ids"] for text in HARD_TEXTS] == ours.encode_batch(HARD_TEXTS)


@pytest.mark.usefixtures("reads_here")
def test_metadata_is_what_llama_cpp_wants(run: Path, tmp_path: Path) -> None:
    file = exported(run, tmp_path / "out", "float32")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    ours = load_model(run)
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "run",
        "general.license": None, "general.file_type": 0, "general.quantization_version": 2,
        "llama.context_length": 64, "llama.embedding_length": 96, "llama.block_count": 2,
        "llama.feed_forward_length": 32, "llama.attention.head_count": 3, "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 100_000.0, "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    kinds = fields["tokenizer.ggml.token_type"]
    assert (len(kinds), kinds[0], set(kinds[1:])) == (512, gguf.TokenType.CONTROL, {gguf.TokenType.NORMAL})
    document = json.loads(ours.tokenizer.data)
    assert fields["tokenizer.ggml.tokens"] == sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    assert len(fields["tokenizer.ggml.merges"]) == len(document["model"]["merges"])


def test_the_genuine_vocabulary_is_complete(genuine_tokenizer: Tokenizer) -> None:
    vocabulary = gguf_vocabulary(genuine_tokenizer, 49_152)
    control = [index for index, kind in enumerate(vocabulary.kinds) if kind == gguf.TokenType.CONTROL]
    assert (control, len(vocabulary.merges), vocabulary.pre) == (list(range(17)), 48_900, "smollm")
    assert vocabulary.tokens[0] == "<|endoftext|>"
    rest = tokenizers.Tokenizer.from_str(genuine_tokenizer.data.decode())
    assert vocabulary.tokens == [rest.id_to_token(index) for index in range(49_152)]


def test_the_embedding_may_be_larger_than_the_vocabulary(tiny_tokenizer: Tokenizer) -> None:
    vocabulary = gguf_vocabulary(tiny_tokenizer, 515)
    assert vocabulary.tokens[512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert set(vocabulary.kinds[512:]) == {gguf.TokenType.UNUSED}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "pre_tokenizer"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre_tokenizer"),
    ],
)
def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(
    tiny_tokenizer: Tokenizer, change: Callable[[Any], None], named: str
) -> None:
    document = json.loads(tiny_tokenizer.data)
    change(document)
    with pytest.raises(DataError, match=named):
        gguf_vocabulary(Tokenizer(json.dumps(document).encode(), tiny_tokenizer.path), 512)


def test_without_the_digits_step_it_is_gpt2s_rule(tiny_tokenizer: Tokenizer) -> None:
    document = json.loads(tiny_tokenizer.data)
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]
    assert gguf_vocabulary(Tokenizer(json.dumps(document).encode(), tiny_tokenizer.path), 512).pre == "gpt-2"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_what_a_type_keeps_is_what_the_library_writes(kind: str) -> None:
    """Our formula against the one of the gguf package, ties and extremes included."""
    values = np.random.default_rng(0).standard_normal((64, 96), dtype=np.float32)
    values[0, :32] = 0.0
    values[1, :32] = np.linspace(-127, 127, 32).round() / 2  # halves, of which every second is a tie
    values[2, :32] *= 1e-7
    number = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(values, number)
    reference = packed.astype(np.float32) if kind == "F16" else gguf.quants.dequantize(packed, number)
    assert np.array_equal(as_kind(torch.from_numpy(values), kind).numpy(), reference)


@pytest.mark.usefixtures("reads_here")
def test_rows_that_q8_0_cannot_cut_stay_in_float16(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """And the file says how much of it is Q8_0."""
    train_tiny(tmp_path / "run", 2, "model.intermediate_size=256")  # rows of 24, and of 256
    file = exported(tmp_path / "run", tmp_path / "out", "q8_0")
    tensors = gguf.GGUFReader(file).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    sizes = {kind: sum(int(t.n_elements) for t in tensors if t.tensor_type.name == kind) for kind in ("Q8_0", "F16")}
    share = sizes["Q8_0"] / sum(sizes.values())
    manifest = verify_export(tmp_path / "out")
    assert manifest.facts["share_of_dtype"] == pytest.approx(share, abs=1e-4)
    assert f"; {share:.0%} of the numbers are Q8_0" in next(c.measured for c in manifest.checks if c.name == "weights")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"stored as q8_0 ({int(100 * share)} % of the numbers" in card


def test_a_file_with_a_few_per_cent_of_its_type_is_refused(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 2)  # rows of 24, and of 32
    with pytest.raises(UsageError, match=r"7\.7% of the numbers would be Q8_0"):
        export_gguf(tmp_path / "run", tmp_path / "out", dtype="q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_writing_and_reading_are_inverses(
    tiny_config: RunConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    config = tiny_config.model.model_copy(update={"tie_word_embeddings": tied, "initializer_range": 0.02})
    model = CausalLM.empty(config)
    model.init_weights(0)
    write_gguf(tmp_path / "x.gguf", model.requires_grad_(False), described(tiny_tokenizer), "float32", Description("x"))
    header = read_gguf_header(tmp_path / "x.gguf")
    assert gguf_config(header) == config
    found = dict(gguf_tensors(header, config))
    assert ("lm_head.weight" in found) is not tied
    assert all(np.array_equal(values, model.state_dict()[name].numpy()) for name, values in found.items())


# --- what is refused ---------------------------------------------------------------------------------------


def _not_permuted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_writer, "permuted", lambda values, heads: values)


def _queries_permuted_like_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_writer, "rotated_heads", lambda name, config: 1 if "attn_q" in name or "attn_k" in name else 0)


def _other_theta(patch: pytest.MonkeyPatch) -> None:
    genuine = gguf_writer.gguf_metadata
    patch.setattr(gguf_writer, "gguf_metadata", lambda config: genuine(config) | {"llama.rope.freq_base": 10_000.0})


def _other_names(patch: pytest.MonkeyPatch) -> None:
    genuine, other = gguf_writer.gguf_name, {"gate": "up", "up": "gate"}
    swap = lambda name: name.replace("gate", "*").replace("up_proj", "gate_proj").replace("*", "up")  # noqa: E731
    assert swap("mlp.gate_proj") == f"mlp.{other['gate']}_proj"
    patch.setattr(gguf_writer, "gguf_name", lambda name: genuine(swap(name)))


def _merges_in_another_order(patch: pytest.MonkeyPatch) -> None:
    genuine = gguf_writer.GGUFWriter.add_token_merges
    patch.setattr(gguf_writer.GGUFWriter, "add_token_merges", lambda self, merges: genuine(self, merges[::-1]))


def _coarser_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(gguf_writer.KINDS, "float32", "F16")
    patch.setattr(gguf_writer, "as_kind", lambda values, kind: values)  # what would be expected of float32
    patch.setattr(gguf_parity, "as_stored", lambda model, dtype: model)


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize(
    ("put_in", "named"),
    [
        (_not_permuted, "logits, transformers"),
        (_queries_permuted_like_keys, "logits, transformers"),
        (_other_theta, "logits, transformers"),
        (_other_names, "logits, transformers"),
        (_coarser_weights, "logits, transformers"),
        (_merges_in_another_order, "token ids, transformers"),
    ],
)
def test_what_differs_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_in: Any, named: str
) -> None:
    put_in(monkeypatch)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckFailed, match=named):
        export_gguf(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("reads_here")
def test_special_tokens_written_as_text_are_noticed(
    genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM.empty(tiny_config.model.model_copy(update={"vocab_size": 49_152}))
    model.init_weights(0)
    model.requires_grad_(False)
    tokenizer = described(genuine_tokenizer)
    passed, genuine = [], gguf_writer.GGUFWriter.add_token_types
    for name in ("healthy", "mutant"):
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, model, tokenizer, "float32", Description(name))
        passed.append({c.name: c.passed for c in compare_gguf(model, tokenizer, file, "float32", [TRANSFORMERS])})
        monkeypatch.setattr(gguf_writer.GGUFWriter, "add_token_types", lambda self, k: genuine(self, [1] * len(k)))
    assert all(passed[0].values())
    assert [name for name, fine in passed[1].items() if not fine] == ["token ids, transformers"]


def test_weights_beyond_the_type_are_refused(tiny_config: RunConfig, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = CausalLM.empty(tiny_config.model)
    model.init_weights(0)
    model.requires_grad_(False).model.embed_tokens.weight[3, 3] = 70_000.0  # float16 ends at 65504
    checks = [
        gguf_parity._type_check(model, gguf_writer.as_stored(model, dtype), dtype) for dtype in ("float16", "q8_0")
    ]
    assert [check.passed for check in checks] == [False, False]  # rows of 24: also Q8_0 keeps them in F16


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_stored_number_that_is_none_is_beyond_the_type(tiny_config: RunConfig, dtype: str, name: str) -> None:
    model = CausalLM.empty(tiny_config.model)
    model.init_weights(0)
    stored = gguf_writer.as_stored(model, dtype)
    assert gguf_parity._type_check(model, stored, dtype).passed
    stored.state_dict()[name].view(-1)[3] = torch.nan
    assert not gguf_parity._type_check(model, stored, dtype).passed


def test_nobody_to_read_it_back_is_refused_before_anything_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export, "gguf_readers", gguf_parity.gguf_readers)
    monkeypatch.setattr(gguf_parity, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="neither transformers"):
        export_gguf(run, tmp_path / "out")
    monkeypatch.setattr(gguf_parity, "find_spec", lambda name: None if name == "accelerate" else object())
    assert gguf_parity.gguf_readers() == [gguf_parity.LLAMA_CPP]


def test_an_unknown_type_and_an_existing_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q4_0"):
        export_gguf(run, tmp_path / "out", dtype="q4_0")
    with pytest.raises(UsageError, match="exists"):
        export_gguf(run, run)


@pytest.mark.parametrize(
    ("name", "plain"), [("a b\nFROM x", "a-b-FROM-x"), ("mine", "mine"), ("..", "model"), ("é", "model")]
)
def test_names_are_harmless_in_a_modelfile(name: str, plain: str) -> None:
    assert gguf_export.plain_name(name) == plain


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--format", "onnx"], "onnx"), (["--format", "gguf", "--space"], "Space"), (["--dtype", "q8_0"], "q8_0")],
)
def test_formats_of_the_command_line(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resmol(["export", "nothing", str(tmp_path / "out"), *options], debug=False) == 2
    assert named in capsys.readouterr().err
