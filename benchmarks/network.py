"""What a slow network costs, and what the backward pass hides of it: ``python benchmarks/network.py`` (Linux, as root).

torchrun starts ranks that train a model of 10 M parameters in a network namespace of their own, whose loopback device
lets through a number of bits a second (tc's token bucket). A ring sends as many bytes from each rank, so the device
gets that rate times the number of ranks: each rank has a link of its own, as it were. No latency is added: not every
kernel has netem.

From the times a model of the step is fitted, and extrapolated to devices that are not here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu import VOCABULARY, made_text
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resmol.bench.comparison import markdown_table
from resmol.bench.machine import machine_facts
from resmol.bench.predict import DEVICES, LINK_SHARE, predict_speed
from resmol.bench.subprocess_runs import QUIET, run_process
from resmol.cli.terminal import show_messages
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import open_dataset
from resmol.data.tokenizer_training import train_tokenizer
from resmol.errors import ResmolError
from resmol.model.flops import total_parameters
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger
from resmol.train import gradients
from resmol.train.start import train_model

logger = logging.getLogger("resmol.benchmarks.network")

STEPS, WARMUP = 10, 3
DOCUMENTS = 2000  # of the text that is made
SECONDS = 300.0  # that a run may take
SIZES = {
    "model.hidden_size": 256, "model.intermediate_size": 768, "model.num_hidden_layers": 10,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.vocab_size": VOCABULARY,
    "data.seq_len": 256, "batch.micro_batch_size": 4, "runtime.threads": 1, "runtime.compile": "off",
    "runtime.precision": "float32", "runtime.activation_checkpointing": "off", "averaging.fraction": 0.0,
}  # fmt: skip
FAR = (8, 64, 1024)  # devices to extrapolate to
NETWORK, LATENCY = 50e9, 20e-6  # bytes a second of each device's network card (400 Gbit/s), seconds of a message
BUCKET = 25 << 20  # bytes of DDP's
SAVE_EVERY, DISK = 500, 2e9  # steps; bytes a second that each machine of eight devices writes


@dataclass(frozen=True)
class Point:
    """Ranks that train over a network.

    Attributes:
        ranks: How many.
        megabits: A second, of each rank's link; 0 is as much as loopback gives.
        strategy: As for ``parallel.strategy``.
        overlap: Whether DDP reduces in buckets during the backward pass, or all of it afterwards.
        seconds: Of a step, the median.
    """

    ranks: int
    megabits: int = 0
    strategy: str = "ddp"
    overlap: bool = True
    seconds: float = math.nan


POINTS = [
    Point(1),
    *(Point(ranks, rate) for ranks in (2, 4) for rate in (0, 1000, 400)),
    *(Point(ranks, rate, overlap=False) for ranks in (2, 4) for rate in (1000, 400)),
    *(Point(ranks, rate, "fsdp") for ranks in (2, 4) for rate in (0, 1000)),
]


def configuration(point: Point, tokenizer_sha256: str = "0" * 64) -> RunConfig:
    """Return the configuration of a run in which each rank has one micro-batch a step."""
    rest = {
        "tokenizer.sha256": tokenizer_sha256,
        "batch.global_batch_tokens": 4 * 256 * point.ranks,
        "parallel.strategy": point.strategy,
        "train.steps": STEPS,
        "schedule.decay_start": 0,
        "schedule.decay_steps": 0,
    }
    return load_preset("nano").replace({**SIZES, **QUIET, **rest})


def measure(point: Point, folder: Path) -> Point:
    """Train a few steps; return the point with the seconds of one."""
    run = folder / f"run-{point.ranks}-{point.megabits}-{point.strategy}-{point.overlap}"
    rate = point.megabits * point.ranks
    limit = f"tc qdisc add dev lo root tbf rate {rate}mbit burst 512kb latency 2s && " if rate else ""
    words = [sys.executable]
    if point.ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}"]
    words += [__file__, "--part", json.dumps(asdict(point)), "--folder", str(folder), "--place", str(run)]
    command = ["unshare", "--net", "sh", "-c", f"ip link set lo up && {limit}exec {shlex.join(words)}"]
    root = Path(__file__).resolve().parents[1] / "src"
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    run_process(command, environment=environment, seconds=SECONDS).require_success()
    steps = effective_steps(read_ledger(RunDir(run).ledger).records)
    return replace(point, seconds=statistics.median(record["seconds"] for s, record in steps.items() if s > WARMUP))


class SmallBuckets(DistributedDataParallel):
    """DDP with buckets that are as large a part of the gradient as its own are of SmolLM2-135M's: a twentieth."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options, bucket_cap_mb=2)


