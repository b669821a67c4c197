"""A compiler that does not work is found by trying it, and a run that depends on it gets a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.train import compiler
from resmol.train.compiler import compiler_problem, require_compiler


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The answer is kept for the life of a process."""
    compiler_problem.cache_clear()
    yield
    compiler_problem.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let every compilation fail in this way."""

    def fail_with(error: Exception) -> None:
        def compiled(_function: Any, **_options: Any) -> Any:
            def call(*_arguments: Any) -> Any:
                raise error

            return call

        monkeypatch.setattr(torch, "compile", compiled)

    return fail_with


def test_without_a_compiler_nothing_is_tried(
    broken: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(AssertionError())
    monkeypatch.setattr(compiler.shutil, "which", lambda _name: None)
    assert compiler_problem("cpu") == "there is no C++ compiler here"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError("c.so: failed to map segment\n\nSet TORCHDYNAMO_VERBOSE"), "c.so: failed to map segment"),
        (RuntimeError("x" * 999), "x" * compiler.SHOWN_CHARACTERS + " ..."),
        (KeyError(), "KeyError"),
    ],
)
def test_a_run_that_needs_it_gets_a_sentence(
    tiny_config: RunConfig, broken: Callable[[Exception], None], error: Exception, shown: str
) -> None:
    broken(error)
    require_compiler(tiny_config, "cpu")  # does not need it
    with pytest.raises(ConfigError) as refused:
        require_compiler(tiny_config.replace({"runtime.compile": "on"}), "cpu")
    assert refused.value.what == f"runtime.compile is on, and torch.compile does not work here: {shown}"
    assert "--set runtime.compile=off" in refused.value.fix
    assert "--accept-drift runtime.compile" in refused.value.fix


def test_a_compiler_that_ends_with_an_error_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is damaged, or a licence that has run out: the name is there, the program fails."""
    for name in ("c++", "g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert "No working C++ compiler" in compiler_problem("cpu")
