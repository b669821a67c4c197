"""What only an accelerator can show, in one call of eight minutes at most: ``python benchmarks/gpu.py`` (`make gpu`).

It needs PyTorch, transformers and the other dependencies of the package, and no network: text and tokenizer are made
here. Each part is a process of its own with a limit on its time, and the results are written after each, so a part
that fails or hangs costs itself alone. ``--dry`` runs the same code at a toy's size on the processor.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from resmol.bench.comparison import Comparison, markdown_table
from resmol.bench.generate import GenerateBench, generation_comparisons, write_model
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, run_process
from resmol.bench.train import TrainBench, training_comparisons
from resmol.cli.terminal import show_messages
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import open_dataset
from resmol.data.tokenizer_training import train_tokenizer
from resmol.errors import ResmolError
from resmol.model.llama import CausalLM
from resmol.run.directory import RunDir
from resmol.train.build import make_loader, new_state
from resmol.train.devices import VARLEN, deterministic_kernels, device_name, find_device
from resmol.train.parallel import Runtime
from resmol.train.start import train_model
from resmol.train.step import train_steps

logger = logging.getLogger("resmol.benchmarks.gpu")

ROOT = Path(__file__).resolve().parents[1]
TIMED_STEPS, RESUMED_AT, RESUMED_TO = 10, 8, 12
VOCABULARY = 4096  # of the made tokenizer; the model keeps its own size


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        preset: The model.
        device: As for ``runtime.device``.
        length: Tokens of a window.
        windows: Windows of a step; each number is a comparison of its own.
        steps: Timed steps of a comparison.
        new: Tokens to generate.
        documents: Of the text that is made.
        precisions: What parity is measured in.
    """

    preset: str = "smollm2-135m"
    device: str = "cuda"
    length: int = 2048
    windows: tuple[int, ...] = (8, 1, 64)
    steps: int = TIMED_STEPS
    new: int = 256
    documents: int = 20_000
    precisions: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def configuration(self, tokenizer_sha256: str, **changes: Any) -> RunConfig:
        """Return the configuration of a step of the first number of windows, in bfloat16."""
        return load_preset(self.preset).replace(
            {
                "tokenizer.sha256": tokenizer_sha256,
                "runtime.device": self.device,
                "runtime.precision": "bfloat16",
                "data.seq_len": self.length,
                "batch.micro_batch_size": self.windows[0],
                "batch.global_batch_tokens": self.windows[0] * self.length,
                **{key.replace("__", "."): value for key, value in changes.items()},
            }
        )


DRY = Sizes("nano", "cpu", length=16, windows=(2, 1), steps=2, new=4, documents=400, precisions=("float32", "bfloat16"))