class OneBucket(DistributedDataParallel):
    """DDP that reduces nothing before it has all gradients."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options, bucket_cap_mb=1 << 20)


def train_part(point: Point, folder: Path, run: Path) -> None:
    """Train as one of the ranks."""
    vars(gradients)["DistributedDataParallel"] = SmallBuckets if point.overlap else OneBucket
    data = folder / "data"
    config = configuration(point, open_dataset(data).tokenizer_sha256)
    train_model(config, run, data=str(data), tokenizer=folder / "tokenizer" / "tokenizer.json")


@dataclass(frozen=True)
class Fit:
    """The model of a step over a network: ``compute + max(0, crossing - hidden x compute)``.

    ``crossing = 2 (N - 1) / N x bytes / (share x rate)`` is a ring's all-reduce.

    Attributes:
        share: Of the link's rate, that the ring reaches.
        hidden: How long the reduction goes on beside the backward pass, in shares of the step's computation.
        error: The largest relative error of the measured steps.
    """

    share: float
    hidden: float
    error: float


def fit(points: Sequence[Point], gradient_bytes: int) -> Fit:
    """Fit the model to the measured points of DDP; a step without a limit is taken as computation alone."""
    compute = {p.ranks: p.seconds for p in points if p.strategy == "ddp" and p.overlap and not p.megabits}
    limited = [p for p in points if p.strategy == "ddp" and p.megabits]
    ideal = {p: 2 * (p.ranks - 1) / p.ranks * gradient_bytes / (p.megabits * 125e3) for p in limited}
    after = [p for p in limited if not p.overlap]
    share = statistics.median(ideal[p] / (p.seconds - compute[p.ranks]) for p in after)
    beside = [p for p in limited if p.overlap and p.seconds > compute[p.ranks]]
    hidden = statistics.median((ideal[p] / share - (p.seconds - compute[p.ranks])) / compute[p.ranks] for p in beside)

    def error(p: Point) -> float:
        exposed = max(0.0, ideal[p] / share - (hidden if p.overlap else 0.0) * compute[p.ranks])
        return abs((compute[p.ranks] + exposed) / p.seconds - 1)

    return Fit(share, hidden, max(map(error, limited)))


def extrapolate(fitted: Fit, devices: int) -> dict[str, float]:
    """Return the seconds of a step of SmolLM2-135M on H100s, and what of it is the network and saving.

    Each device takes the preset's own step. A tree of messages takes ``2 log2(N)`` of them for each bucket; up to eight
    devices share a machine and its faster links.
    """
    config = load_preset("smollm2-135m")
    h100 = next(device for device in DEVICES if device.name == "H100 SXM")
    compute = predict_speed(config, h100).step_seconds
    size = 4 * total_parameters(config.model)
    rate = (h100.link if devices <= 8 else NETWORK) * LINK_SHARE
    messages = 2 * math.log2(devices) * math.ceil(size / BUCKET) * LATENCY
    crossing = 2 * (devices - 1) / devices * size / rate + messages
    exposed = max(0.0, crossing - fitted.hidden * compute)
    saving = 3 * size / (DISK * math.ceil(devices / 8)) / SAVE_EVERY
    seconds = compute + exposed + saving
    return {
        "devices": devices,
        "step": seconds,
        "crossing": crossing,
        "exposed": exposed,
        "saving": saving,
        "tokens_per_second": devices * config.batch.global_batch_tokens / seconds,
        "efficiency": compute / seconds,
    }


def tables(points: Sequence[Point], fitted: Fit) -> str:
    """Return what was measured, what was fitted, and what follows, as Markdown."""
    alone = next(p.seconds for p in points if p.ranks == 1)
    measured = [
        [str(p.ranks), p.strategy if p.overlap else f"{p.strategy}, reduced after the backward pass",
         f"{p.megabits:,} Mbit/s" if p.megabits else "loopback", f"{p.seconds:.3f}", f"{p.seconds / alone:.2f}"]
        for p in points
    ]  # fmt: skip
    far = [extrapolate(fitted, devices) for devices in FAR]
    rows = [
        [f"{one['devices']:,.0f}", f"{1000 * one['step']:.0f} ms", f"{1000 * one['crossing']:.1f} ms",
         f"{1000 * one['exposed']:.1f} ms", f"{1000 * one['saving']:.1f} ms", f"{one['tokens_per_second']:,.0f}",
         f"{one['efficiency']:.0%}"]
        for one in far
    ]  # fmt: skip
    said = f"share of the link {fitted.share:.2f}, hidden beside the backward pass {fitted.hidden:.2f} of a step's"
    return "\n".join([
        *markdown_table(("ranks", "strategy", "link of a rank", "step, s", "against one rank"), measured), "",
        f"Fitted: {said} computation; the largest error of a step is {fitted.error:.0%}.", "",
        *markdown_table(("H100s", "step", "all-reduce", "exposed", "saving", "tokens/s", "efficiency"), rows), "",
    ])  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="A JSON file for the points.")] = Path("network.json"),
    part: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
    place: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure steps over slow links, and extrapolate."""
    show_messages()
    if part:
        train_part(Point(**json.loads(part)), folder, place)
        return
    with tempfile.TemporaryDirectory(prefix="resmol-network-") as name:
        texts, points = made_text(DOCUMENTS), []
        tokenizer = train_tokenizer(Path(name) / "tokenizer", from_texts(texts), VOCABULARY)
        prepare(Path(name) / "data", from_texts(texts), tokenizer, val_fraction=0.01)
        for number, point in enumerate(POINTS, 1):
            points.append(measure(point, Path(name)))
            logger.info(f"point {number} of {len(POINTS)}: {asdict(points[-1])}")
    fitted = fit(points, 4 * total_parameters(configuration(Point(1)).model))
    found = {"machine": machine_facts(1), "points": [asdict(p) for p in points], "fit": asdict(fitted)}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(tables(points, fitted))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ResmolError as error:
        sys.exit(f"error: {error.what}\n  fix: {error.fix}")
