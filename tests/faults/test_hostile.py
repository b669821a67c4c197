"""Rows G1 to G8: files made to do harm, and secrets that must not come out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from campaign import Campaign
from hostile import (
    all_files,
    bomb,
    fuzz,
    load_as_what_it_is,
    load_dcp,
    mutated,
    mutated_json,
    pickles,
    read_each,
    run_commands,
    tar_of,
    zip_with_links,
)
from safetensors.torch import load_file
from test_corruption import forget, rehash
from trials import TENSOR_FILES, Forks, Setting, command_arguments, train_run
from waiting import HANGS

import resmol
from resmol.config.load import load_config
from resmol.config.model_config import read_model_config
from resmol.data.shards import Dataset, open_dataset
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import NetworkError
from resmol.interop.gguf_header import read_gguf_header
from resmol.interop.gguf_names import gguf_config
from resmol.interop.hf_folder import find_weights
from resmol.interop.load import load_model
from resmol.model.llama import CausalLM
from resmol.run.checkpoint_manifest import STATE, WEIGHTS, checkpoint_name, newest_valid, open_checkpoint
from resmol.run.ledger import canonical, effective_steps, read_ledger, select
from resmol.system.hub_download import require_answer
from resmol.system.pypi_download import extract_member
from resmol.system.safetensors_header import read_header
from resmol.train.optimizer import build_optimizer
from resmol.train.resume import restore
from resmol.train.step import TrainState

MIB = 1 << 20
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def trained(forks: Forks, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert forks.run(train_run, run, setting, "train.steps=10") == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def sound(trained: Path, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as Hugging Face's tools write it."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    folder.mkdir()
    checkpoint = newest_valid(trained / "checkpoints", {})[0].path
    for name in (WEIGHTS, "config.json"):
        shutil.copy(checkpoint / name, folder / name)
    shutil.copy(setting.tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of the model folder."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def outcomes_of(forks: Forks, folder: Path, commands: list[list[str]], **options: Any) -> list[Outcome]:
    """Run command lines in a child, and return what became of each."""
    folder.mkdir(exist_ok=True)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    code = forks.run(run_commands, commands, report, timeout=900, **options)
    assert code == 0, f"the child ended with {code}"
    outcomes: list[Outcome] = json.loads(report.read_bytes())
    return outcomes


def refusals(commands: list[list[str]], outcomes: list[Outcome], what: str, codes: Iterable[int]) -> list[str]:
    """Every command must have ended with an error of ours: one of the exit codes, and no traceback."""
    return [
        f"{what}: resmol {' '.join(command)}: exit code {outcome['code']}: {outcome['output'][-400:]}"
        for command, outcome in zip(commands, outcomes, strict=True)
        if outcome["code"] not in codes or "Traceback" in outcome["output"]
    ]


def loading(source: Path) -> list[list[str]]:
    """Return all commands that load weights."""
    return [
        ["evaluate", str(source), "--data", __file__],
        ["generate", str(source), "--prompt", "ka", "--max-new-tokens", "2"],
        ["verify", "--weights", str(source)],
        ["export", str(source), "exported"],
    ]


# --- G1, G2: what would run code when it is read ---------------------------------------------------------------

PICKLE_NAMES = (
    "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "consolidated.00.pth", "training_args.bin",
    "model.gguf", "model.npy", "model.zip", "model.tar",
)  # fmt: skip


def test_g1_pickles(
    campaign: Campaign, forks: Forks, setting: Setting, sound: Path, trained: Path, tmp_path: Path
) -> None:
    """Twelve gadgets, under every name, for every command that reads the file; the canary must stay absent."""
    canary = tmp_path / "canary"
    gadgets = pickles(canary)
    assert len(gadgets) == 12
    for kind, content in gadgets.items():  # the control: each of them does work
        assert forks.run(load_as_what_it_is, kind, content) == 0
        assert canary.exists(), f"{kind} is harmless"
        canary.unlink()
    draw, problems, tried = campaign.draw("G1"), [], 0
    chosen = gadgets if campaign.full else {kind: gadgets[kind] for kind in draw.sample(sorted(gadgets), 3)}
    for number, (kind, content) in enumerate(chosen.items()):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        must_refuse, may_pass = pickle_commands(work, content, sound, trained, setting, campaign.full, draw)
        if not campaign.full:
            must_refuse, may_pass = draw.sample(must_refuse, 10), draw.sample(may_pass, 4)
        outcomes = outcomes_of(forks, work, [*must_refuse, *may_pass])
        problems += refusals(must_refuse, outcomes[: len(must_refuse)], kind, (1, 2, 3, 65))
        problems += refusals(may_pass, outcomes[len(must_refuse) :], kind, (0, 1, 2, 3, 65))
        if canary.exists():
            problems.append(f"{kind}: it was executed")
            canary.unlink()
        tried += len(outcomes)
        shutil.rmtree(work)
    campaign.record(
        "G1", "pickles under every name", "refused, never unpickled: the canary is absent", problems, tried,
        exhaustive=campaign.full, note=f"{len(chosen)} gadgets, each known to work",
    )  # fmt: skip


def pickle_commands(
    work: Path, content: bytes, sound: Path, trained: Path, setting: Setting, full: bool, draw: Random
) -> tuple[list[list[str]], list[list[str]]]:
    """Put the file into every place where something is read; return what must be refused, and what need not be."""
    must_refuse, may_pass = [], []
    for name in PICKLE_NAMES if full else draw.sample(PICKLE_NAMES, 2):
        folder = Path(shutil.copytree(sound, work / f"folder-{name}"))
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)
        commands = [*loading(folder), *loading(folder / name)]
        must_refuse += commands if full else draw.sample(commands, 2)
        may_pass += [["inspect", str(folder)], ["inspect", str(folder / name)]]
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json"):
        folder = Path(shutil.copytree(sound, work / f"as-{name}"))
        if name != "config.json":
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)
        must_refuse += [*(loading(folder) if full else loading(folder)[1:2]), ["inspect", str(folder)]]
    folder = Path(shutil.copytree(sound, work / "as-tokenizer.json"))
    (folder / "tokenizer.json").write_bytes(content)
    must_refuse.append(loading(folder)[1])
    train = ["train", "new", *command_arguments(setting)]
    for option in ("--config", "--tokenizer"):
        must_refuse.append([str(folder / "tokenizer.json") if train[at - 1] == option else word
                            for at, word in enumerate(train)])  # fmt: skip
    for name in (*TENSOR_FILES, STATE, "config.json", "manifest.json"):
        run = Path(shutil.copytree(trained, work / f"run-{name}"))
        forget(run, checkpoint_name(10))
        forget(run, checkpoint_name(5))
        for checkpoint in (run / "checkpoints").iterdir():
            (checkpoint / name).write_bytes(content)
            if name in TENSOR_FILES:
                rehash(checkpoint)
        (may_pass if name == "config.json" else must_refuse).append(["train", str(run), *command_arguments(setting)])
        may_pass += [["audit", str(run)], ["report", str(run)]]
    for name in ("ledger.jsonl", "config.toml"):
        run = Path(shutil.copytree(trained, work / f"run-{name}"))
        (run / name).write_bytes(content)
        must_refuse += [["train", str(run), *command_arguments(setting)], ["audit", str(run)]]
        may_pass.append(["report", str(run)])  # a ledger without a line end has no records: an empty page
    data = Path(shutil.copytree(setting.data, work / "data"))
    (data / "manifest.json").write_bytes(content)
    must_refuse.append([str(data) if word == str(setting.data) else word for word in train])
    return must_refuse, may_pass


def test_no_module_reads_pickles() -> None:
    """No name that unpickles, unpacks or runs foreign code occurs in the package."""
    forbidden = (
        "import pickle", " torch.load(", "(torch.load(", "allow_pickle=True", "trust_remote_code=True", "tarfile",
        "extractall", "yaml.load", "dill", "joblib", "apply_chat_template(", "weights_only=False",
    )  # fmt: skip
    sources = {path: path.read_text(encoding="utf-8") for path in Path(resmol.__file__).parent.rglob("*.py")}
    assert len(sources) > 40
    peer = next(path for path in sources if path.parts[-2:] == ("workers", "checkpoint.py"))  # times it on its own file
    sources[peer] = sources[peer].replace("torch.load(path, weights_only=True)", "", 1)
    card = next(path for path in sources if path.name == "model_card.py")  # shows it to readers of the card
    sources[card] = sources[card].replace("tokenizer.apply_chat_template(chat, **as_tensors)", "", 1)
    formats = next(
        path for path in sources if path.parts[-2:] == ("data", "formats.py")
    )  # looks at a header, unpacks nothing
    for use in ("import tarfile", "tarfile.TarInfo.frombuf(head[:512]", "tarfile.HeaderError"):
        sources[formats] = sources[formats].replace(use, "", 1)
    assert not [(path.name, word) for path, text in sources.items() for word in forbidden if word in text]


def test_g2_distributed_checkpoints(
    campaign: Campaign, forks: Forks, setting: Setting, sound: Path, trained: Path, tmp_path: Path
) -> None:
    """A folder of torch.distributed.checkpoint whose metadata is a pickle that does something."""
    canary = tmp_path / "canary"
    payload = pickles(canary)["exec, protocol 2"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / ".metadata").write_bytes(payload)
    (plain / "__0_0.distcp").write_bytes(pickles(canary)["torch.save, zip"])
    assert forks.run(load_dcp, plain) == 0
    assert canary.exists(), "the control: PyTorch executes it"
    canary.unlink()
    with_config = Path(shutil.copytree(plain, tmp_path / "with-config"))
    shutil.copy(sound / "config.json", with_config)
    in_run = Path(shutil.copytree(trained, tmp_path / "in-run"))
    for checkpoint in (in_run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
        shutil.copytree(plain, checkpoint)
    beside = Path(shutil.copytree(trained, tmp_path / "beside"))
    for checkpoint in (beside / "checkpoints").iterdir():
        shutil.copy(plain / ".metadata", checkpoint)
    commands = [
        command
        for source in (plain, with_config, in_run, in_run / "checkpoints" / checkpoint_name(10))
        for command in loading(source)
    ]
    commands.append(["train", str(in_run), *command_arguments(setting)])
    problems = refusals(commands, outcomes_of(forks, tmp_path / "work", commands), "DCP", (2, 3, 65))
    ignoring = [*loading(beside)[:2], ["train", str(beside), *command_arguments(setting)]]
    problems += refusals(ignoring, outcomes_of(forks, tmp_path / "ignoring", ignoring), "beside", (0,))
    problems += ["it was executed"] if canary.exists() else []
    campaign.record(
        "G2", "a distributed checkpoint with a pickle in it", "no command loads it, nor what lies beside sound files",
        problems, len(commands) + len(ignoring), exhaustive=True,
    )  # fmt: skip


# --- G3: headers ------------------------------------------------------------------------------------------------


def with_length(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def hostile_headers() -> dict[str, bytes]:
    """Return files whose headers cost memory or time, or lie about the data."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    many = {f"t{n}": one | {"data_offsets": [8 * n, 8 * n + 8]} for n in range(12_000)}
    return {
        "2^63": with_length({}, length=2**63),
        "2^64 - 1": with_length({}, length=2**64 - 1),
        "99 MB claimed in 1 kB": with_length(b"{" + b" " * 1000, length=99_000_000),
        "100 MB of JSON": with_length(b'{"a":[' + b"0," * 50_000_000 + b"0]}"),
        "100 MB of spaces": with_length(b"{" + b" " * 100_000_000 + b"}"),
        "deep lists": with_length(b'{"a":' + b"[" * 900_000),
        "deep objects": with_length(b'{"a":' * 190_000),
        "a megabyte of numbers": with_length(b'{"a":[' + b"0," * 490_000 + b"0]}"),
        "a megabyte of empty objects": with_length(b'{"a":[' + b"{}," * 330_000 + b"0]}"),
        "a megabyte of keys": with_length(b"{" + b",".join(b'"%x":0' % n for n in range(80_000)) + b"}"),
        "a megabyte of tensors with a hole": with_length(
            many | {"z": one | {"data_offsets": [96_008, 96_016]}}, bytes(96_016)
        ),
        "a number of 900 kB": with_length(
            b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[' + b"9" * 900_000 + b"]}}"
        ),
        "an exponent": with_length({"a": one | {"shape": [2]}} | {"b": "#"}).replace(b'"#"', b"1e9"),
        "overlap": with_length({"a": one, "b": one | {"data_offsets": [4, 12]}}, bytes(12)),
        "hole": with_length({"a": one, "b": one | {"data_offsets": [12, 20]}}, bytes(20)),
        "sizes that overflow 64 bits": with_length({"a": one | {"shape": [2**62, 2**62]}}, bytes(8)),
        "sizes that overflow to the right number": with_length({"a": one | {"shape": [2**62 + 2]}}, bytes(8)),
        "a size of zero hides a large one": with_length({"a": one | {"shape": [0, 2**62]}}, bytes(8)),
        "offsets beyond the end": with_length({"a": one | {"shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)),
        "a thousand dimensions": with_length({"a": one | {"shape": [1] * 1000 + [2]}}, bytes(8)),
    }  # fmt: skip


def hostile_gguf_headers() -> dict[str, bytes]:
    """Return the same for GGUF."""
    head, text = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1), struct.pack("<Q", 1) + b"a"
    return {
        "2^60 items": head + text + struct.pack("<IIQ", 9, 0, 2**60),
        "2^60 strings": head + text + struct.pack("<IIQ", 9, 8, 2**60),
        "a string of 2^63 bytes": head + struct.pack("<Q", 2**63),
        "2^64 - 1 fields": struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1),
        "2^64 - 1 tensors": struct.pack("<4sIQQ", b"GGUF", 3, 2**64 - 1, 0),
        "arrays in arrays": head + text + struct.pack("<IIQIQ", 9, 9, 1, 9, 1) * 1000,
        "a tensor of 2^64 items": struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
        + text
        + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0),
    }  # fmt: skip


def test_g3_headers(campaign: Campaign, forks: Forks, sound: Path, tmp_path: Path) -> None:
    """Headers that claim, nest or overflow: refused in a second, at a cost of less than 50 MB."""
    problems, cases, growth, longest = [], 0, 0, 0.0
    kinds: tuple[tuple[dict[str, bytes], Callable[[Path], object], str], ...] = (
        (hostile_headers(), read_header, "safetensors"), (hostile_gguf_headers(), read_gguf_header, "gguf"),
    )  # fmt: skip
    for contents, reader, ending in kinds:
        files = []
        for number, content in enumerate(contents.values()):
            files.append(tmp_path / f"{number}.{ending}")
            files[-1].write_bytes(content)
        report = tmp_path / "report.json"
        assert forks.run(read_each, reader, files, report) == 0
        for what, outcome in zip(contents, json.loads(report.read_bytes()), strict=True):
            growth, longest = max(growth, outcome["growth"]), max(longest, outcome["seconds"])
            if outcome["raised"] != "ResmolError":
                problems.append(f"{what}: {outcome['raised'] or 'accepted'}: {outcome['said'][-300:]}")
            if outcome["growth"] > 50 * MIB or outcome["seconds"] > 1:
                problems.append(f"{what}: {outcome['growth'] / MIB:.0f} MiB, {outcome['seconds']:.1f} s")
        cases += len(files)
    for number, content in enumerate(hostile_headers().values()):  # and as the weights of a whole model
        folder = Path(shutil.copytree(sound, tmp_path / f"model-{number}"))
        (folder / WEIGHTS).write_bytes(content)
    folders = sorted(tmp_path.glob("model-*"))
    assert forks.run(read_each, load_model, folders, report) == 0
    problems += [
        f"{folder.name}: {outcome['raised'] or 'accepted'}, {outcome['growth'] / MIB:.0f} MiB"
        for folder, outcome in zip(folders, json.loads(report.read_bytes()), strict=True)
        if outcome["raised"] != "ResmolError" or outcome["growth"] > 100 * MIB
    ]
    campaign.record(
        "G3", "hostile headers", "refused within 1 s and 50 MB", problems, cases, exhaustive=True,
        note=f"safetensors and GGUF; at most {growth / MIB:.0f} MiB and {longest:.2f} s",
    )  # fmt: skip
    for path in all_files(tmp_path):
        path.unlink()


# --- G3b: fuzzing ------------------------------------------------------------------------------------------------


def read_state(path: Path) -> None:
    """Read a checkpoint whose state or manifest was changed, with hashes made to fit, as a resumption does."""
    folder = path.parent
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    config = load_config(folder.parent / "faults.toml")
    empty = CausalLM.empty(config.model)
    restore(TrainState(empty, build_optimizer(empty, config.optimizer, config.batch.global_batch_tokens)), checkpoint)


def read_whole_ledger(path: Path) -> None:
    """Read a ledger as a resumption and the report do."""
    records = read_ledger(path).records
    effective_steps(records)
    list(select(records, "save"))


def read_gguf(path: Path) -> None:
    """Read a GGUF file up to its architecture."""
    gguf_config(read_gguf_header(path), str(path))


def read_data_manifest(path: Path) -> None:
    """Open a prepared folder and read some of it."""
    dataset = open_dataset(path.parent)
    dataset.train.read(0, min(100, len(dataset.train)))


def read_tokenizer(path: Path) -> None:
    """Load a tokenizer that is not known, and use it."""
    found = load_tokenizer(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), cache=path.parent / "cache")
    found.decode(found.encode("the kalo 123 é"))


