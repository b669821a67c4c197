"""A run of three sources: killed, resumed, on two ranks, audited and replayed; and each way to ask for a wrong one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_equal_runs
from tiny import TrainTiny, rewrite, synthetic_texts

from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.checks import Check, all_passed
from resmol.config.load import load_config
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError, DataError, ResmolError, UsageError
from resmol.interop.evaluate import evaluate_model
from resmol.run.checkpoint_manifest import open_checkpoint
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.train.build import make_loader
from resmol.train.evaluate import evaluate
from resmol.train.parallel import Runtime
from resmol.train.start import train_model
from resmol.train.step import TrainState

SIZES = {"web": 60, "code": 25, "math": 12}
STAGES = """
[[data.source]]
path = "texts/web"
[[data.source]]
path = "texts/code"
max_epochs = 3
[[data.source]]
path = "texts/math"
max_epochs = 2.5
[[data.stage]]
start = 1
weights = { web = 3, code = 1 }
[[data.stage]]
start = 8
weights = { web = 0.5, code = 0.2, math = 0.3 }
"""
STEPS = 14
QUIET = ("sampling.every=0", "evaluation.every=7", "checkpoint.every=5")
Train = Callable[..., TrainState]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Three prepared folders of different sizes."""
    folder = tmp_path_factory.mktemp("sources") / "texts"
    for seed, (name, size) in enumerate(SIZES.items()):
        prepare(folder / name, from_texts(synthetic_texts(size, seed=seed)), tiny_tokenizer, val_fraction=0.1)
    return folder


@pytest.fixture
def project(tmp_path: Path, texts: Path) -> Path:
    shutil.copytree(texts, tmp_path / "texts")
    return tmp_path