def made_text(count: int) -> list[str]:
    """Return documents of made-up words, the same on each call."""
    draw = random.Random(0)
    syllables = ["ka", "lo", "mi", "ner", "ta", "shu", "ver", "ing", "the", "an", "o", "re", "st", "un"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    return [" ".join(draw.choices(words, k=draw.randint(50, 400))) + "." for _ in range(count)]


def prepared(sizes: Sizes, folder: Path) -> tuple[str, RunConfig]:
    """Return a prepared folder with the text, which is made the first time, and the configuration that fits it."""
    data = folder / "data"
    if not data.exists():
        texts = made_text(sizes.documents)
        tokenizer = train_tokenizer(folder / "tokenizer", from_texts(texts), VOCABULARY)
        prepare(data, from_texts(texts), tokenizer, val_fraction=0.01)
    return str(data), sizes.configuration(open_dataset(data).tokenizer_sha256)


def facts(sizes: Sizes, _folder: Path) -> dict[str, Any]:
    """Name the machine, the accelerator and the versions."""
    device = find_device(sizes.device)
    return {**machine_facts(0), "device": device_name(device), "cuda": torch.version.cuda}


def tests(sizes: Sizes, _folder: Path) -> dict[str, Any]:
    """Run the tests that are marked for a GPU; in a dry run they are collected."""
    only = ["--collect-only"] if sizes == DRY else []
    files = [str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8")]
    done = run_process([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *only, *files])
    done.require_success()
    return {"said": done.stdout.strip().splitlines()[-1:]}


@torch.no_grad()
def parity(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Compare logits with transformers' on the device, both beside our float32 on the processor.

    Returns:
        For each precision the relative error in the norm of ours, of transformers', and between the two.
    """
    from transformers import AutoModelForCausalLM

    config = load_preset(sizes.preset)
    write_model(config, folder / "parity")
    ours = CausalLM.empty(config.model)
    ours.load_state_dict(load_file(folder / "parity" / "model.safetensors"), strict=False)
    ids = torch.randint(
        config.model.vocab_size, (2, min(512, 4 * sizes.length)), generator=torch.Generator().manual_seed(0)
    )
    exact, device, found = ours(ids).double(), find_device(sizes.device), {}
    for precision in sizes.precisions:
        dtype = getattr(torch, precision)
        theirs = AutoModelForCausalLM.from_pretrained(folder / "parity", dtype=dtype).to(device)
        left = ours.to(device, dtype)(ids.to(device)).double().cpu()
        right = theirs(ids.to(device)).logits.double().cpu()
        pairs = {"ours": (left, exact), "transformers": (right, exact), "between": (left, right)}
        found[precision] = {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    return found


def resume(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Train in one go and in two; the same tensors must be in both checkpoints, bit for bit."""
    data, config = prepared(sizes, folder)
    config = config.replace({**QUIET, "schedule.warmup_steps": 2})
    for name, stops in (("whole", (RESUMED_TO,)), ("parts", (RESUMED_AT, RESUMED_TO))):
        for stop in stops:
            tokenizer = folder / "tokenizer" / "tokenizer.json"
            train_model(config, folder / name, data=data, tokenizer=tokenizer, overrides=[f"train.steps={stop}"])
    one, two = (checkpoint_tensors(RunDir(folder / name)) for name in ("whole", "parts"))
    return {"tensors": len(one), "equal": sum(torch.equal(tensor, two[key]) for key, tensor in one.items())}


def checkpoint_tensors(run: RunDir) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint."""
    newest = max(run.checkpoints.glob("step-*"))
    return {f"{p.name}/{key}": value for p in newest.glob("*.safetensors") for key, value in load_file(p).items()}


def determinism(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time a step with kernels that give the same bits, and with any; say whether the bits were the same."""
    data, config = prepared(sizes, folder)
    found: dict[str, Any] = {}
    for name in ("reproducible", "any", "reproducible again", "any again"):
        seconds, bits = timed_steps(config, data, sizes, reproducible=name.startswith("reproducible"))
        found[name] = {"seconds": seconds, "loss_bits": bits}
    return found


def documents(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time a step whose attention stays inside documents by a mask, and by their borders alone; compare the bits."""
    data, config = prepared(sizes, folder)
    kinds = ("sdpa", "varlen") if find_device(sizes.device).type in VARLEN else ("sdpa",)
    found: dict[str, Any] = {}
    for name in (*kinds, *(f"{kind} again" for kind in kinds)):
        attention = config.replace({"runtime.attention": name.split()[0]})
        seconds, bits = timed_steps(attention, data, sizes, reproducible=True)
        found[name] = {"seconds": seconds, "loss_bits": bits}
    return found


def timed_steps(config: RunConfig, data: str, sizes: Sizes, *, reproducible: bool) -> tuple[float, str]:
    """Return the best seconds of a step, and the loss of the last as bits."""
    device, best, loss = find_device(sizes.device), float("inf"), 0.0
    with deterministic_kernels(device):
        torch.use_deterministic_algorithms(reproducible, warn_only=True)
        runtime = Runtime.single(device, torch.bfloat16)
        state, loader = new_state(config, runtime), make_loader(config, open_dataset(Path(data)).train)
        started = time.perf_counter()
        for result in train_steps(state, loader, config.replace({"train.steps": sizes.steps}), runtime):
            best, loss = min(best, time.perf_counter() - started), result.loss
            started = time.perf_counter()
    return best, loss.hex()


def training(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Compare training with the Trainer and with the roofline, at each number of windows."""
    data, config = prepared(sizes, folder)
    batches = tuple((windows, sizes.length) for windows in sizes.windows)
    wanted = TrainBench(
        config, batches=batches, precision="bfloat16", baseline="transformers", repeats=1, steps=sizes.steps, warmup=3
    )
    return compared(training_comparisons(wanted, folder, data), dry=sizes == DRY)


def decoding(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Compare greedy decoding with transformers and with the roofline."""
    config = sizes.configuration("0" * 64)
    wanted = GenerateBench(config, (1, 8), 4 if sizes == DRY else 128, sizes.new, baseline="transformers", repeats=1)
    return compared(generation_comparisons(wanted, folder / "decoding"), dry=sizes == DRY)


def compared(comparisons: Sequence[Comparison], *, dry: bool) -> dict[str, Any]:
    """Run comparisons; a dry one leaves out what takes a minute on a processor: compilation and the roofline."""
    for one in comparisons[: 1 if dry else None]:
        if dry:
            one.variants = [v for v in one.variants if v.kind in ("reference", "other") and "tuned" not in v.name]
        one.run(1, 0)
    return {"comparisons": [one.to_dict() | {"markdown": one.markdown()} for one in comparisons if one.rounds]}


@dataclass(frozen=True)
class Part:
    """One thing that is measured, and the most seconds that it may take."""

    measure: Callable[[Sizes, Path], dict[str, Any]]
    seconds: float


PARTS = {  # what matters most comes first: the time may end before the last
    "facts": Part(facts, 30),
    "tests": Part(tests, 90),
    "resume": Part(resume, 120),
    "parity": Part(parity, 60),
    "training": Part(training, 300),
    "determinism": Part(determinism, 60),
    "documents": Part(documents, 60),
    "decoding": Part(decoding, 120),
}


def measure_all(out: Path, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Measure each part in a process of its own, while there is time; write JSON and table after each.

    Args:
        out: Gets ``performance-gpu.json`` and ``performance-gpu.md``.
        seconds: The time of all parts together.
        dry: Whether a toy is measured on the processor.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="resmol-gpu-") as folder:
        for name, part in PARTS.items():
            logger.info(f"{name}: at most {min(part.seconds, ends - time.monotonic()):.0f} s")
            results[name] = measure_apart(name, Path(folder), min(part.seconds, ends - time.monotonic()), dry=dry)
            (out / "performance-gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (out / "performance-gpu.md").write_text(table(results), encoding="utf-8")
    return results


def measure_apart(name: str, folder: Path, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Measure a part in a process of its own; return its outcome, its seconds and what it found."""
    if seconds <= 0:
        return {"outcome": "no time was left"}
    result = folder / f"{name}.json"
    words = [sys.executable, __file__, "--part", name, "--folder", str(folder), *(["--dry"] if dry else [])]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = run_process(words, environment=environment, seconds=seconds)
    took = {"seconds": round(done.seconds, 1)}
    if done.timed_out:
        return {"outcome": f"took more than {seconds:.0f} s", **took}
    if done.code or not result.is_file():
        return {"outcome": f"failed: {done.error_tail}", **took}
    return {"outcome": "measured", **took, "found": json.loads(result.read_text(encoding="utf-8"))}


def table(results: dict[str, Any]) -> str:
    """Return the page of a measurement."""
    machine = results["facts"].get("found", {})
    lines = [
        "# On a GPU",
        "",
        f"Written by `make gpu`: {', '.join(f'{key} {value}' for key, value in machine.items())}.",
    ]
    rows = [
        [name, result["outcome"], f"{result.get('seconds', 0):.0f} s", summary(name, result)]
        for name, result in results.items()
    ]
    lines += ["", *markdown_table(("part", "outcome", "took", "found"), rows)]
    for name in ("training", "decoding"):
        for one in results.get(name, {}).get("found", {}).get("comparisons", []):
            lines += ["", one["markdown"].rstrip()]
    return "\n".join(lines) + "\n"


def summary(name: str, result: dict[str, Any]) -> str:
    """Return what a part found in a few words; comparisons have tables of their own."""
    found = result.get("found")
    if found is None or name in ("facts", "training", "decoding"):
        return ""
    if name == "resume":
        said = f"{found['equal']} of {found['tensors']} tensors of a checkpoint are equal, bit for bit, after"
        return f"{said} {RESUMED_AT} + {RESUMED_TO - RESUMED_AT} steps and after {RESUMED_TO}"
    if name == "parity":
        return "; ".join(
            f"{precision}: ours {e['ours']:.1e}, transformers {e['transformers']:.1e}" for precision, e in found.items()
        )
    if name == "determinism":
        best = {
            kind: min(v["seconds"] for k, v in found.items() if k.startswith(kind)) for kind in ("reproducible", "any")
        }
        same = found["reproducible"]["loss_bits"] == found["reproducible again"]["loss_bits"]
        cost = 100 * (best["reproducible"] / best["any"] - 1)
        return f"reproducible kernels cost {cost:+.1f} %; their bits were {'the same' if same else 'DIFFERENT'} twice"
    if name == "documents":
        return "; ".join(f"{kind}: {v['seconds']:.3f} s, loss {v['loss_bits']}" for kind, v in found.items())
    return " ".join(found["said"])


def main(
    dry: Annotated[bool, typer.Option("--dry", help="A toy on the processor.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of performance-gpu.json and .md.")] = ROOT / "docs",
    minutes: Annotated[float, typer.Option(help="The time of all parts together.")] = 8.0,
    part: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure what only an accelerator can show."""
    show_messages()
    if part:
        found = PARTS[part].measure(DRY if dry else Sizes(), folder)
        (folder / f"{part}.json").write_text(json.dumps(found), encoding="utf-8")
        return
    results = measure_all(out, 60 * minutes, dry=dry)
    failed = [name for name, result in results.items() if result["outcome"] != "measured"]
    print(table(results))
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except ResmolError as error:
        raise SystemExit(str(error)) from None
