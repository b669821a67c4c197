"""The page stands alone, shows what the ledger says, and lets no text of a sample do anything."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import TrainTiny, rewrite, step_record

from resmol.audit.plots import resumed_at, smoothed, thin
from resmol.audit.report import duration, summary_facts, write_loss_image, write_report
from resmol.data.shards import Dataset
from resmol.errors import DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, LedgerTampered

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m"


class Tags(HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture
def run(tmp_path: Path, train_tiny: TrainTiny) -> RunDir:
    for steps in (20, 25):
        train_tiny(tmp_path / "run", steps)
    return RunDir(tmp_path / "run")


def page_of(run: RunDir) -> tuple[str, Tags]:
    text = write_report(run).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    return text, tags


def test_the_page_stands_alone_and_says_what_happened(run: RunDir) -> None:
    text, tags = page_of(run)
    assert tags.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "object", "img"} & set(tags.tags)
    # Namespaces and the dublin core of an SVG are names, not requests; nothing is loaded from anywhere.
    assert all(
        not (value or "").startswith(("http", "//"))
        for name, value in tags.attributes
        if name in ("src", "href", "action")
    )
    assert "resume: step 20 verified, continuing at step 21" in text
    assert "resumed at 21" in text
    assert "step-00000025" in text


def test_text_of_a_sample_is_inert(run: RunDir) -> None:
    ledger = Ledger(run.ledger)
    ledger.append("sample", step=25, prompt="<b>", text=EVIL, seed=0)
    ledger.close()
    text, tags = page_of(run)
    assert "script" not in tags.tags
    assert "img" not in tags.tags
    assert "&lt;script&gt;alert(1)" in text


def test_claims_of_reproduce(run: RunDir) -> None:
    run.evidence.mkdir()
    check = {
        "name": "it <holds>",
        "passed": False,
        "measured": "m",
        "expected": "e",
        "evidence": str(run.ledger),
    }
    (run.evidence / "claims.json").write_text(json.dumps({"checks": [check]}))
    text, _ = page_of(run)
    assert "it &lt;holds&gt;" in text
    assert re.search(r'class="fail">FAIL', text)
    assert str(run.path) not in text.partition("<h2>Configuration")[0]


def test_claims_that_are_none_are_left_out(run: RunDir) -> None:
    run.evidence.mkdir()
    (run.evidence / "claims.json").write_text(json.dumps({"checks": [{}]}))
    assert "Claims" not in page_of(run)[0]


@pytest.mark.parametrize("torn", [b"", b'{"seq":'])
def test_a_run_of_one_step(run: RunDir, torn: bytes) -> None:
    run.ledger.unlink()
    ledger = Ledger(run.ledger)
    ledger.append("step", **step_record(1))
    ledger.close()
    run.ledger.write_bytes(run.ledger.read_bytes() + torn)
    text, tags = page_of(run)
    assert tags.tags.count("svg") == 4
    assert ("torn end" in text) is bool(torn)


def test_a_run_without_a_step(run: RunDir) -> None:
    run.ledger.write_bytes(b"")
    assert "No step has been recorded yet" in page_of(run)[0]


def test_a_long_run_is_thinned_but_keeps_its_ends(run: RunDir) -> None:
    run.ledger.unlink()
    ledger = Ledger(run.ledger)
    for step in range(1, 5051):
        ledger.append("step", **step_record(step))
    ledger.close()
    text, _ = page_of(run)
    assert len(text) < 3_000_000
    kept = thin([{"step": step} for step in range(1, 5051)])
    assert (kept[0]["step"], kept[-1]["step"]) == (1, 5050)
    assert len(kept) <= 1300


def test_tampered_or_missing(run: RunDir, tmp_path: Path) -> None:
    run.ledger.write_bytes(run.ledger.read_bytes().replace(b'"lr":', b'"lR":', 1))
    with pytest.raises(LedgerTampered):
        write_report(run)
    with pytest.raises(DataError):
        write_report(RunDir(tmp_path / "nowhere"))


def test_a_ledger_without_gradient_norms_is_an_error_in_words(run: RunDir) -> None:
    rewrite(run, lambda records: [{k: v for k, v in record.items() if k != "grad_norm"} for record in records])
    with pytest.raises(DataError, match="cannot be put into a report"):
        write_report(run)


def test_facts() -> None:
    facts = dict(summary_facts([{"kind": "step", "seq": step, **step_record(step)} for step in (1, 2)]))
    assert facts["tokens seen"].startswith("128 ")
    assert facts["tokens per second, median"] == "6,400"
    assert [duration(s) for s in (5.0, 65.0, 3700.0)] == ["5 s", "1 min 5 s", "1 h 1 min"]


def test_the_page_is_for_light_and_dark_phone_and_paper(run: RunDir) -> None:
    text, _ = page_of(run)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    used = set(re.findall(r"var\(--plot-(\w+), #", "".join(drawings)))
    assert used >= {"blue", "orange", "grey", "red", "ink", "axis", "grid"}
    for drawing in drawings:
        assert not re.search(r"(?<!, )#[0-9a-f]{6}", drawing), "a colour that is the same in the dark"
    dark = text.partition("prefers-color-scheme: dark")[2].partition("</style>")[0]
    assert used <= set(re.findall(r"--plot-(\w+): #", dark))
    assert all(part in text for part in ("details::details-content", "@page { size: A4", 'name="viewport"'))


def test_the_second_loss_curve_begins_after_the_fall(run: RunDir) -> None:
    losses = [10 - step / 10 if step < 60 else 4 - step / 1000 for step in range(1, 301)]
    run.ledger.unlink()
    ledger = Ledger(run.ledger)
    for step, loss in enumerate(losses, start=1):
        ledger.append("step", **step_record(step) | {"loss": loss})
    ledger.close()
    (first,) = re.findall(r"Loss from step (\d+) on", page_of(run)[0])
    assert 45 <= int(first) <= 60


def test_the_data_is_named(run: RunDir, tiny_dataset: Dataset) -> None:
    text, _ = page_of(run)
    source, train, val = tiny_dataset.manifest.source, tiny_dataset.manifest.train, tiny_dataset.manifest.val
    for fact in (source.inputs[0].name, source.inputs[0].sha256[:16], f"{train.tokens:,}", f"{val.documents:,}",
                 f"{val.tokens / (train.tokens + val.tokens):.1%}", tiny_dataset.fingerprint):  # fmt: skip
        assert fact in text, fact
    assert "seen 0." in text
    assert "Beyond about 4 epochs" not in text
    config = run.load_config().replace({"data.path": "nowhere"})
    run.write_config(config)
    assert "not at hand" in page_of(run)[0]


def test_many_epochs_are_warned_of(run: RunDir) -> None:
    assert_warned = {4.0: False, 4.5: True}
    for epochs, warned in assert_warned.items():
        rewrite(run, lambda records, e=epochs: [r | {"epoch": e} if r["kind"] == "step" else r for r in records])
        assert ("Beyond about 4 epochs" in page_of(run)[0]) is warned


def test_evidence_is_linked_where_it_lies(run: RunDir, tmp_path: Path) -> None:
    run.evidence.mkdir()
    (run.path / "a b.json").write_text("{}")
    checks = [
        {"name": "n", "passed": True, "measured": "m", "evidence": evidence}
        for evidence in ("old/evidence/claims.json", "run/a b.json", "run/evidence/missing.json", "/etc/passwd", "")
    ]
    (run.evidence / "claims.json").write_text(json.dumps({"checks": checks}))
    for page, folder in ((run.report, ""), (tmp_path / "elsewhere" / "page.html", "../run/")):
        page.parent.mkdir(exist_ok=True)
        tags = Tags()
        tags.feed(write_report(run, page).read_text(encoding="utf-8"))
        links = [value for name, value in tags.attributes if name == "href"]
        assert links == [f"{folder}evidence/claims.json", f"{folder}a%20b.json"]


def test_a_resume_that_led_to_no_step_is_not_marked() -> None:
    records = [
        {"kind": kind, "seq": seq, **facts}
        for seq, (kind, facts) in enumerate([
            ("step", {"step": 1}), ("step", {"step": 2}), ("resume", {"next_step": 3}), ("resume", {"next_step": 3}),
            ("step", {"step": 3}), ("step", {"step": 4}), ("resume", {"next_step": 5}), ("step", {"step": 5}),
            ("rewind", {"to_step": 1}), ("resume", {"next_step": 2}), ("step", {"step": 2}),
            ("step", {"step": 3}), ("step", {"step": 4}), ("step", {"step": 5}), ("resume", {"next_step": 6}),
        ])
    ]  # fmt: skip
    assert resumed_at(records[:8]) == [3, 5]
    assert resumed_at(records) == [2]


def test_smoothing() -> None:
    assert smoothed([3.0] * 5, 10) == pytest.approx([3.0] * 5), "no bias towards zero at the beginning"
    assert smoothed([0.0, 1.0], 3) == pytest.approx([0.0, 2 / 3])


def test_the_loss_curve_is_an_image_of_its_own(run: RunDir, tmp_path: Path) -> None:
    write_loss_image(run, tmp_path / "loss.svg")
    drawing = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    assert drawing.startswith("<svg")
    assert "resumed at 21" in drawing
    assert "held out" in drawing
    write_loss_image(run, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="neither"):
        write_loss_image(run, tmp_path / "loss.jpg")


def test_a_run_without_a_step_has_no_curve(run: RunDir, tmp_path: Path) -> None:
    rewrite(run, lambda records: records[:1])
    with pytest.raises(DataError, match="has not recorded a step"):
        write_loss_image(run, tmp_path / "loss.svg")
