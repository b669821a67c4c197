"""How a measured process is told what to do, and how it answers: one JSON file in, one out.

Standard output is not used, since libraries print there as well. Nothing else of resmol is imported, so that a peer
carries only what its own users would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


def answer(work: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Do the task that the arguments name, and write the answer: the whole life of a measured process."""
    given, answered = (Path(name) for name in sys.argv[1:3])
    numbers = work(json.loads(given.read_text(encoding="utf-8")))
    answered.write_text(json.dumps(numbers), encoding="utf-8")
