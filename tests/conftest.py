"""Fixtures that many tests share; everything is made here, deterministic and offline."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
# Before PyTorch: the suite shares its cores with its own processes. One thread each takes a third less processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import profiles  # noqa: F401 - registers them
import pytest
import tokenizers
import torch
from hypothesis import settings
from tiny import TrainTiny, synthetic_texts
from tokenizers import decoders, models, pre_tokenizers, trainers

from resmol.config.load import load_config
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import Dataset
from resmol.data.tokenizer import SMOLLM2_TOKENIZER_SHA256, Tokenizer
from resmol.data.tokenizer_files import cache_path
from resmol.train.start import train_model
from resmol.train.step import TrainState

# What tries POSIX itself is not for Windows: the fault campaign, and tests with a tool that is not there.
collect_ignore_glob = ["faults/*"] if sys.platform == "win32" else []
collect_ignore = [
    str(path)
    for path in (Path(__file__).parent.rglob("test_*.py") if sys.platform == "win32" else ())
    if re.search(r"^import (fcntl|resource)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
settings.load_profile("ci")  # another one: --hypothesis-profile=fuzz


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let PyTorch's global random numbers be the same in a test, whichever tests ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def nothing_is_compiled() -> Iterator[None]:
    """Code whose shapes are checked at every call cannot be compiled; a test that compiles starts a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmol.verify.training.compiler_problem", lambda _device: "not under pytest")
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json like SmolLM2's, with 512 tokens and <|endoftext|> as id 0."""
    rust = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    rust.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(synthetic_texts(300), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    rust.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_file.read_bytes(), tiny_tokenizer_file)


@pytest.fixture(scope="session")
def tiny_dataset(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A prepared folder of 800 documents, about 40,000 tokens, several shards, some documents held out."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    return prepare(out, from_texts(synthetic_texts(800)), tiny_tokenizer, val_fraction=0.05, shard_tokens=12_000)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference files beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("the reference files are not here")
    return folder


@pytest.fixture(scope="session")
def genuine_tokenizer() -> Tokenizer:
    """SmolLM2's own tokenizer, from the reference files or the cache; nothing is downloaded."""
    reference = Path(__file__).resolve().parents[2] / "shared" / "reference" / "tokenizer" / "tokenizer.json"
    for path in (reference, cache_path(SMOLLM2_TOKENIZER_SHA256, None)):
        if path.is_file():
            return Tokenizer(path.read_bytes(), path)
    pytest.skip("SmolLM2's tokenizer.json is not here")


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs for the user during this test, as it comes."""
    package, handler = logging.getLogger("resmol"), _Collected()
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    yield handler.lines
    package.removeHandler(handler)


@pytest.fixture
def as_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's logger as an import leaves it: a command that ran in this process would have made it print."""
    monkeypatch.setattr(logging.getLogger("resmol"), "handlers", [logging.NullHandler()])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test, so that none depends on what the user's holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(os.environ["XDG_CACHE_HOME"]) / "resmol"


@pytest.fixture
def tokenizer_in_cache(tiny_tokenizer: Tokenizer, own_cache: Path) -> Tokenizer:
    """The tiny tokenizer, where a process that this test starts finds it by its hash."""
    path = cache_path(tiny_tokenizer.sha256, own_cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_tokenizer.data)
    return tiny_tokenizer


TINY_RUN = """
name = "tiny"
[model]
vocab_size = 512
hidden_size = 24
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 1
max_position_embeddings = 64
rms_norm_eps = 1e-5
rope_theta = 100000.0
tie_word_embeddings = true
initializer_range = 0.2
bos_token_id = 0
eos_token_id = 0
[data]
seq_len = 16
[batch]
global_batch_tokens = 64
micro_batch_size = 2
[optimizer]
lr = 0.01
[schedule]
warmup_steps = 10
[runtime]
device = "cpu"
precision = "float32"
matmul_backend = "mkl"
compile = "off"
threads = 1
loss_chunk_tokens = 8
[evaluation]
every = 20
windows = 8
[sampling]
every = 20
prompt = "ka"
max_new_tokens = 4
[checkpoint]
every = 5
keep_last = 100
[logging]
every = 10
"""


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A configuration of a run that takes milliseconds a step: 2 micro-batches of 2 windows of 16 tokens."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY_RUN, encoding="utf-8")
    return load_config(path, [f"tokenizer.sha256={tiny_tokenizer.sha256}"])


@pytest.fixture(scope="session")
def short_dataset(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A prepared folder with about 60 windows of 16 tokens: an epoch of the tiny run is about 15 steps."""
    out = tmp_path_factory.mktemp("data") / "short"
    return prepare(out, from_texts(synthetic_texts(10, words=40)), tiny_tokenizer, val_fraction=0.1)


@pytest.fixture
def train_tiny(tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer) -> TrainTiny:
    """Train a run directory to a step, on `tiny_dataset` and `tiny_config` unless an option says otherwise."""

    def start_or_resume(run: Path, steps: int, *overrides: str, **options: Any) -> TrainState:
        wanted = {"data": str(tiny_dataset.root), "tokenizer": tiny_tokenizer.path} | options
        config = wanted.pop("config", tiny_config)
        return train_model(config, run, overrides=[f"train.steps={steps}", *overrides], **wanted)

    return start_or_resume
