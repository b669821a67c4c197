"""The log writer for a notebook: a progress bar that is updated in place, and the lines below it."""

from __future__ import annotations

import html
import sys
import time
from importlib import import_module
from typing import Any

from resmol.run.ledger import Record
from resmol.run.log_writers import StepFormatter

REFRESH_SECONDS = 0.5


def in_notebook() -> bool:
    """Return whether this code runs in the kernel of a notebook; IPython at a terminal has none."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class NotebookWriter:
    """Prints the lines, and updates one display above them; no line is written over by a carriage return."""

    def __init__(self, formatter: StepFormatter) -> None:
        ipython: Any = import_module("IPython.display")  # no dependency: a notebook's kernel has it
        self._html = ipython.HTML
        self._formatter = formatter
        self._shown = 0.0
        self._bar = ipython.display(self._html(self._picture(0, "")), display_id=True)

    def show(self, record: Record) -> None:
        """Print the record's line, if it has one, and move the bar."""
        text = self._formatter.line(record)
        if text is not None:
            print(text, flush=True)  # noqa: T201 - the output of the cell
        due = time.monotonic() - self._shown > REFRESH_SECONDS or record.get("step") == self._formatter.last
        if record["kind"] == "step" and due:
            self._shown = time.monotonic()
            rate = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
            note = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {rate:,.0f} tok/s, epoch {record['epoch']:.2f}"
            self._bar.update(self._html(self._picture(record["step"], note)))

    def _picture(self, step: int, note: str) -> str:
        last = self._formatter.last
        return f'<progress value="{step}" max="{last}"></progress> step {step:,} of {last:,} {html.escape(note)}'

    def close(self) -> None:
        """Leave the last picture where it is."""
