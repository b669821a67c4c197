"""Run a program on what somebody else wrote, in a process whose memory and time are limited."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# macOS accepts no limit below the address space that it reserves for every process; Windows has none of this kind.
_LIMITED = """
import runpy, sys
program, limit = sys.argv[1], int(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
except (ImportError, ValueError, OSError):
    pass
runpy.run_path(program, run_name="__main__")
"""


def run_confined(
    program: Path, given: bytes, *, memory_bytes: int, seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a Python file to its end, whatever its exit code.

    Args:
        program: The file; nothing beside it is imported.
        given: Its standard input.
        memory_bytes: The address space that it may take; Linux alone keeps it to that.
        seconds: The time that it may take.
        environment: Its variables; None gives it those of this process.

    Raises:
        subprocess.TimeoutExpired: It was killed after ``seconds``.
    """
    command = [sys.executable, "-P", "-c", _LIMITED, str(program), str(memory_bytes)]
    return subprocess.run(command, input=given, capture_output=True, timeout=seconds, check=False, env=environment)
