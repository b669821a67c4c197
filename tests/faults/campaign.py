"""The fault campaign at its full counts: `make faults`.

Runs the tests of this folder with RESMOL_FAULTS=full, collects what each row of the fault matrix did, prints the
table, and writes it as docs/reliability.json and docs/reliability.md. A selection of rows (arguments are pytest's, such
as `-k k1`) is only printed; with RESMOL_FAULTS_REPLACE=1 it replaces these rows of the record, which then says so.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parents[1] / "docs"
DEFAULT_SEED = 20261124


@dataclass
class Row:
    """One row of the matrix: so many trials of a fault, so many of which ended otherwise than they must."""

    id: str
    fault: str
    expected: str
    trials: int
    failures: int
    exhaustive: bool = False
    note: str = ""
    again: bool = False  # run again after the whole campaign, in a selection

    @property
    def bound(self) -> str:
        """The 95 % upper bound on the failure rate: Clopper and Pearson (1934), one-sided; none if exhaustive."""
        if self.exhaustive:
            return "all cases"
        if self.trials == 0:
            return "not run"
        return f"< {upper_bound(self.failures, self.trials):.2%}"


def upper_bound(failures: int, trials: int, confidence: float = 0.95) -> float:
    """Return the failure rate at which so few failures would have a probability of 1 - confidence."""
    from math import comb

    low, high = failures / trials, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        seen = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures + 1))
        low, high = (rate, high) if seen > 1 - confidence else (low, rate)
    return high


@dataclass
class Campaign:
    """What the tests ask for counts and chance, and tell what happened."""

    full: bool
    seed: int
    rows: list[Row] = field(default_factory=list)

    def count(self, selection: int, full: int) -> int:
        """Return how many trials to make: few in the ordinary suite, the target of the matrix in a campaign."""
        return full if self.full else selection

    def draw(self, row: str) -> random.Random:
        """Return the random generator of a row: a function of the campaign's seed, whatever else runs."""
        return random.Random(f"{self.seed}/{row}")

    def record(
        self, row: str, fault: str, expected: str, problems: list[str], trials: int, *, exhaustive: bool = False,
        note: str = "",
    ) -> None:  # fmt: skip
        """Note the outcome of a row and fail the test when a trial ended otherwise than it must."""
        self.rows.append(Row(row, fault, expected, trials, len(problems), exhaustive, _in_one_cell(note)))
        assert trials > 0, f"{row}: nothing was tried"
        assert not problems, f"{row}: {len(problems)} of {trials} trials failed, such as: " + "; ".join(problems[:3])


def describe_machine() -> str:
    """Return what the outcome could depend on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def replaced(rows: list[Row]) -> tuple[list[Row], int]:
    """Return the rows of the last whole campaign with these in the place of their namesakes, and its seconds."""
    record = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    names = {row.id for row in rows}
    kept = [row for row in (Row(**row) for row in record["rows"]) if row.id not in names]
    return [*kept, *(replace(row, again=True) for row in rows)], record["seconds"]


def _in_one_cell(note: str) -> str:
    """Return a note without line breaks, column borders and the place of the temporary folder."""
    return re.sub(r"/\S*/(run/)", r"\1", " ".join(note.split())).replace("|", "/")


def write_report(rows: list[Row], seed: int, seconds: float) -> None:
    """Write docs/reliability.json and docs/reliability.md."""
    rows = sorted(rows, key=lambda row: _order(row.id))
    passed = not any(row.failures for row in rows)
    machine = describe_machine()
    record = {
        "seed": seed, "machine": machine, "seconds": round(seconds), "passed": passed, "rows": [asdict(r) for r in rows]
    }  # fmt: skip
    (DOCS / "reliability.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (DOCS / "reliability.md").write_text("\n".join(_page(rows, record)), encoding="utf-8")


CHAPTERS = {
    "K": "The process dies, or the power goes",
    "S": "The disk, the file system, the machine",
    "C": "Damaged files",
    "D": "Data",
    "L": "The machine vanishes: mirrors",
    "W": "Several processes",
    "F": "Signals, clocks, neighbors",
    "G": "Numbers",
    "H": "A hostile visitor of the demo",
    "M": "Mutants: the protocol with a line taken out",
}


def _page(rows: list[Row], record: dict[str, Any]) -> list[str]:
    """Return the lines of the page: a total, then a table and its notes for each chapter."""
    again = sum(row.again for row in rows)
    lines = [
        "# What happens when things go wrong",
        "",
        "Written by `make faults`; do not edit. Each row injects a fault many times and compares what is left with a",
        "run that nothing happened to, bit for bit. A rate without failures is still only known up to its bound",
        "(95 %); *all cases* means that no chance is involved: every possible point was tried.",
        "",
        f"{sum(row.trials for row in rows):,} trials, {sum(row.failures for row in rows):,} failures. "
        f"Seed {record['seed']}; {record['machine']}; {record['seconds'] / 60:.0f} min.",
        *(
            ["", f"{again} of the {len(rows)} rows were run again after a change, with the same seed and counts."]
            if again
            else []
        ),
    ]
    for letter, title in CHAPTERS.items():
        chapter = [row for row in rows if row.id[0] == letter]
        if chapter:
            lines += ["", f"## {title}", "", "| row | fault | must hold | trials | failures (rate) |"]
            lines += ["| --- | --- | --- | --- | --- |"]
            lines += [
                f"| {r.id} | {r.fault} | {r.expected} | {r.trials:,} | {r.failures} ({r.bound}) |" for r in chapter
            ]
            notes = [f"- {row.id}: {row.note}" for row in chapter if row.note]
            lines += ["", *notes] if notes else []
    return [*lines, ""]


def _order(row: str) -> tuple[int, int, str]:
    return list(CHAPTERS).index(row[0]), int("".join(filter(str.isdigit, row)) or 0), row


def main() -> int:
    """Run the campaign; the arguments are pytest's (such as -k K1)."""
    seed = int(os.environ.get("RESMOL_FAULTS_SEED", DEFAULT_SEED))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "RESMOL_FAULTS": "full", "RESMOL_FAULTS_SEED": str(seed), "RESMOL_FAULTS_OUT": folder
        }  # fmt: skip
        workers = ["-n", os.environ.get("RESMOL_FAULTS_WORKERS", "2"), "--dist", "worksteal"]
        command = [sys.executable, "-m", "pytest", str(FOLDER), "--durations=15", "-v", *workers, *sys.argv[1:]]
        code = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], check=False).returncode
        files = sorted(Path(folder).iterdir())
        rows = [Row(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    for row in sorted(rows, key=lambda row: _order(row.id)):
        print(f"{row.id:4} {row.trials:5} trials {row.failures:3} failures  {row.bound:10} {row.fault}")
    if not sys.argv[1:]:
        write_report(rows, seed, time.perf_counter() - started)
    elif rows and os.environ.get("RESMOL_FAULTS_REPLACE"):  # else a selection leaves the record of the whole alone
        all_rows, seconds = replaced(rows)
        write_report(all_rows, seed, seconds)
    return code


if __name__ == "__main__":
    sys.exit(main())
