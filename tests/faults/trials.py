"""What a trial consists of: a tiny run, a child process that trains it, and the unharmed run to compare with.

The children are forked from a server that has imported PyTorch once, with one thread and before any operation ran,
so a trial costs the training alone and hundreds of them fit into minutes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # PyTorch imports it with the first model: two seconds that no child should spend
import torch.distributed.fsdp  # the same
from waiting import HANGS

from resmol import cli  # noqa: F401 - what `command` needs, for the server to import once
from resmol.__main__ import run as run_command_line
from resmol.config.load import load_config
from resmol.errors import ResmolError
from resmol.run import log_writers  # noqa: F401 - the same
from resmol.run.checkpoint_manifest import AVERAGED, OPTIMIZER, WEIGHTS, list_checkpoints, read_manifest
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger
from resmol.train.start import train_model
from resmol.train.step_result import REPRODUCIBLE_FIELDS

STEPS, INTERVAL = 60, 5
TENSOR_FILES = (WEIGHTS, OPTIMIZER, AVERAGED)
FAULT_RUN = f"""
name = "faults"
[model]
vocab_size = 512
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
rms_norm_eps = 1e-5
rope_theta = 100000.0
tie_word_embeddings = true
initializer_range = 0.125
bos_token_id = 0
eos_token_id = 0
[data]
seq_len = 32
[batch]
global_batch_tokens = 64
micro_batch_size = 2
[optimizer]
lr = 0.01
[schedule]
warmup_steps = 10
[averaging]
fraction = 0.5
every = 2
[train]
steps = {STEPS}
[runtime]
device = "cpu"
precision = "float32"
compile = "off"
threads = 1
loss_chunk_tokens = 64
[evaluation]
every = 0
[sampling]
every = 0
[checkpoint]
every = {INTERVAL}
keep_last = 3
[logging]
every = 10
"""


@dataclass(frozen=True)
class Setting:
    """What every trial of a campaign shares; only paths, so that it travels to a child."""

    config: Path
    data: Path
    tokenizer: Path


@dataclass(frozen=True)
class Oracle:
    """The run that nothing happened to: each step's recorded bits, and the digest of every tensor after it."""

    steps: dict[int, tuple[Any, ...]]
    tensors: dict[int, dict[str, str]]

    def differences(self, run: Path) -> list[str]:
        """Compare a run with this one: every effective step, and every checkpoint that it kept."""
        found = [
            f"step {step}: {got} instead of {self.steps[step]}"
            for step, got in step_bits(run).items()
            if got != self.steps[step]
        ]
        for step, tensors in checkpoint_digests(run).items():
            wrong = [name for name, value in self.tensors[step].items() if tensors.get(name) != value]
            found += [f"checkpoint of step {step}: {name} differs" for name in wrong]
        return found


def step_bits(run: Path) -> dict[int, tuple[Any, ...]]:
    """Step -> the fields that must be the same, bit for bit."""
    steps = effective_steps(read_ledger(RunDir(run).ledger).records)
    return {step: tuple(record[name] for name in REPRODUCIBLE_FIELDS) for step, record in steps.items()}


def checkpoint_digests(run: Path) -> dict[int, dict[str, str]]:
    """Step -> file and tensor -> sha256, from the manifests of the run's checkpoints."""
    manifests = [read_manifest(path) for path in list_checkpoints(RunDir(run).checkpoints)]
    return {
        manifest.step: {
            f"{file}/{name}": value for file in TENSOR_FILES for name, value in manifest.files[file].tensors.items()
        }
        for manifest in manifests
    }


def train_run(run: Path, setting: Setting, *overrides: str, **options: Any) -> int:
    """Start or resume a run as the command line does, silently; return its exit code."""
    try:
        sha256 = hashlib.sha256(setting.tokenizer.read_bytes()).hexdigest()
        config = load_config(setting.config, [f"tokenizer.sha256={sha256}"])
        train_model(config, run, data=str(setting.data), tokenizer=setting.tokenizer, overrides=overrides, **options)
    except ResmolError as error:
        (run.parent / f"{run.name}.error").write_text(f"{error.what}\n{error.fix}\n", encoding="utf-8")
        return error.exit_code
    return 0


def command(run: Path, setting: Setting, *arguments: str) -> int:
    """Do what `resmol train RUN` does, with these arguments more; its exit code, and its messages for `error_of`.

    Unlike `train_run` this is the whole command line: its views, and its answer to errors that are not resmol's.
    """
    with (run.parent / f"{run.name}.error").open("w", buffering=1, encoding="utf-8") as file, redirect_stderr(file):
        return run_command_line(["train", str(run), *command_arguments(setting), *arguments], debug=False)


def command_arguments(setting: Setting) -> list[str]:
    """Return the arguments of `resmol train RUN` that name a setting."""
    sha256 = hashlib.sha256(setting.tokenizer.read_bytes()).hexdigest()
    paths = {"--config": setting.config, "--data": setting.data, "--tokenizer": setting.tokenizer}
    return [*(str(word) for pair in paths.items() for word in pair), "--set", f"tokenizer.sha256={sha256}"]


def error_of(run: Path) -> str:
    """Return the two lines that the last failed `train_run` of a run would have printed (`command`: all it printed)."""
    return (run.parent / f"{run.name}.error").read_text(encoding="utf-8")


class Forks:
    """Starts functions in children of the fork server."""

    def __init__(self, preload: str | None = None) -> None:
        """Start the server, with a library in LD_PRELOAD if one is given: its children inherit it."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trials"])
        with _environment(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1", LD_PRELOAD=preload or ""):
            multiprocessing.forkserver.ensure_running()

    def start(self, function: Callable[..., int], *args: Any, **options: Any) -> BaseProcess:
        """Start ``function``; its return value becomes the exit code."""
        process = self._context.Process(target=_exit_with, args=(function, args, options), daemon=True)
        process.start()
        return process

    def run(self, function: Callable[..., int], *args: Any, timeout: float = HANGS, **options: Any) -> int:
        """Run ``function`` in a child to its end; return the exit code, negative for a signal.

        Raises:
            TimeoutError: It hangs; it was killed.
        """
        process = self.start(function, *args, **options)
        return finish(process, timeout)


def finish(process: BaseProcess, timeout: float = HANGS) -> int:
    """Wait for a child and return its exit code (`TimeoutError`, after killing it, when it hangs)."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a child did not end within {timeout} s")
    return process.exitcode


def _exit_with(function: Callable[..., int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    sys.exit(function(*args, **options))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


if multiprocessing.parent_process() is None and "forkserver" in " ".join(sys.orig_argv):
    torch.set_num_threads(1)  # in the server, before it forks: no thread pool exists that a child would miss