def write_with(change: Callable[[bytes, Random], bytes], content: bytes, path: Path, draw: Random) -> None:
    """Write the changed content."""
    path.write_bytes(change(content, draw))


def write_rehashed_state(content: bytes, path: Path, draw: Random) -> None:
    """Write a changed state; the manifest fits."""
    path.write_bytes(mutated_json(content, draw))
    rehash(path.parent)


def write_chained_ledger(content: bytes, path: Path, draw: Random) -> None:
    """Write a changed ledger; half of the time with a chain that fits the changed records, as a forger would."""
    if draw.random() < 0.5:
        path.write_bytes(mutated(content, draw))
        return
    lines = content.splitlines()
    place, head = draw.randrange(len(lines)), "0" * 64
    for number, line in enumerate(lines):
        record = json.loads(line) | {"prev": head}
        if number == place:
            key = draw.choice([key for key in record if key not in ("seq", "prev", "kind")])
            record[key] = draw.choice([None, [], {}, "", -1, 10**40, "\ud800", True])
        lines[number] = canonical(record)
        head = hashlib.sha256(lines[number]).hexdigest()
    path.write_bytes(b"\n".join(lines) + b"\n")


def test_g3_fuzzing(
    campaign: Campaign, forks: Forks, setting: Setting, model: Path, run: Path, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    """Changed bytes and values before every reader, with little memory: our errors, or a result, and nothing else."""
    from functools import partial

    from small_models import hf_weights, write_gguf

    gguf = tmp_path / "model.gguf"
    config = read_model_config(model)
    write_gguf(gguf, config, hf_weights(config))
    checkpoint = run / "checkpoints" / checkpoint_name(10)
    shutil.copy(setting.config, checkpoint.parent / "faults.toml")
    data = Path(shutil.copytree(tiny_dataset.root, tmp_path / "data"))
    readers: dict[str, tuple[Callable[[Path], object], Path, Any]] = {
        "safetensors": (read_header, model / WEIGHTS, partial(write_with, mutated_header)),
        "GGUF": (read_gguf, gguf, partial(write_with, mutated_front)),
        "checkpoint manifest": (verify_of, checkpoint / "manifest.json", partial(write_with, mutated_json)),
        "checkpoint state": (read_state, checkpoint / STATE, write_rehashed_state),
        "ledger": (read_whole_ledger, run / "ledger.jsonl", write_chained_ledger),
        "shard manifest": (read_data_manifest, data / "manifest.json", partial(write_with, mutated_json)),
        "config.json": (read_model_config, model / "config.json", partial(write_with, mutated_json)),
        "TOML": (load_config, tmp_path / "faults.toml", partial(write_with, mutated)),
        "tokenizer": (read_tokenizer, model / "tokenizer.json", partial(write_with, mutated_json)),
    }
    shutil.copy(setting.config, tmp_path / "faults.toml")
    seconds, problems, counts = FUZZ_SECONDS if campaign.full else 0.4, [], {}
    for name, (reader, path, write) in readers.items():
        report = tmp_path / "report.json"
        original = path.read_bytes()
        writer = partial(write, original)
        trials = 5 if name == "tokenizer" and not campaign.full else 10**9
        code = forks.run(
            fuzz, reader, path, writer, f"{campaign.seed}/G3/{name}", trials, seconds, report, FUZZ_BYTES,
            timeout=10 * seconds + HANGS,
        )  # fmt: skip
        path.write_bytes(original)
        if code != 0:
            problems.append(f"{name}: the process ended with {code}")
            continue
        outcome = json.loads(report.read_bytes())
        counts[name] = outcome["trials"]
        problems += [f"{name}: {text}" for text in outcome["found"]]
        if outcome["longest"] > (30 if name == "tokenizer" else 5):
            problems.append(f"{name}: {outcome['longest']:.1f} s for one file")
        assert outcome["refused"], f"{name}: no change was refused"
    campaign.record(
        "G3b", "changed bytes in every file that is read", "an error of ours, or a result; within 1 GiB", problems,
        sum(counts.values()), note=", ".join(f"{name} {count}" for name, count in counts.items()),
    )  # fmt: skip


FUZZ_SECONDS = int(os.environ.get("RESMOL_FUZZ_SECONDS", "70"))  # for each of the nine readers: ten minutes in all


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install atheris")
def test_g3_fuzzing_guided_by_coverage(
    campaign: Campaign, setting: Setting, model: Path, run: Path, tmp_path: Path
) -> None:
    """libFuzzer looks for input that takes a new path through a reader, beginning with whole files."""
    from small_models import hf_weights, write_gguf

    gguf, config = tmp_path / "model.gguf", read_model_config(model)
    write_gguf(gguf, config, hf_weights(config))
    seeds = {
        "safetensors": model / WEIGHTS, "GGUF": gguf, "ledger": run / "ledger.jsonl",
        "config.json": model / "config.json", "TOML": setting.config,
    }  # fmt: skip
    seconds, runs, problems = FUZZ_SECONDS if campaign.full else 1, {}, []
    for reader, whole in seeds.items():
        corpus = tmp_path / f"corpus {reader}"
        corpus.mkdir()
        shutil.copy(whole, corpus)
        script = Path(__file__).with_name("coverage_fuzz.py")
        limits = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10", "-max_len=1000000"]
        command = [sys.executable, str(script), reader, str(corpus), f"-seed={campaign.seed}", *limits]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        found = re.search(r"Done (\d+) runs", done.stderr)
        runs[reader] = int(found[1]) if found else 0
        if done.returncode != 0 or not found:
            problems.append(f"{reader}: exit code {done.returncode}: {done.stderr[-2000:]}")
    campaign.record(
        "G3c", "input that libFuzzer made, guided by coverage", "our error or a result, under 2 GiB and 10 s",
        problems, max(1, sum(runs.values())), note=", ".join(f"{name} {count:,}" for name, count in runs.items()),
    )  # fmt: skip


FUZZ_BYTES = 1024 * MIB  # of addresses, which threads use up faster than memory


def verify_of(path: Path) -> None:
    """Verify the checkpoint that a file belongs to."""
    open_checkpoint(path.parent).verify()


def mutated_header(content: bytes, draw: Random) -> bytes:
    """Change a safetensors file, its header above all; mostly with a length that fits."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = draw.random()
    if kind < 0.2:
        return mutated(content[:64], draw) + content[64:]
    header = mutated_json(header, draw)
    return struct.pack("<Q", len(header) if kind < 0.9 else draw.getrandbits(64)) + header + data


def mutated_front(content: bytes, draw: Random) -> bytes:
    """Change the front of a file, where its header lies."""
    border = min(len(content), draw.choice((32, 256, 4096)))
    return mutated(content[:border], draw) + content[border:]


# --- G4: paths and archives --------------------------------------------------------------------------------------

LEADING_OUT = (
    "../secret.safetensors", "../../secret.safetensors", "sub/model.safetensors", "./model.safetensors", "..", ".", "",
    "/etc/passwd", "/secret.safetensors", "~/secret.safetensors", "secret.safetensors\0", "C:\\secret.safetensors",
    "..\\secret.safetensors", "secret.bin", "//host/secret.safetensors", "file:///secret.safetensors",
    "http://127.0.0.1/secret.safetensors", "%2e%2e/secret.safetensors", "secret.safetensors/",
    "\u2024\u2024/secret.safetensors",
    ".hidden.safetensors", "-rf.safetensors", "$HOME.safetensors", "a\nb.safetensors", 7, None, ["model.safetensors"],
)  # fmt: skip


def test_g4_paths(campaign: Campaign, forks: Forks, model: Path, run: Path, setting: Setting, tmp_path: Path) -> None:
    """Names that lead out of a folder, and links to what is no weight file."""
    names, secret = list(load_file(model / WEIGHTS)), tmp_path / "secret.safetensors"
    (model / WEIGHTS).rename(secret)  # a sound weight file, so that only the way to it is wrong
    folders = []
    for number, name in enumerate(LEADING_OUT):
        folders.append(Path(shutil.copytree(model, tmp_path / f"index-{number}")))
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
        (folders[-1] / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for number, (link, target) in enumerate(
        (
            ("model.safetensors.index.json", Path("/etc/passwd")),
            (WEIGHTS, Path("/dev/zero")),
            (WEIGHTS, Path(WEIGHTS)),
        )
    ):
        folders.append(Path(shutil.copytree(model, tmp_path / f"link-{number}")))
        (folders[-1] / link).symlink_to(target)
    folders.append(Path(shutil.copytree(model, tmp_path / "pipe")))
    os.mkfifo(folders[-1] / WEIGHTS)
    report = tmp_path / "report.json"
    assert forks.run(read_each, find_weights, folders, report) == 0
    problems = [
        f"{folder.name}: {outcome['raised'] or 'accepted'}: {outcome['said'][-200:]}"
        for folder, outcome in zip(folders, json.loads(report.read_bytes()), strict=True)
        if outcome["raised"] != "ResmolError"
    ]
    for number, (name, device) in enumerate((("config.json", "/dev/zero"), ("config.json", "pipe"), ("index", "pipe"))):
        folders.append(Path(shutil.copytree(model, tmp_path / f"device-{number}")))
        path = folders[-1] / ("model.safetensors.index.json" if name == "index" else name)
        path.unlink(missing_ok=True)
        if device == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(device)
    devices = folders[-3:]
    assert forks.run(read_each, load_model, devices, report) == 0
    problems += [f"{outcome}" for outcome in json.loads(report.read_bytes()) if outcome["raised"] != "ResmolError"]
    commands = linked_commands(run, setting, tmp_path)
    problems += refusals(commands, outcomes_of(forks, tmp_path / "work", commands), "links", (1, 2, 3, 65))
    (model / "ok.safetensors").write_bytes(secret.read_bytes())
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "ok.safetensors")})
    (model / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert find_weights(model).files == (model / "ok.safetensors",)  # the control: such an index is read
    for target in (secret, Path("../secret.safetensors")):  # a link of a folder that the user named is the user's
        linked = Path(shutil.copytree(model, tmp_path / f"linked-{target.is_absolute()}"))
        (linked / WEIGHTS).symlink_to(target)
        assert find_weights(linked).files == (linked / WEIGHTS,)
    campaign.record(
        "G4", "names that lead out of a folder, links to what is no weight file", "refused", problems,
        len(folders) + len(commands), exhaustive=True,
    )  # fmt: skip


def linked_commands(run: Path, setting: Setting, tmp_path: Path) -> list[list[str]]:
    """Replace what a run or its data consist of by links, and by names that lead elsewhere."""
    for checkpoint in (run / "checkpoints").iterdir():
        moved = checkpoint.rename(tmp_path / f"moved-{checkpoint.name}")
        checkpoint.symlink_to(moved)
    commands = [["train", str(run), *command_arguments(setting)], ["generate", str(run), "--prompt", "x"]]
    for number, name in enumerate(("../outside.ds", "/etc/passwd", "train/../../outside.ds", "train/link.ds")):
        data = Path(shutil.copytree(setting.data, tmp_path / f"data-{number}"))
        (data / "train" / "00000.ds").rename(tmp_path / "outside.ds")
        (data / "train" / "link.ds").symlink_to(tmp_path / "outside.ds")
        manifest = json.loads((data / "manifest.json").read_bytes())
        manifest["train"]["shards"][0]["name"] = name
        (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        arguments = [str(data) if word == str(setting.data) else word for word in command_arguments(setting)]
        commands.append(["train", str(tmp_path / "new"), *arguments])
    return commands


def extract(path: Path) -> None:
    """Take the one member out of an archive that a published package has."""
    extract_member(path, "package/data.bin", path.with_suffix(".out"), max_bytes=MIB)


def test_g4_archives(campaign: Campaign, forks: Forks, sound: Path, tmp_path: Path) -> None:
    """Bombs, members that lead elsewhere, and models inside archives."""
    size = campaign.count(256 * MIB, 10_240 * MIB)
    archives = tmp_path / "archives"
    archives.mkdir()
    bomb(archives / "honest.whl", "package/data.bin", size, size if size < 2**32 else 2**32 - 2)
    bomb(archives / "lying.whl", "package/data.bin", size, 1000)
    bomb(archives / "dots.whl", "../../package/data.bin", MIB, MIB)
    bomb(archives / "absolute.whl", "/package/data.bin", MIB, MIB)
    zip_with_links(archives / "links.whl", ["other", "package/../../escaped", "/escaped"])
    (archives / "nothing.whl").write_bytes(b"PK\x05\x06" + bytes(18))
    (archives / "tar.whl").write_bytes(tar_of("package/data.bin", b"x"))
    (archives / "truncated.whl").write_bytes((archives / "lying.whl").read_bytes()[:500])
    files = sorted(archives.iterdir())
    report = tmp_path / "report.json"
    assert forks.run(read_each, extract, files, report) == 0
    problems = []
    for path, outcome in zip(files, json.loads(report.read_bytes()), strict=True):
        written = path.with_suffix(".out").stat().st_size if path.with_suffix(".out").exists() else 0
        if outcome["raised"] != "ResmolError" or written > MIB or outcome["growth"] > 50 * MIB:
            problems.append(f"{path.name}: {outcome}; {written} bytes written")
    if outside := [path for path in all_files(tmp_path) if "escaped" in path.name or path.name == "data.bin"]:
        problems.append(f"unpacked elsewhere: {outside}")
    packed = tmp_path / "model.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sound.iterdir():
            archive.write(path, path.name)
    (tmp_path / "model.tar").write_bytes(tar_of(WEIGHTS, (sound / WEIGHTS).read_bytes()))
    commands = [*loading(packed), *loading(tmp_path / "model.tar")]
    problems += refusals(commands, outcomes_of(forks, tmp_path / "work", commands), "archives", (2, 3, 65))
    campaign.record(
        "G4b", "archives: bombs, members that lead elsewhere", "one member of a known name up to a known size, or none",
        problems, len(files) + len(commands), exhaustive=True, note=f"a bomb of {size // MIB} MiB",
    )  # fmt: skip


# --- G5: tokenizers ----------------------------------------------------------------------------------------------


def split_on(pattern: str) -> Callable[[dict[str, Any]], None]:
    """Return a change that makes a pattern split the text."""

    def change(table: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        table["pre_tokenizer"]["pretokenizers"].insert(0, split)

    return change


def normalised_with(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return a change that rewrites the text first."""

    def change(table: dict[str, Any]) -> None:
        table["normalizer"] = {"type": "Sequence", "normalizers": list(steps)}

    return change


def model_field(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of fields of the BPE model."""
    return lambda table: table["model"].update(fields)


def doubling(letter: str, times: int) -> list[dict[str, Any]]:
    """Return steps each of which doubles the text."""
    return [{"type": "Replace", "pattern": {"String": letter}, "content": letter * 2} for _ in range(times)]


def hostile_tokenizers() -> dict[str, Callable[[dict[str, Any]], None]]:
    """Return name -> how to make a tokenizer that panics, hangs, or takes all memory."""
    return {
        "panic in the merges": model_field(continuing_subword_prefix="########"),
        "a merge of what is not there": lambda table: table["model"]["merges"].append(["zz", "yy"]),
        "a merge of multi-byte pieces": model_field(continuing_subword_prefix="é"),
        "(a+)+$": split_on("(a+)+$"),
        "(a|aa)+$": split_on("(a|aa)+$"),
        "(.*)*x": split_on("(.*)*x"),
        "((a+)+)+b and back": split_on(r"((a+)+)+b\1"),
        "look-behind": split_on(r"(?<=(a{1,9}){1,9})!"),
        "not a pattern": split_on("(("),
        "a text that doubles 40 times": normalised_with(*doubling("a", 40)),
        "an id of 2^31": lambda table: table["model"]["vocab"].update({"far": 2**31}),
        "an id of 2^32 - 2": lambda table: table["model"]["vocab"].update({"far": 2**32 - 2}),
        "an added id of 2^31": lambda table: table["added_tokens"].append(table["added_tokens"][0] | {"id": 2**31}),
        "a negative id": lambda table: table["model"]["vocab"].update({"far": -1}),
        "no vocabulary": model_field(vocab={}, merges=[]),
        "drop-out": model_field(dropout=2.0),
    }


def use_tokenizer(path: Path) -> None:
    """Load a tokenizer and put text through it that a user might."""
    found = load_tokenizer(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), cache=path.parent / "cache")
    for text in ("a" * 5000 + "!", "aaaa bbbb " * 500, "x" * 5000, " " * 5000):
        found.decode(found.encode(text))


def test_g5_tokenizers(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """A tokenizer.json that panics, hangs or explodes: this process lives, and says what is wrong."""
    cases = hostile_tokenizers()
    chosen = cases if campaign.full else {k: cases[k] for k in campaign.draw("G5").sample(sorted(cases), 5)}
    files = []
    for number, change in enumerate(chosen.values()):
        table = json.loads(setting.tokenizer.read_bytes())
        change(table)
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(table), encoding="utf-8")
    report = tmp_path / "report.json"
    code = forks.run(read_each, use_tokenizer, files, report, 2048 * MIB, timeout=60 * len(files))
    problems = [f"the process ended with {code}"] if code else []
    for what, outcome in zip(chosen, json.loads(report.read_bytes()) if code == 0 else [{}] * len(chosen), strict=True):
        if outcome.get("raised", "") not in ("", "ResmolError") or outcome.get("seconds", 0) > 20:
            problems.append(f"{what}: {outcome}")
    campaign.record(
        "G5", "a tokenizer that panics, hangs or takes all memory", "the process lives; an error that says why",
        problems, len(chosen), exhaustive=campaign.full,
    )  # fmt: skip


# --- G6, G7: what a model folder asks to be executed -----------------------------------------------------------


def test_g6_chat_templates(campaign: Campaign, forks: Forks, model: Path, tmp_path: Path) -> None:
    """Templates that break out, hang or fill the memory lie in the folder; nothing renders them."""
    canary = tmp_path / "canary"
    templates = {
        "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.popen('touch "
        + str(canary) + "').read() }}",
        "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "a long text": "{{ 'a' * 10**9 }}",
        "a large range": "{{ range(10**9) | list }}",
    }  # fmt: skip
    commands = [
        ["generate", str(model), "--prompt", "ka", "--max-new-tokens", "4"], ["inspect", str(model)],
        ["evaluate", str(model), "--data", str(tmp_path / "text.txt")],
    ]  # fmt: skip
    (tmp_path / "text.txt").write_text("ka lo mi ner " * 50, encoding="utf-8")
    plain = outcomes_of(forks, tmp_path / "plain", commands)
    assert [outcome["code"] for outcome in plain] == [0] * len(commands), plain
    problems = []
    for what, template in templates.items():
        table = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": "<|endoftext|>"}
        (model / "tokenizer_config.json").write_text(json.dumps(table), encoding="utf-8")
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        (model / "README.md").write_text(template, encoding="utf-8")
        found = outcomes_of(forks, tmp_path / "with-template", commands)
        for command, before, after in zip(commands, plain, found, strict=True):
            same = after["code"] == before["code"] and without_names(after) == without_names(before)
            if not same or canary.exists():
                problems.append(f"{what}: resmol {command[0]}: {after}")
            if after["seconds"] > before["seconds"] + 5 or after["growth"] > before["growth"] + 100 * MIB:
                problems.append(f"{what}: resmol {command[0]} took {after['seconds']:.1f} s, {after['growth']} bytes")
    campaign.record(
        "G6", "chat templates that break out or explode", "never rendered: the same output as without", problems,
        len(templates) * len(commands), exhaustive=True,
    )  # fmt: skip


def without_names(outcome: Outcome) -> str:
    """Return the output without the names of temporary folders and without times."""
    return re.sub(r"resmol-evaluate-\w+|in [\d.]+ s, then [\d.,]+ tokens/s", "", str(outcome["output"]))


def test_g7_remote_code(
    campaign: Campaign, forks: Forks, setting: Setting, model: Path, run: Path, tmp_path: Path
) -> None:
    """A config.json that asks for code of its own."""
    canary, problems, tried = tmp_path / "canary", [], 0
    (model / "modeling_own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    genuine = json.loads((model / "config.json").read_bytes())
    requests: list[dict[str, Any]] = [
        {"auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}},
        {"custom_pipelines": {"text-generation": {"impl": "modeling_own.Own"}}},
        {"trust_remote_code": True},
        {"model_type": "own", "auto_map": {"AutoModel": "owner/repository--modeling_own.Own"}},
        {"quantization_config": {"quant_method": "own"}},
    ]
    for request in requests:
        (model / "config.json").write_text(json.dumps(genuine | request), encoding="utf-8")
        config = tmp_path / "own.toml"
        config.write_text(f'base = "nano"\narchitecture = "{model / "config.json"}"\n', encoding="utf-8")
        commands = [*loading(model), ["inspect", str(model)], ["train", "new", "--config", str(config), "--data", "."]]
        problems += refusals(commands, outcomes_of(forks, tmp_path / "work", commands), str(request)[:60], (2,))
        tried += len(commands)
    if canary.exists():
        problems.append("code of the folder was executed")
    campaign.record(
        "G7", "auto_map and its like in config.json", "refused, exit 2; no code of the folder runs", problems, tried,
        exhaustive=True,
    )  # fmt: skip


# --- G8: secrets --------------------------------------------------------------------------------------------------

SECRETS = {
    name: f"s3cr3t-{number:02}-{name.lower()}"
    for number, name in enumerate(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY",
         "OPENAI_API_KEY", "GITHUB_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET", "NPM_TOKEN",
         "DATABASE_URL", "SSH_AUTH_SOCK", "TWINE_PASSWORD", "KUBECONFIG", "SECRET", "PASSWORD", "MASTER_ADDR_TOKEN")
    )
}  # fmt: skip
URL_SECRET = "s3cr3t-in-an-address"


def test_g8_secrets(campaign: Campaign, forks: Forks, setting: Setting, run: Path, sound: Path, tmp_path: Path) -> None:
    """Tokens in the environment, also inside addresses: in no file and no message."""
    address = f"http://user:{URL_SECRET}@127.0.0.1:9"
    environment = SECRETS | {
        "HF_ENDPOINT": address, "HTTPS_PROXY": address, "HTTP_PROXY": address, "PIP_INDEX_URL": f"{address}/simple",
        "PIP_RETRIES": "0", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"),
    }  # fmt: skip
    work = tmp_path / "work"
    new = work / "new"
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    for checkpoint in (damaged / "checkpoints").iterdir():
        (checkpoint / WEIGHTS).write_bytes(b"")
    arguments = command_arguments(setting)
    commands = [
        ["train", str(new), *arguments, "--steps", "10"],
        ["train", str(new), *arguments, "--steps", "15"],
        ["audit", str(new), "--json"],
        ["report", str(new)],
        ["evaluate", str(new), "--data", str(setting.data), "--json"],
        ["generate", str(new), "--prompt", "ka", "--max-new-tokens", "2"],
        ["inspect", str(sound), "--json"],
        ["train", str(damaged), *arguments],
        ["train", str(new), *arguments, "--set", "data.seed=1"],
        ["train", str(new), *arguments, "--debug", "--set", "x.y=1"],
        ["inspect", "owner/name"],
        ["generate", "owner/name", "--prompt", "x"],
        ["prepare", "out", "--input", str(sound / "config.json"), "--tokenizer", "owner/name"],
        ["prepare", "out", "--input", str(sound / "config.json")],
    ]
    if campaign.full:  # seconds each
        commands += [["verify", "--weights", "pypi"], ["export", str(new), str(work / "exported")]]
    outcomes = outcomes_of(forks, work, commands, environment=environment)
    shown = {" ".join(command): outcome["output"] for command, outcome in zip(commands, outcomes, strict=True)}
    with pytest.raises(NetworkError) as refused:
        require_answer(f"{address}/owner/name/resolve/main/{WEIGHTS}", address, "try again")
    shown["a Hub that does not answer"] = f"{refused.value.what} {refused.value.fix}"
    assert [outcome["code"] for outcome in outcomes[:2]] == [0, 0], outcomes[:2]
    assert (new / "report.html").is_file(), outcomes[3]
    written = {str(path): path.read_bytes() for path in all_files(tmp_path)}
    texts = written | {f"resmol {command}": output.encode() for command, output in shown.items()}
    secrets = [*SECRETS.values(), URL_SECRET]
    assert len(written) > 20
    assert [code for code in (outcome["code"] for outcome in outcomes[7:]) if code in (2, 3, 65)], outcomes[7:]
    problems = [
        f"{place[-200:]}: {secret}: {excerpt(content, secret)}"
        for place, content in texts.items()
        if not place.endswith("report.json")  # what this test itself writes down
        for secret in secrets
        if secret.encode() in content
    ]
    campaign.record(
        "G8", "tokens in the environment and in addresses", "in no file, report, ledger or message", problems,
        len(secrets), exhaustive=True, note=f"{len(written)} files and the output of {len(commands)} commands searched",
    )  # fmt: skip


def excerpt(content: bytes, secret: str) -> str:
    """Show where a secret stands."""
    place = content.index(secret.encode())
    return content[max(0, place - 120) : place + 60].decode(errors="replace")
