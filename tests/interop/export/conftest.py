"""Fixtures of the tests of exports."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest

from resmol.interop.export import parity, reader_transformers


@pytest.fixture
def reads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program that reads back in this process, which has imported transformers already: seconds less."""

    def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        answer = io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(answer):
            patch.setattr(sys, "stdin", io.StringIO(options["input"]))
            reader_transformers.main(*command[3:])
        return subprocess.CompletedProcess(command, 0, answer.getvalue(), "")

    monkeypatch.setattr(parity, "subprocess", SimpleNamespace(run=run_here))
