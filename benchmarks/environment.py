"""Measure steps of training, or tokens of generation, under several process environments, in turns.

    python benchmarks/environment.py                       # how threads wait, on this machine as it is
    python benchmarks/environment.py --busy 2              # the same beside two programs that keep a core busy each
    python benchmarks/environment.py --of allocator --preset smollm2-135m-cpu --steps 8
    python benchmarks/environment.py --of waiting --generate runs/quickstart

Each measurement is a process of its own (`resmol train` on text made here, or `resmol generate`), the settings take
turns, and the first half of the steps is left out. Prints a Markdown table: milliseconds a step (or token).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "waiting": {
        "as chosen": {},
        "spinning (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
        "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    },
    "allocator": {
        "mallopt, as shipped": {},
        "GLIBC_TUNABLES, in 2 MiB pages": {
            "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:"
            "glibc.malloc.top_pad=67108864:glibc.malloc.hugetlb=1"
        },
        "glibc's own": {"GLIBC_TUNABLES": ""},  # set, though to nothing: resmol leaves it alone
    },
}
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES")


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy while the context is open; they end by themselves if this process is killed."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    programs = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def run(arguments: list[str], environment: Mapping[str, str]) -> str:
    """Run a resmol command under an environment and return its standard output."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    command = [sys.executable, "-m", "resmol", *arguments]
    return subprocess.run(command, env={**kept, **environment}, check=True, capture_output=True, text=True).stdout


def step_milliseconds(folder: Path, options: argparse.Namespace, environment: Mapping[str, str]) -> list[float]:
    """Train for a few steps and return the time of each in the second half."""
    target = folder / f"run-{time.monotonic_ns()}"
    settings = [
        "runtime.precision=float32",
        f"runtime.compile={options.compile}",
        "evaluation.every=0",
        "sampling.every=0",
    ]
    settings += [f"train.steps={options.steps}", "checkpoint.every=0", *options.set]
    flags = [word for setting in settings for word in ("--set", setting)]
    run(["train", str(target), "--preset", options.preset, "--data", str(folder / "text.txt"), *flags], environment)
    records = [json.loads(line) for line in (target / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["seconds"] for record in records if record["kind"] == "step"]
    return [1000 * value for value in seconds[len(seconds) // 2 :]]


def token_milliseconds(options: argparse.Namespace, environment: Mapping[str, str]) -> list[float]:
    """Generate greedily and return the mean time of a token."""
    words = ["--prompt", "The", "--temperature", "0", "--max-new-tokens", str(options.steps), "--json"]
    found = json.loads(run(["generate", options.generate, *words], environment))
    return [1000 / found["timings"]["decode_tokens_per_second"]]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Return setting -> milliseconds over all rounds."""
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20_000, encoding="utf-8")
    found: dict[str, list[float]] = {name: [] for name in SETTINGS[options.of]}
    for number in range(options.rounds):
        for name, environment in SETTINGS[options.of].items():
            times = (
                token_milliseconds(options, environment)
                if options.generate
                else step_milliseconds(folder, options, environment)
            )
            found[name] += times
            print(f"round {number + 1}: {name}: {statistics.median(times):.1f} ms", file=sys.stderr)
    return found


def main() -> None:
    """Parse the options, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=list(SETTINGS), default="waiting", help="what the settings are about")
    parser.add_argument("--busy", type=int, default=0, help="programs that keep a core busy meanwhile")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, as for resmol train")
    parser.add_argument("--compile", choices=["on", "off"], default="off")
    parser.add_argument("--generate", help="MODEL to generate with, instead of training")
    parser.add_argument("--steps", type=int, default=60, help="steps of each measurement (or tokens)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, busy_programs(options.busy):
        found = measure(options, Path(folder))
    print("\n| setting | median ms | range | longest |\n| --- | --- | --- | --- |")
    for name, times in found.items():
        low, high = statistics.quantiles(times, n=10)[0], statistics.quantiles(times, n=10)[-1]
        print(f"| {name} | {statistics.median(times):.1f} | {low:.1f} to {high:.1f} | {max(times):.0f} |")


if __name__ == "__main__":
    main()
