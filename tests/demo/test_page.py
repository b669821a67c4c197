"""What the function behind the page answers, and what the page says about the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import rewrite

from resmol.checks import Check
from resmol.demo.page import answer, heading, record_page
from resmol.demo.provenance import provenance_of
from resmol.demo.request_limits import Limits, parse
from resmol.errors import CheckpointError, UsageError
from resmol.interop.export import export_gguf
from resmol.interop.load import LoadedModel, load_model
from resmol.run.checkpoint_manifest import read_manifest
from resmol.run.directory import RunDir

VALUES: list[Any] = ["ka lo", 20, 0.8, 0.95, 50, 3, False, 1.0]


def test_the_answer_is_what_generate_says(demo_model: LoadedModel) -> None:
    found = list(answer(demo_model, parse(VALUES, Limits()), Limits(), lambda: True))
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 3}
    assert found[-1][0] == "ka lo" + demo_model.generate("ka lo", **options)
    assert "20 tokens" in found[-1][1]
    assert "tokens/s" in found[-1][1]


def test_it_stops_when_nobody_listens(demo_model: LoadedModel) -> None:
    computed: list[int] = []
    listening = iter([True, True, False])
    stream = demo_model.stream

    class Counting(LoadedModel):
        def stream(self, prompt: str, sampling: Any, **_: Any) -> Any:
            return stream(prompt, sampling, on_token=computed.append)

    counting = Counting(demo_model.model, demo_model.source, demo_model.find_tokenizer)
    list(
        answer(counting, parse(["ka", 500, 0.8, 0.95, 50, 3, False, 1.0], Limits()), Limits(), lambda: next(listening))
    )
    assert len(computed) < 20


def test_a_text_that_fills_the_context_did_not_end(demo_model: LoadedModel) -> None:
    prompt = "9" * 1015  # each digit is a token; the context is 1024
    found = list(
        answer(
            demo_model,
            parse([prompt, 500, 0.8, 0.95, 50, 3, False, 1.0], Limits(prompt_chars=2000)),
            Limits(prompt_chars=2000),
            lambda: True,
        )
    )
    assert "context full" in found[-1][1]


def test_it_stops_after_its_time(demo_model: LoadedModel) -> None:
    found = list(
        answer(
            demo_model,
            parse(["ka", 500, 0.8, 0.95, 50, 3, False, 1.0], Limits(seconds=0.0)),
            Limits(seconds=0.0),
            lambda: True,
        )
    )
    assert "the limit of this demo" in found[-1][1]
    assert "500 tokens" not in found[-1][1]


def test_a_prompt_beyond_the_context_is_refused(demo_model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="context is 1,024"):
        list(answer(demo_model, parse(["9" * 2000, *VALUES[1:]], Limits()), Limits(), lambda: True))


def test_a_checkpoint_is_named(demo_run: Path, demo_model: LoadedModel) -> None:
    found = provenance_of(demo_model)
    checkpoint = demo_run / "checkpoints" / "step-00000012"
    assert (found.step, found.sha256) == (12, read_manifest(checkpoint).sha256)
    page = heading(demo_model, found)
    assert "step 12" in page
    assert found.sha256[:16] in page
    assert "tiny-run" in page


def test_an_export_knows_its_step_and_brings_its_record(demo_space: Path) -> None:
    found = provenance_of(load_model(demo_space / "model"))
    assert found.step == 12
    page = record_page(found)
    assert page.count("<svg") == 4
    assert "it &lt;generates&gt;" in page
    assert "<code>ledger.jsonl</code>" in page
    assert not {"{", "$", "`"} & set(page), "Gradio would take it for a template"


def test_other_weights_than_the_exported_are_refused(demo_space: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_space / "model", tmp_path / "model"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # another last bit of a number's exponent: a valid file of other weights
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="lists weights"):
        provenance_of(load_model(folder))


def test_weights_without_a_record_say_so(demo_space: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_space / "model", tmp_path / "model"))
    shutil.rmtree(folder / "training")
    (folder / "manifest.json").unlink()
    found = provenance_of(load_model(folder))
    assert (found.step, found.record) == (None, None)
    assert "not trained by resmol" in found.title
    assert "No record" in record_page(found)


def test_a_forged_record_is_not_shown(demo_run: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(demo_run, tmp_path / "tiny-run")))
    rewrite(run, lambda records: records)
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join([*lines[:3], lines[4].replace(b"0", b"1"), *lines[4:]]))
    page = record_page(provenance_of(load_model(run.path / "checkpoints" / "step-00000012")))
    assert "does not hold together" in page
    assert "<svg" not in page


def test_a_record_that_resmol_never_wrote_is_not_shown(demo_run: Path, tmp_path: Path) -> None:
    """Its chain holds, but its steps have no gradient norm."""
    run = RunDir(Path(shutil.copytree(demo_run, tmp_path / "tiny-run")))
    rewrite(run, lambda records: [{k: v for k, v in record.items() if k != "grad_norm"} for record in records])
    page = record_page(provenance_of(load_model(run.path / "checkpoints" / "step-00000012")))
    assert "none that resmol wrote" in page
    assert "<svg" not in page


@pytest.mark.parametrize("name", ["", "tiny-run-F32.gguf"])
def test_a_gguf_export_knows_its_step_and_brings_its_record(
    demo_run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmol.interop.export.gguf.compare_gguf", lambda *_: [Check("logits", True, "equal", "equal")])
    out = export_gguf(demo_run, tmp_path / "out", dtype="float32").path
    found = provenance_of(load_model(out / name))
    assert (found.title, found.step) == ("tiny-run", 12)
    assert record_page(found).count("<svg") == 4
    file = out / "tiny-run-F32.gguf"
    other = file.rename(out / "other.gguf")
    assert "not trained by resmol" in provenance_of(load_model(other)).title
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="lists weights"):
        provenance_of(load_model(file))
