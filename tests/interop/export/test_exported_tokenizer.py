"""What an export says about text gives others the ids of training, and keeps a chat model what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from small_folders import CHATML, begins_folder, chat_folder, small_folder, small_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed
from resmol.interop.export import export_gguf, export_hf, hf
from resmol.interop.export import gguf as gguf_export
from resmol.interop.export.exported_tokenizer import ExportedTokenizer, exported_tokenizer
from resmol.interop.export.model_card import card_code
from resmol.interop.export.parity import TRANSFORMERS
from resmol.interop.load import load_model
from resmol.interop.special_tokens import SpecialTokens
from resmol.train.start import train_model

END, BEGIN = "<|endoftext|>", "<|begin_of_text|>"


def made(path: Path, rust: tokenizers.Tokenizer) -> Tokenizer:
    rust.save(str(path))
    return Tokenizer(path.read_bytes(), path)


def exported(tokenizer: Tokenizer, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> ExportedTokenizer:
    return ExportedTokenizer(tokenizer, SpecialTokens({"eos_token": 0, "pad_token": 0}, (0,)), before, after)


# --- tokenizer.json ------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_right_is_kept_byte_for_byte(genuine_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert exported(genuine_tokenizer).data() == genuine_tokenizer.data
    begins = made(tmp_path / "t.json", small_tokenizer(END, BEGIN, begin=BEGIN))
    assert exported(begins, before=(1,)).data() == begins.data


@pytest.mark.parametrize("begin", [BEGIN, None])
@pytest.mark.parametrize(("before", "after"), [((), ()), ((1,), ()), ((), (0,)), ((1, 1), (0,))])
def test_others_get_exactly_the_ids_that_belong_around_a_text(
    begin: str | None, before: tuple[int, ...], after: tuple[int, ...], tmp_path: Path
) -> None:
    tokenizer = made(tmp_path / "t.json", small_tokenizer(END, BEGIN, begin=begin))
    ours = exported(tokenizer, before, after)
    theirs = tokenizers.Tokenizer.from_str(ours.data().decode())
    for text in ("the river  12", "", f"a{BEGIN}b"):
        assert theirs.encode(text).ids == ours.encode(text) == [*before, *tokenizer.encode(text), *after]


def test_texts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    rust = small_tokenizer(END)
    rust.enable_truncation(4)
    rust.enable_padding(length=8, pad_id=0, pad_token=END)
    tokenizer = made(tmp_path / "t.json", rust)
    theirs = tokenizers.Tokenizer.from_str(exported(tokenizer).data().decode())
    assert theirs.encode("the river of the mill went on").ids == tokenizer.encode("the river of the mill went on")


# --- the files of an export ----------------------------------------------------------------------------------


@pytest.fixture
def only_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "gguf_readers", lambda: [TRANSFORMERS])


@pytest.mark.usefixtures("only_transformers", "reads_here")
def test_a_chat_model_stays_one(tmp_path: Path) -> None:
    """Through both formats, and from the GGUF file back into a Hugging Face folder."""
    source = chat_folder(tmp_path / "chat")
    export_hf(source, tmp_path / "hf")
    export_gguf(source, tmp_path / "gguf")
    export_hf(tmp_path / "gguf" / "gguf-F32.gguf", tmp_path / "back")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "gguf" / "gguf-F32.gguf").fields.items()}
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 2, "eot": 0, "unknown": 0, "padding": 2}
    described = [fields[f"general.{name}"] for name in ("name", "license", "languages")]
    assert described == ["Small Chat", "apache-2.0", ["en", "no"]]
    assert fields["tokenizer.chat_template"] == CHATML
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert '{{ .Prompt }}"' not in modelfile
    assert [line for line in modelfile.splitlines() if "stop" in line] == [
        f'PARAMETER stop "{end}"' for end in ("<|im_end|>", END)
    ]
    for folder in (tmp_path / "hf", tmp_path / "back"):
        theirs: Any = AutoTokenizer.from_pretrained(folder)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (1, 2, 0, 2)
        assert theirs.chat_template == CHATML
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pad_token_id"] == 2
    for folder in (tmp_path / "hf", tmp_path / "gguf", tmp_path / "back"):
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "no"])
        assert "# Small Chat\n" in card.text
        assert "base model" not in card.text


@pytest.mark.usefixtures("reads_here")
def test_a_tokenizer_that_begins_each_text_goes_on_doing_so(tmp_path: Path) -> None:
    assert all_passed(export_hf(begins_folder(tmp_path / "begins"), tmp_path / "hf").checks)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the")["input_ids"] == [1, *theirs("the", add_special_tokens=False)["input_ids"]]


@pytest.mark.usefixtures("only_transformers", "reads_here")
def test_an_added_token_without_a_row_is_left_out(tmp_path: Path) -> None:
    """A [PAD] that somebody added without resizing the embedding: padding with it would be an error in PyTorch."""
    rust = small_tokenizer(END, "<|other|>")
    rows = rust.get_vocab_size()
    rust.add_special_tokens(["[PAD]"])
    stated = {"tokenizer_config.json": {"pad_token": "[PAD]", "eos_token": END}}
    source = small_folder(tmp_path / "source", rust, stated, vocab_size=rows)
    for export in (export_hf, export_gguf):
        folder = export(source, tmp_path / export.__name__).path
        theirs: Any = AutoTokenizer.from_pretrained(folder)
        assert (len(theirs), theirs.pad_token) == (rows, "<|other|>")


@pytest.mark.usefixtures("reads_here")
def test_training_added_nothing_so_the_export_of_a_run_adds_nothing(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Whatever the post-processor of its tokenizer says; the file that the run knows by hash lies in the record."""
    tokenizer = made(tmp_path / "t.json", small_tokenizer(END, BEGIN, begin=BEGIN))
    data = prepare(tmp_path / "data", from_texts(["the river of the mill"] * 60), tokenizer, val_fraction=0.1)
    settings = ["train.steps=2", f"tokenizer.sha256={tokenizer.sha256}"]
    train_model(tiny_config, tmp_path / "run", overrides=settings, data=str(data.root), tokenizer=tokenizer.path)
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the river")["input_ids"] == tokenizer.encode("the river")
    assert (tmp_path / "out" / "training" / "tokenizer.json").read_bytes() == tokenizer.data
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"--tokenizer training/tokenizer.json --tokenizer-sha256 {tokenizer.sha256}" in card


