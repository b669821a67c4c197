"""A published run is made again from its text alone; another text, and a step that was altered, are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TrainTiny, synthetic_texts

from resmol.audit.published_run import PublishedRun, digest_of, publish, redo
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.run.directory import RunDir
from resmol.train import portable


def test_a_published_run_is_made_again(
    tmp_path: Path, train_tiny: TrainTiny, tokenizer_in_cache: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "portability_problem", lambda: "")  # test_portable.py sees to the bits
    text, other, file = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "record.json"
    text.write_text("".join(synthetic_texts(60)), encoding="utf-8", newline="\n")
    other.write_text("".join(synthetic_texts(60, seed=1)), encoding="utf-8", newline="\n")
    train_tiny(tmp_path / "machine", 2, data=str(text))
    with pytest.raises(UsageError, match="determinism is not portable"):
        publish(RunDir(tmp_path / "machine"))
    train_tiny(tmp_path / "run", 5, "runtime.determinism=portable", data=str(text))
    publish(RunDir(tmp_path / "run")).write(file)

    published = PublishedRun.read(file)
    assert published.config["tokenizer.sha256"] == tokenizer_in_cache.sha256
    elsewhere = published.model_copy(update={"machines": ({"processor": "another"},)})
    assert published.seen_again(published) == published
    assert published.seen_again(elsewhere).machines == (*published.machines, {"processor": "another"})
    with pytest.raises(UsageError, match="another run: its steps differs"):
        published.seen_again(published.model_copy(update={"steps": published.steps[:4]}))
    again = [check.measured for check in redo(published, [str(text)])]
    assert again[1] == f"PASS: 5 steps, digest {published.digest[:16]} as published"
    assert [check.measured.split()[0] for check in redo(published, [str(other)])] == ["FAIL:"]
    assert redo(published, strict=True)[0].measured.startswith("UNSUPPORTED: recorded and not at hand")

    norm = published.steps[2].split()[1]
    steps = [step.replace(norm, "00000000") for step in published.steps]
    forged = published.model_copy(update={"steps": tuple(steps), "digest": digest_of(steps)})
    found = redo(forged, [str(text)])[1]
    assert not found.passed
    assert found.measured == f"FAIL at step 3: grad_norm_bits is {norm}, published is 00000000"
    published.model_copy(update={"steps": tuple(steps)}).write(file)
    with pytest.raises(DataError, match="its digest is not that of its steps"):
        PublishedRun.read(file)


@pytest.mark.parametrize("steps", [100, 300])
def test_the_records_of_this_repository_are_whole_and_agree(steps: int) -> None:
    """`make quickstart` makes the shorter one again; here it is too slow."""
    folder = Path(__file__).resolve().parents[2] / "records"
    published = PublishedRun.read(folder / f"nano-{steps}.json")
    assert len(published.steps) == steps
    assert published.command.startswith(f"resmol train RUN --data DATA --steps {steps} --preset nano")
    assert published.steps[:100] == PublishedRun.read(folder / "nano-100.json").steps
