"""The card says what the record says, and text from outside stays text. A Markdown parser of others reads it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny import TrainTiny, rewrite, synthetic_texts

from resmol.__main__ import run as resmol
from resmol.audit.certificate import write_certificate
from resmol.checks import Check
from resmol.config.load import load_config, load_preset
from resmol.data.builtin_corpora import SHAKESPEARE, STANDARD_LIBRARY, corpus_of
from resmol.data.shards import Dataset, open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, DataError
from resmol.interop.export import hf
from resmol.interop.export.card_words import NO_WORDS, CardWords
from resmol.interop.export.exported_tokenizer import exported_tokenizer
from resmol.interop.export.markdown import clean, code_block, code_span, plain
from resmol.interop.export.model_card import model_card, smollm2_of_shape
from resmol.interop.export.training_record import describe_run, write_record
from resmol.interop.load import load_model
from resmol.interop.model_ref import ModelRef
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, read_ledger

ROOT = Path(__file__).resolve().parents[3]
CURVES = ["training/loss.png", "training/learning-rate.png", "training/gradient-norm.png", "training/speed.png"]
HEADINGS = ["Architecture", "Use", "Data", "Curves", "Samples", "How to reproduce it", "The record", "Limits"]


def folder_of(source: Path | ModelRef, out: Path, words: CardWords = NO_WORDS) -> Path:
    """Write the files of an export without reading them back, which takes seconds."""
    loaded = load_model(source, device="cpu")
    out.mkdir()
    hf.write_folder(loaded, exported_tokenizer(loaded), out, "float32", words)
    return out


def parsed(text: str) -> list[Any]:
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def headings(tokens: list[Any]) -> list[str]:
    return [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]


def blocks(tokens: list[Any]) -> list[str]:
    return [token.content for token in tokens if token.type == "fence" and token.info == "text"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("card")


@pytest.fixture
def run(origin: Path, tmp_path: Path, train_tiny: TrainTiny) -> RunDir:
    """A run of 20 steps, resumed at 26 after 25, on to 40; a copy for each test."""
    if not (origin / "run").exists():
        train_tiny(origin / "run", 25)
        train_tiny(origin / "run", 40)
    return RunDir(Path(shutil.copytree(origin / "run", tmp_path / "run")))


# --- what it says -------------------------------------------------------------------------------------------


def test_the_card_says_what_the_ledger_says(run: RunDir, tmp_path: Path) -> None:
    card = (folder_of(run.path, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in run.ledger.read_text(encoding="utf-8").splitlines()]
    last = [r for r in records if r["kind"] == "step"][-1]
    evaluation = [r for r in records if r["kind"] == "eval"][-1]
    for fact in (
        f"{last['tokens_seen']:,} tokens",
        "A Llama of ",
        f"{last['tokens_seen'] / records[0]['parameters']:.3g} for each parameter",
        "licence of the weights | not stated",
        "40, by 2 processes: 1 to 25, 26 to 40",
        f"{last['loss']:.4f} nats per token",
        f"{evaluation['loss']:.4f} nats per token, {evaluation['bits_per_byte']:.4f} bits per byte",
        records[0]["environment"]["torch"],
        records[0]["data_fingerprint"],
        read_ledger(run.ledger).head,
        next(r for r in reversed(records) if r["kind"] == "save")["manifest_sha256"],
        "not recorded: whoever publishes this must know it",
    ):
        assert fact in card, fact
    assert "SmolLM2" not in card, "it is somebody's own Llama"
    tokens = parsed(card)
    assert headings(tokens) == ["run", *HEADINGS]
    assert [t.attrGet("src") for t in tokens if t.type == "image"] == CURVES
    samples = [r for r in records if r["kind"] == "sample"]
    assert [block.strip("\n") for block in blocks(tokens)] == [clean(r["text"]).strip("\n") for r in samples[::-1][:3]]


def test_an_earlier_checkpoint_is_not_given_what_came_later(run: RunDir, tmp_path: Path) -> None:
    out = folder_of(run.checkpoints / "step-00000025", tmp_path / "out")
    card = (out / "README.md").read_text(encoding="utf-8")
    steps = {r["step"]: r for r in read_ledger(run.ledger).records if r["kind"] == "step"}
    assert f"{steps[25]['tokens_seen']:,} tokens" in card
    assert f"{steps[25]['loss']:.4f}" in card
    assert "25, by 1 process: 1 to 25" in card
    assert "goes on after step 25" in card
    assert "at step 40" not in card


def test_training_holds_the_record_and_no_path_of_this_machine(run: RunDir, tmp_path: Path) -> None:
    stored = load_config(run.config)
    assert stored.data.path  # that of a folder on this machine
    anchor = run.anchors / "line-00000001-01234567" / "manifest.json"
    anchor.parent.mkdir(parents=True)
    anchor.write_text("signed")
    out = folder_of(run.path, tmp_path / "out")
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"training/config.toml", "training/ledger.jsonl", *CURVES} <= names
    assert (out / "training" / anchor.relative_to(run.path)).read_text() == "signed"
    assert "LICENSE" not in names
    assert (out / "training" / "ledger.jsonl").read_bytes() == run.ledger.read_bytes()
    copied = load_config(out / "training" / "config.toml")
    assert (copied.sha256, copied.data.path) == (stored.sha256, "")
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in CURVES)
    for name in names - {"tokenizer.json", "model.safetensors"}:
        assert str(tmp_path.parent).encode() not in (out / name).read_bytes(), name


@pytest.mark.parametrize("current", [True, False])
def test_only_a_certificate_of_this_very_ledger_is_published(
    run: RunDir, tmp_path: Path, train_tiny: TrainTiny, current: bool
) -> None:
    write_certificate(run, [Check("chain", True, "whole", "whole")])
    if not current:
        train_tiny(run.path, 45)
    out = folder_of(run.path, tmp_path / "out")
    assert (out / "training" / "certificate.json").exists() is current
    assert ("certificate.json" in (out / "README.md").read_text(encoding="utf-8")) is current


def test_a_torn_line_is_not_published(run: RunDir, tmp_path: Path) -> None:
    whole = run.ledger.read_bytes()
    run.ledger.write_bytes(whole + b'{"kind":"ste')
    assert (folder_of(run.path, tmp_path / "out") / "training" / "ledger.jsonl").read_bytes() == whole


@pytest.mark.parametrize("held_out", [["--val-fraction", "0.3"], ["--val", "val.txt"]])
def test_the_commands_of_the_card_reproduce_the_run(
    held_out: list[str], tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stranger: from the folder and the text alone, bit for bit."""
    monkeypatch.chdir(tmp_path)
    texts = synthetic_texts(200)
    Path("text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    Path("val.txt").write_text("\n\n".join(texts[:60]), encoding="utf-8")
    tokenizer = ["--tokenizer", str(tiny_tokenizer.path)]
    Path("tiny.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
    prepare = [
        "prepare",
        "mine",
        "--input",
        "text.txt",
        *held_out,
        "--tokenizer-sha256",
        tiny_tokenizer.sha256,
    ]
    assert resmol([*prepare, *tokenizer], debug=False) == 0
    train = ["train", "run", "--config", "tiny.toml", "--data", "mine", *tokenizer, "--steps"]
    assert [resmol([*train, steps], debug=False) for steps in ("6", "9")] == [0, 0]
    out = folder_of(tmp_path / "run", tmp_path / "out")
    card = (out / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^resmol (.*)$", card, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(out)
    for command in commands:
        files = {"YOUR_TEXT": str(tmp_path / "text.txt"), "YOUR_HELD_OUT_TEXT": str(tmp_path / "val.txt")}
        words = [files.get(word, word) for word in shlex.split(command)]
        assert resmol(words, debug=False) == 0, command

    def bits(folder: Path) -> list[str]:
        return [r["loss_bits"] for r in read_ledger(RunDir(folder).ledger).records if r["kind"] == "step"]

    assert bits(out / "RUN") == bits(tmp_path / "run")
    assert open_dataset(out / "data").manifest.val == open_dataset(tmp_path / "mine").manifest.val


# --- whose weights they are ---------------------------------------------------------------------------------


def test_weights_from_elsewhere_are_not_called_ours(run: RunDir, tmp_path: Path) -> None:
    """Also not when they lie inside of a run's folder."""
    inside = run.path / "exports" / "theirs"
    inside.parent.mkdir()
    folder_of(run.path, inside, CardWords(license="apache-2.0"))
    out = folder_of(inside, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert "not trained by resmol" in card.text.replace("\n", " ")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", None)  # as the card of that folder states it
    (inside / "README.md").unlink()
    assert ModelCard.load(folder_of(inside, tmp_path / "again") / "README.md").data.license is None
    assert not (out / "training").exists()
    assert not (out / "LICENSE").exists()
    assert headings(parsed(card.content))[1:] == ["Architecture", "Use"]


def test_a_checkpoint_of_another_run_does_not_get_this_record(
    run: RunDir, tmp_path: Path, train_tiny: TrainTiny
) -> None:
    train_tiny(tmp_path / "other", 5, "train.seed=9")
    shutil.rmtree(run.checkpoints / "step-00000005")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000005", run.checkpoints / "step-00000005")
    with pytest.raises(CheckFailed, match="not the checkpoint that the ledger"):
        folder_of(run.checkpoints / "step-00000005", tmp_path / "out")


def test_a_checkpoint_without_its_run_says_so(run: RunDir, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run.checkpoints / "step-00000025", tmp_path / "a" / "b" / "step-00000025"))
    loaded = load_model(alone, tokenizer=run.tokenizer, device="cpu")
    (tmp_path / "out").mkdir()
    hf.write_folder(loaded, exported_tokenizer(loaded), tmp_path / "out", "float32")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "was not beside it" in card
    assert "licence of the weights | not stated" in card
    assert "license:" not in card


def test_averaged_weights_and_what_was_read_often(
    tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset
) -> None:
    run, on = tmp_path / "run", ("averaging.fraction=0.25", "averaging.every=2")
    train_tiny(run, 50, *on, data=str(short_dataset.root))
    records = read_ledger(RunDir(run).ledger).records
    evaluation = [r for r in records if r["kind"] == "eval"][-1]
    epoch = max(r["epoch"] for r in records if r["kind"] == "step")
    source = ModelRef(run, "averaged")
    card = (folder_of(source, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    for fact in (
        "| weights | averaged over about the last 25 % of the steps |",
        f"the same of the averaged weights | {evaluation['averaged_loss']:.4f} nats per token",
        f"({epoch:.2f} epochs: each token of the training text about {epoch:.0f} times)",
    ):
        assert fact in card, fact
    assert hf.export_facts(load_model(source), "float32")["model"]["weights"] == "averaged"
    card = (folder_of(run, tmp_path / "last") / "README.md").read_text(encoding="utf-8")
    assert "| weights |" not in card


def test_the_licence_of_weights_is_known_only_of_the_built_in_plays(run: RunDir, tmp_path: Path) -> None:
    data = open_dataset(Path(load_config(run.config).data.path)).manifest
    (item,) = data.source.inputs
    plays = item.model_copy(update={"name": SHAKESPEARE})

    def licence(*inputs: Any) -> str | None:
        source = data.source.model_copy(update={"inputs": inputs})
        return describe_run("run", data.model_copy(update={"source": source})).licence

    assert (licence(item), licence(plays), licence(plays, item)) == (None, "apache-2.0", None)
    out = folder_of(run.path, tmp_path / "out", CardWords(license="apache-2.0"))
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert not (folder_of(run.path, tmp_path / "mit", CardWords(license="mit")) / "LICENSE").exists()


def test_only_a_model_of_the_published_shape_is_compared_with_smollm2() -> None:
    """Names and tokens as in the cards of the published models."""
    for preset, published in {
        "smollm2-135m": ("SmolLM2-135M", 2e12),
        "smollm2-135m-pretraining": ("SmolLM2-135M", 2e12),
        "smollm2-360m": ("SmolLM2-360M", 4e12),
        "smollm2-1.7b": ("SmolLM2-1.7B", 11e12),
        "nano": None,
    }.items():
        assert smollm2_of_shape(load_preset(preset).model) == published
    untied = load_preset("smollm2-135m").replace({"model.tie_word_embeddings": False})
    assert smollm2_of_shape(untied.model) is None


# --- text from outside stays text ---------------------------------------------------------------------------

HOSTILE = (
    "```\n# Heading\n<script>alert(1)</script>\n[link](https://evil.example) ![image](x.png)\n| a | b |\n"
    "---\nbase_model: x/y\n---\n~~~~\n````\n{{ config }} {% raw %} \u202eevil\u202c "
    "\x1b[31m \u2028 `x` &lt; www.evil.example\r\n"
)


def test_hostile_text_stays_text(run: RunDir, tmp_path: Path) -> None:
    def poison(records: list[Record]) -> list[Record]:
        for record in records:
            if record["kind"] == "sample":
                record |= {"prompt": HOSTILE, "text": HOSTILE + "\ud800"}
            if "environment" in record:
                record["environment"] |= {"processor": HOSTILE, "torch": HOSTILE, "python": HOSTILE, "system": HOSTILE}
            record |= {"version": HOSTILE} if record["kind"] == "start" else {}
        return records

    rewrite(run, poison)
    renamed = RunDir(run.path.rename(tmp_path / "# <b>x [a](b) `c` | d"))
    card = (folder_of(renamed.path, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    tokens = parsed(card)
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open", "hr"}
    assert [t.attrGet("src") for t in tokens if t.type == "image"] == CURVES
    assert headings(tokens)[1:] == HEADINGS
    assert [block.rstrip("\n") for block in blocks(tokens)] == [clean(HOSTILE + "\ud800").strip("\n")] * 3
    assert yaml.safe_load(card.split("---")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    rows = [token for token in tokens if token.type == "td_open"]
    assert len(rows) % 2 == 0
    assert not re.search("[\x1b\u202e\u2028\ud800]", card)


@given(st.text(alphabet=st.one_of(st.sampled_from("`~\\|<>[]()!*_#-+&:@ \n\t\r"), st.characters())))
def test_every_text_survives_markdown(text: str) -> None:
    """A parser gets back what was put in, whatever it is."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (block,) = parser.parse(f"before\n\n{code_block(text)}\n\nafter")[3:-3]
    assert block.content.strip("\n") == clean(text).strip("\n")
    inline = [t for t in parser.parse(f"x {code_span(text)} y")[1].children or () if t.type != "text"]
    assert [t.type for t in inline] == ["code_inline"]
    shown = parser.parse(f"x {plain(text)} y")[1].children or ()
    assert {t.type for t in shown} <= {"text", "text_special"}
    assert "".join(t.content for t in shown) == f"x {' '.join(clean(text).split())} y"
    table = parser.parse(f"| a | b |\n| --- | --- |\n| {plain(text)} | b |\n")
    assert sum(t.type == "td_open" for t in table) == 2


def test_records_that_resmol_never_wrote_are_an_error(run: RunDir, tmp_path: Path) -> None:
    def forge(records: list[Record]) -> list[Record]:
        return [r | {"bits_per_byte": "low"} if r["kind"] == "eval" else r for r in records]

    rewrite(run, forge)
    with pytest.raises(DataError, match="cannot be put into words"):
        folder_of(run.path, tmp_path / "out")


def test_the_card_names_the_corpus_of_the_standard_library(
    tmp_path: Path, tiny_tokenizer: Tokenizer, run: RunDir
) -> None:
    inputs = [f"{STANDARD_LIBRARY} 3.11.7"]
    assert (corpus_of(inputs), corpus_of([SHAKESPEARE]), corpus_of(["mine.txt"]), corpus_of([])) == (
        "stdlib", "shakespeare", None, None,
    )  # fmt: skip
    data = open_dataset(Path(load_config(run.config).data.path)).manifest
    (facts,) = data.source.inputs
    named = data.model_copy(
        update={"source": data.source.model_copy(update={"inputs": (facts.model_copy(update={"name": inputs[0]}),)})}
    )
    loaded = load_model(run.path, device="cpu")
    (tmp_path / "training").mkdir()
    record = dataclasses.replace(write_record(loaded.source, tmp_path / "training"), data=named)
    text = model_card(loaded, exported_tokenizer(loaded), "float32", record)
    assert "resmol prepare data --corpus stdlib --val-fraction" in text
    assert "YOUR_TEXT" not in text