@pytest.fixture
def configured(project: Path, tiny_config: RunConfig) -> Callable[[str], Path]:
    """Write a configuration with the tables that a test says, and return its file."""

    def write(tables: str) -> Path:
        (project / "base.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
        (project / "mix.toml").write_text(f'base = "base.toml"\n{tables}', encoding="utf-8")
        return project / "mix.toml"

    return write


@pytest.fixture
def train(project: Path, configured: Callable[[str], Path], tiny_tokenizer: Tokenizer) -> Train:
    """Start or resume ``project/NAME``."""

    def start_or_resume(
        name: str, steps: int | None, *overrides: str, tables: str = STAGES, **options: Any
    ) -> TrainState:
        config = load_config(configured(tables))
        wanted = [*QUIET, *([f"train.steps={steps}"] if steps else []), *overrides]
        return train_model(config, project / name, overrides=wanted, tokenizer=tiny_tokenizer.path, **options)

    return start_or_resume


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def replayed(run: RunDir) -> list[Check]:
    return audit(run, strict=True, replay_options=ReplayOptions(9, strict=True))


KILLED = """
import os, signal, sys
from resmol.train import start, step
genuine = step.train_step
def dying(state, *arguments):
    if state.step == 11 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(state, *arguments)
step.train_step = dying
start.train_model(None, sys.argv[1], overrides=["train.steps=14"])
"""


def test_killed_on_two_ranks_and_resumed_on_one_is_the_uninterrupted_run(project: Path, train: Train) -> None:
    """From step 5 inside a stage, over the border of the next, and from its fourth step again."""
    train("straight", STEPS)
    train("run", 5)
    (project / "killed.py").write_text(KILLED, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(project / "killed.py"), str(project / "run")], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "-9" in done.stderr, done.stderr[-3000:]
    train("run", STEPS)
    assert_equal_runs(project / "run", project / "straight", STEPS)
    records = read_ledger(project / "run" / "ledger.jsonl").records
    (rewind,) = select(records, "rewind")
    assert rewind["from_step"] == 11
    assert rewind["to_step"] in (5, 10)  # the save of step 10 may not have been durable yet
    assert [r["environment"]["world_size"] for r in records if r["kind"] in ("start", "resume")] == [1, 2, 1]
    assert all_passed(audit(RunDir(project / "run"), strict=True))


def test_the_record_says_how_much_of_each_source_was_read(
    project: Path, train: Train, texts: Path, tiny_tokenizer: Tokenizer
) -> None:
    state = train("run", STEPS, "data.document_mask=false", "evaluation.windows=0")
    run = RunDir(project / "run")
    records = read_ledger(run.ledger).records
    steps = effective_steps(records)
    start = next(select(records, "start"))
    assert [(one["name"], one["fingerprint"]) for one in start["sources"]] == [
        (name, open_dataset(texts / name).fingerprint) for name in SIZES
    ]
    assert steps[7]["sources_seen"] == [21, 7, 0]
    assert steps[14]["sources_seen"] == [21 + 14, 7 + 6, 8]  # of 28 windows 14, 5.6 and 8.4
    assert all(sum(record["sources_tokens"]) == record["tokens"] for record in steps.values())
    assert all(sum(record["sources_seen"]) == record["windows_seen"] for record in steps.values())
    saved = open_checkpoint(run.checkpoints / "step-00000010").state.mixture
    assert saved is not None
    assert (list(saved.seen), saved.stage.start) == (steps[10]["sources_seen"], 8)
    assert all_passed(replayed(run))
    newest = list(select(records, "eval"))[-1]
    config, lengths = load_config(run.config), tiny_tokenizer.byte_lengths()
    runtime = Runtime.single(torch.device("cpu"))
    for name in SIZES:
        alone = make_loader(config, open_dataset(texts / name).val).sequential(1)
        wanted = evaluate(state.model, alone, lengths, runtime).loss
        assert newest["source_losses"][name] == pytest.approx(wanted, rel=1e-6)
    assert f"math {newest['source_losses']['math']:.4f}" in run.log.read_text(encoding="utf-8")
    measured = {record["step"]: record["loss"] for record in select(records, "eval")}
    assert evaluate_model(run.path, windows=0)["loss"] == pytest.approx(measured[state.step], rel=1e-6)


def test_a_forged_count_and_an_exchanged_source_are_found(
    project: Path, train: Train, tiny_tokenizer: Tokenizer
) -> None:
    train("run", STEPS)
    run = RunDir(project / "run")
    genuine = run.ledger.read_bytes()

    def forge(records: list[Record]) -> list[Record]:
        step = next(record for record in records if record.get("step") == 9)
        step["sources_seen"] = [step["sources_seen"][0] - 1, step["sources_seen"][1] + 1, step["sources_seen"][2]]
        return records

    rewrite(run, forge)
    assert "step 9 states other windows" in next(c.measured for c in audit(run) if c.name == "data order")
    run.ledger.write_bytes(genuine)
    code = project / "texts" / "code"
    code.rename(project / "moved")
    prepare(code, from_texts(synthetic_texts(25, seed=7)), tiny_tokenizer, val_fraction=0.1)
    assert failed(replayed(run)) == ["data order", "replay"]
    with pytest.raises(ConfigError, match="the source code has fingerprint"):
        train("run", STEPS + 1)


def test_what_moved_together_is_found(project: Path, train: Train) -> None:
    train("runs/a", 3)
    (project / "elsewhere").mkdir()
    for name in ("runs", "texts"):
        (project / name).rename(project / "elsewhere" / name)
    moved = project / "elsewhere" / "runs" / "a"
    assert train_model(None, moved, overrides=["train.steps=5"]).step == 5
    assert all_passed(audit(RunDir(moved), strict=True))


def test_other_weights_and_a_new_source_are_a_recorded_drift(project: Path, train: Train) -> None:
    """A crash after the drift takes the run back to a checkpoint of the former mixture; the new one begins anew."""
    two = STAGES.replace('[[data.source]]\npath = "texts/math"\nmax_epochs = 2.5\n', "").replace(", math = 0.3", "")
    train("run", 6, tables=two)
    train("straight", 6, tables=two)
    wanted = STAGES.replace("code = 1 }", "code = 2, math = 1 }")
    with pytest.raises(ConfigError, match=r"data\.stage \(class B\).*math") as caught:
        train("run", STEPS, tables=wanted)
    assert "--accept-drift data.stage" in caught.value.fix
    for name, stops in (("run", (7, STEPS)), ("straight", (STEPS,))):
        for stop in stops:
            train(name, stop, "checkpoint.every=0", tables=wanted, accept_drift=["data.stage"])
            if stop == 7:
                shutil.rmtree(project / name / "checkpoints" / "step-00000007")
    assert_equal_runs(project / "run", project / "straight", STEPS)
    records = read_ledger(project / "run" / "ledger.jsonl").records
    (drift,) = select(records, "drift")
    assert [one["name"] for one in drift["sources"]] == list(SIZES)
    assert effective_steps(records)[7]["sources_seen"] == [18 + 2, 6 + 2, 0]  # of 4 windows 2, 1.33 and 0.67
    assert failed(replayed(RunDir(project / "run"))) == []
    swapped = STAGES.replace("texts/web", "texts/x").replace("texts/code", "texts/web").replace("texts/x", "texts/code")
    with pytest.raises(ConfigError, match="source 1 of this run is web; now it is code"):
        train("run", STEPS, tables=swapped, accept_drift=["data.stage"])


SOURCES = '[[data.source]]\npath = "texts/web"\nweight = 3\n[[data.source]]\npath = "texts/math"\nweight = {}\n'


@pytest.mark.parametrize(
    ("tables", "problem"),
    {
        "no source": ("[data]\nsource = []", "source is an empty list"),
        "no weight": (SOURCES.replace("weight = {}", ""), "the source math has no weight"),
        "zero": (SOURCES.format(0), r"weights\.math: Input should be greater than 0 \(given: 0\)"),
        "negative": (SOURCES.format(-1), r"weights\.math: Input should be greater than 0 \(given: -1\)"),
        "infinite": (SOURCES.format("inf"), r"weights\.math: Input should be a finite number"),
        "not a number": (SOURCES.format("nan"), r"weights\.math: Input should be a finite number"),
        "the same path": (
            SOURCES.format(1).replace("texts/math", 'texts/../texts/web"\nname = "b'),
            "two sources read .*web",
        ),
        "the same name": (SOURCES.format(1).replace("texts/math", "other/web"), "two sources are called web"),
        "no name": (SOURCES.format(1).replace("texts/math", "my texts"), "'my texts' is no name for a source"),
        "max_epochs 0": (SOURCES.format("1\nmax_epochs = 0"), "max_epochs: Input should be greater than 0"),
        "path as well": (f'[data]\npath = "x"\n{SOURCES.format(1)}', r"path \(x\) and \[\[data.source\]\] both"),
        "weights twice": (SOURCES.format(1) + "[[data.stage]]\nstart = 1\nweights = { web = 1 }", "leave `weight` out"),
        "out of order": (STAGES.replace("start = 8", "start = 1"), r"stages start at steps \[1, 1\]"),
        "late": (STAGES.replace("start = 1", "start = 2"), r"stages start at steps \[2, 8\]"),
        "unknown": (
            STAGES.replace("code = 1", "cod = 1"),
            "a weight for cod, which is none of the sources web, code, math",
        ),
        "stages alone": ("[[data.stage]]\nstart = 1\nweights = { web = 1 }", r"there is no \[\[data.source\]\]"),
    }.values(),
)
def test_a_table_that_is_wrong_has_a_sentence(configured: Callable[[str], Path], tables: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(configured(tables))


def test_what_cannot_be_mixed_does_not_start(project: Path, train: Train, tiny_tokenizer: Tokenizer) -> None:
    """Each has a sentence, and leaves no run behind."""
    prepare(project / "texts" / "short", from_texts(["ka"]), tiny_tokenizer, val_fraction=0.0)
    words = json.loads(tiny_tokenizer.data)
    words["added_tokens"][0]["special"] = False
    other = Tokenizer(json.dumps(words).encode(), project / "other.json")
    prepare(project / "texts" / "foreign", from_texts(synthetic_texts(25)), other)

    def refused(kind: type[ResmolError], match: str, change: tuple[str, str] = ("", ""), **options: Any) -> str:
        with pytest.raises(kind, match=match) as caught:
            train("run", options.pop("steps", 3), tables=STAGES.replace(*change), **options)
        assert not (project / "run").exists()
        return caught.value.fix

    refused(
        DataError, "code: the text has . tokens; a window of 16 needs 17", ("texts/code", 'texts/short"\nname = "code')
    )
    refused(
        DataError,
        "sources web and code were prepared with different tokenizers",
        ("texts/code", 'texts/foreign"\nname = "code'),
    )
    refused(DataError, "not a prepared data folder", ("texts/code", 'texts/nothing"\nname = "code'))
    refused(UsageError, "--data names a text, and the configuration a mixture", data=str(project / "texts" / "web"))
    refused(UsageError, "--epochs counts passes over one text", steps=None, epochs=1.0)
    fix = refused(ConfigError, r"the source web .*, and its max_epochs is 1", steps=400)
    last = int(fix.rpartition("train for ")[2].partition(" ")[0])
    assert train("run", 1, f"train.steps={last}", "evaluation.every=0", "checkpoint.every=0").step == last
    seen = effective_steps(read_ledger(project / "run" / "ledger.jsonl").records)[last]["sources_seen"][0]
    assert 0 <= next(iter(open_recorded_sizes(project / "run"))) - seen <= 4
    with pytest.raises(ConfigError, match=r"the source web .*, and its max_epochs is 1"):
        train("run", last + 2)


def open_recorded_sizes(run: Path) -> list[int]:
    start = next(select(read_ledger(run / "ledger.jsonl").records, "start"))
    return [source["windows"] for source in start["sources"]]


def test_a_run_of_one_text_does_not_become_a_mixture(project: Path, train: Train, train_tiny: TrainTiny) -> None:
    train_tiny(project / "run", 2)
    with pytest.raises(ConfigError, match="reads one text, and the configuration asks for a mixture of 3"):
        train("run", 4, accept_drift=["data.stage"])
