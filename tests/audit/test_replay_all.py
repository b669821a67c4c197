"""A complete replay confirms an honest run and names the first place at which a forged one is not what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import TrainTiny, change_weight, rewrite, synthetic_texts

from resmol.audit import replay_progress, segment
from resmol.audit.audit import audit, audit_run
from resmol.audit.certificate import REPLAYED, certificate
from resmol.audit.replay_all import CompleteReplay
from resmol.checks import Check, all_passed
from resmol.data.resolve import Text
from resmol.data.shards import open_dataset
from resmol.data.text_file import ReadOptions
from resmol.errors import Interrupted, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record
from resmol.system.atomic_io import file_sha256

STEPS = ["replay of steps 1 to 5", "replay of steps 6 to 10", "replay of steps 11 to 12"]
STAGES = ["raw text", "tokenisation", "initial weights", *STEPS, "complete replay"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def run(finished: Path, train_tiny: TrainTiny, tmp_path: Path, own_cache: Path) -> RunDir:
    """A copy of a run of 12 steps, resumed once, from a text beside it; checkpoints at 5, 10, 12."""
    text = finished.with_name("input.jsonl")
    if not finished.exists():
        text.write_text("".join(json.dumps({"body": one}) + "\n" for one in synthetic_texts(60)), encoding="utf-8")
        for steps in (10, 12):
            train_tiny(finished, steps, data=Text((str(text),), options=ReadOptions(text_field="body")))
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(text, tmp_path)
    return RunDir(tmp_path / "run")


def replayed(run: RunDir, *, jobs: int = 1, strict: bool = True) -> dict[str, Check]:
    """Replay all of a run, from the text beside it."""
    options = CompleteReplay((str(run.path.with_name("input.jsonl")),), jobs, None, strict)
    checks = audit(run, replay_options=options)
    return {check.name: check for check in checks if check.name in (*STAGES, "data")}


def executed_steps(monkeypatch: pytest.MonkeyPatch, *, stop_at: int | None = None) -> list[int]:
    """Return the steps that are executed from now on, as they come; Ctrl-C arrives before one of them."""
    steps: list[int] = []
    original = segment.train_step

    def counted(state, *arguments):
        if state.step + 1 == stop_at:
            raise KeyboardInterrupt
        steps.append(state.step + 1)
        return original(state, *arguments)

    monkeypatch.setattr(segment, "train_step", counted)
    return steps


def test_an_honest_run_is_made_again(run: RunDir, own_cache: Path) -> None:
    checks = replayed(run)
    assert list(checks) == STAGES
    assert all(check.measured.startswith("PASS") for check in checks.values()), checks
    assert "input.jsonl: " in checks["raw text"].measured
    assert "tensors of step-00000010" in checks[STEPS[1]].measured
    assert "12 of 12 steps, 3 segments" in checks["complete replay"].measured
    issued = certificate(run, [*checks.values()])
    assert (issued["replay"], REPLAYED["complete"] in issued["limits"]) == ("complete", True)
    assert list((own_cache / "replays").iterdir()) == [], "nothing is left to be believed"


def _swap_steps(run: RunDir) -> None:
    fields = ("loss", "loss_bits", "grad_norm", "grad_norm_bits")

    def swap(records: list[Record]) -> list[Record]:
        pair = [record for record in records if record["kind"] == "step" and record["step"] in (7, 8)]
        kept = [{name: record[name] for name in fields} for record in pair]
        for record, other in zip(pair, reversed(kept), strict=True):
            record.update(other)
        return records

    rewrite(run, swap)


def _seed(run: RunDir) -> None:
    """Another seed of the initial weights, in every place that states it."""
    config = run.load_config().replace({"train.seed": 5})
    run.write_config(config)

    def forge(records: list[Record]) -> list[Record]:
        records[0]["config"] = config.bound_fields()
        return [{**r, "config_sha256": config.sha256} if "config_sha256" in r else r for r in records]

    rewrite(run, forge)


def _token(run: RunDir) -> None:
    """One token of a shard, with manifest, fingerprint and every record made to fit."""
    shard = run.data / "train" / "00000.ds"
    tokens = np.fromfile(shard, dtype="<u2")
    tokens[100] ^= 1
    tokens.tofile(shard)
    manifest = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))
    manifest["train"]["shards"][0]["sha256"] = file_sha256(shard)
    (run.data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    fingerprint = open_dataset(run.data).fingerprint
    rewrite(run, lambda records: [
        {**r, "data_fingerprint": fingerprint} if "data_fingerprint" in r else r for r in records
    ])  # fmt: skip


def _damage(run: RunDir) -> None:
    shard = run.data / "train" / "00000.ds"
    tokens = np.fromfile(shard, dtype="<u2")
    tokens[100] ^= 1
    tokens.tofile(shard)


def _text(run: RunDir) -> None:
    text = run.path.with_name("input.jsonl")
    text.write_text(text.read_text(encoding="utf-8").replace("ka", "lo", 1), encoding="utf-8")


FORGERIES: dict[str, tuple[Callable[[RunDir], None], str, str]] = {
    "the seed": (_seed, STEPS[0], "FAIL at step 1: loss_bits is"),
    "two steps exchanged": (_swap_steps, STEPS[1], "FAIL at step 7: loss_bits is"),
    "a weight": (
        lambda run: change_weight(run, 5),
        STEPS[0],
        "FAIL: model.safetensors/model.norm.weight differs from step-00000005",
    ),
    "a token": (_token, "tokenisation", "FAIL: train/00000.ds has sha256"),
    "a shard without its manifest": (_damage, "data", "00000.ds cannot be used: its sha256 is not the one"),
    "the text": (_text, "raw text", "FAIL: input.jsonl ("),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_found_where_it_is(run: RunDir, name: str) -> None:
    """All that carries a hash of what was changed is made to fit, so that no other check finds it."""
    forge, stage, words = FORGERIES[name]
    forge(run)
    assert all_passed(audit(run))
    checks = replayed(run)
    assert words in checks[stage].measured
    assert [name for name, check in checks.items() if not check.passed] == [stage, "complete replay"][: len(checks)]
    until = ["data"] if stage == "data" else [*STAGES[: STAGES.index(stage) + 1], "complete replay"]
    assert list(checks) == until, "the first difference ends the replay"


def test_without_the_text_nothing_is_claimed_about_it(run: RunDir) -> None:
    checks = {check.name: check for check in audit_run(run.path, replay="all")}
    assert "recorded and not at hand: input.jsonl (" in checks["raw text"].measured
    assert checks["raw text"].measured.endswith("say where it is: --input PATH")
    assert checks["complete replay"].measured.startswith("UNSUPPORTED: not judged here: raw text, tokenisation; 12 of")
    assert checks["complete replay"].passed
    assert not {check.name: check for check in audit_run(run.path, replay="all", strict=True)}["raw text"].passed
    with pytest.raises(UsageError, match=r"a\.txt is none of the inputs"):
        audit_run(run.path, replay="all", inputs=["a.txt", "b.txt"])


def test_an_interrupted_replay_goes_on(run: RunDir, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_progress, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(replay_progress, "SAVE_COST", 1e9)
    with monkeypatch.context() as patch:
        steps = executed_steps(patch, stop_at=8)
        with pytest.raises(Interrupted):
            replayed(run)
        assert steps == [*range(1, 8)]
    with monkeypatch.context() as patch:
        steps = executed_steps(patch)
        checks = replayed(run)
        assert steps == [*range(8, 13)]
        assert all(check.passed for check in checks.values())
        assert checks[STEPS[0]].measured.endswith("of step-00000005 (in an earlier call)")


def test_another_ledger_begins_again(run: RunDir, train_tiny: TrainTiny, tmp_path: Path, monkeypatch) -> None:
    """Notes bind the head: what passed for one ledger says nothing about another."""
    options = CompleteReplay((), 1, tmp_path / "kept")
    with monkeypatch.context() as patch:
        executed_steps(patch, stop_at=12)
        with pytest.raises(Interrupted):
            audit(run, replay_options=options)
    rewrite(run, lambda records: [{**record, "time": "2030"} for record in records])
    steps = executed_steps(monkeypatch)
    audit(run, replay_options=options)
    assert steps == [*range(1, 13)]


@pytest.mark.slow  # three processes import PyTorch
def test_segments_in_processes_of_their_own(run: RunDir) -> None:
    _swap_steps(run)
    checks = replayed(run, jobs=2)
    assert checks[STEPS[0]].passed
    assert checks[STEPS[1]].measured.startswith("FAIL at step 7: loss_bits is")
    assert STEPS[2] not in checks, "the first difference ends the replay"


def test_a_change_between_checkpoints_is_followed(run: RunDir, train_tiny: TrainTiny) -> None:
    """The checkpoint at which the batch changed is gone: the state is handed over as that checkpoint did."""
    train_tiny(run.path, 14, "batch.micro_batch_size=4", data=None, accept_drift=["batch.micro_batch_size"])
    shutil.rmtree(run.checkpoints / "step-00000012")
    options = CompleteReplay((str(run.path.with_name("input.jsonl")),))
    checks = {check.name: check for check in audit(run, replay_options=options)}
    assert checks["replay of steps 11 to 14"].measured.startswith("PASS"), checks