def test_the_card_shows_the_code_that_is_executed(tmp_path: Path) -> None:
    loaded = load_model(chat_folder(tmp_path / "chat"), device="cpu")
    tokenizer = exported_tokenizer(loaded)
    (tmp_path / "out").mkdir()
    hf.write_folder(loaded, tokenizer, tmp_path / "out", "float32")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (code,) = [token.content for token in MarkdownIt().parse(text) if token.info == "python"]
    assert code == card_code(tokenizer)
    assert "apply_chat_template" in code


@pytest.mark.usefixtures("only_transformers", "reads_here")
def test_files_of_an_export_have_the_mode_of_ordinary_files(tmp_path: Path) -> None:
    source = chat_folder(tmp_path / "chat")
    (tmp_path / "ordinary").touch()
    wanted = (tmp_path / "ordinary").stat().st_mode
    for export, name in ((export_hf, "hf"), (export_gguf, "gguf")):
        modes = {p.name: p.stat().st_mode for p in export(source, tmp_path / name).path.iterdir() if p.is_file()}
        assert modes == dict.fromkeys(modes, wanted)


# --- faults that an export must not have ---------------------------------------------------------------------


def _table(change: Callable[[dict[str, Any]], object], method: str = "config") -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in tokenizer_config.json, or in generation_config.json."""

    def put_in(patch: pytest.MonkeyPatch) -> None:
        genuine = getattr(ExportedTokenizer, method)

        def changed(self: ExportedTokenizer, *rest: Any) -> dict[str, Any]:
            table = genuine(self, *rest)
            change(table)
            return table

        patch.setattr(ExportedTokenizer, method, changed)

    return put_in


def _tokenizer_that_ends_each_text(patch: pytest.MonkeyPatch) -> None:
    genuine = ExportedTokenizer.data
    patch.setattr(ExportedTokenizer, "data", lambda self: genuine(exported(self.tokenizer, after=(0,))))


def _code_of_an_older_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("resmol.interop.export.card_check.card_code", lambda *_, **__: "import transformers.gone\n")


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize(
    ("put_in", "named"),
    [
        (_table(lambda t: t.pop("model_input_names")), r"tokenizer\(text\): model_input_names gives None"),
        (_table(lambda t: t.update(pad_token="<|im_start|>")), "a padded batch"),
        (_table(lambda t: t.update(chat_template="{{ 1 }}")), "special tokens: chat template"),
        (_table(lambda t: t.update(eos_token="<|endoftext|>")), "special tokens: roles"),
        (_table(lambda t: t.update(eos_token_id=0), "generation_config"), "special tokens: ends"),
        (_tokenizer_that_ends_each_text, r"tokenizer\(text\): tokenizer\("),
    ],
)
def test_a_fault_that_a_stranger_would_meet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_in: Callable[[pytest.MonkeyPatch], None], named: str
) -> None:
    source = chat_folder(tmp_path / "chat")
    put_in(monkeypatch)
    with pytest.raises(CheckFailed, match=named):
        export_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("put_in", "named"),
    [
        (_table(lambda t: t.pop("pad_token")), "Asking to pad but the tokenizer does not have a padding token"),
        (_table(lambda t: t.pop("chat_template")), "tokenizer.chat_template is not set"),
        (_code_of_an_older_version, "No module named 'transformers.gone'"),
    ],
)
def test_an_error_in_a_strangers_hands_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_in: Callable[[pytest.MonkeyPatch], None], named: str
) -> None:
    source = chat_folder(tmp_path / "chat")
    put_in(monkeypatch)
    with pytest.raises(CheckFailed, match=named):
        export_hf(source, tmp_path / "out")
