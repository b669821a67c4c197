"""`resmol bench generate`: greedy decoding of resmol, of a peer, and at the bandwidth of memory."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from resmol.bench.comparison import MEMORY, Comparison, Quantity, make_variants
from resmol.bench.machine import machine_facts, require_baseline, require_precision
from resmol.bench.subprocess_runs import run_worker
from resmol.bench.workers.main import Metrics
from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import UsageError
from resmol.interop.description import Description
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.export.gguf_writer import KINDS, write_gguf
from resmol.interop.load import load_model
from resmol.interop.special_tokens import SpecialTokens
from resmol.model.flops import total_parameters
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import weight_tensors
from resmol.train.devices import find_device

BASELINES = {"transformers": ("transformers",), "llama.cpp": ("llama-cpp-python",)}
GGUF_TYPES = {"float32": ("float32",), "bfloat16": ("float16", "q8_0")}  # what llama.cpp's users decode with
DECODING = Quantity("tokens_per_second", "tokens/s", ",.1f")
PREFILL = Quantity("prefill_per_second", "prompt, tokens/s")


@dataclass(frozen=True)
class GenerateBench:
    """What to compare.

    Attributes:
        config: The configuration; only its model and runtime are used.
        batches: Sequences that are decoded together; each number is a comparison of its own.
        prompt: Tokens of the prompt.
        new: Tokens to generate.
        baseline: One of `BASELINES`, or None to measure resmol alone.
        repeats: Rounds.
        precision: ``float32`` or ``bfloat16``, of the weights.
    """

    config: RunConfig
    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    new: int = 128
    baseline: str | None = None
    repeats: int = 5
    precision: str = "float32"

    def __post_init__(self) -> None:
        least = {"repeats": 1, "prompt": 1, "new": 2, "batch": 1}
        given = {"repeats": self.repeats, "prompt": self.prompt, "new": self.new, "batch": min(self.batches)}
        for name, value in given.items():
            if value < least[name]:
                raise UsageError(f"--{name} is {value}", fix=f"give at least {least[name]}")
        context = self.config.model.max_position_embeddings
        if self.prompt + self.new > context:
            raise UsageError(f"{self.prompt} + {self.new} tokens exceed the context of {context}", fix="give fewer")
        require_precision(self.precision)
        if self.baseline == "llama.cpp" and (
            max(self.batches) > 1 or self.config.runtime.device not in ("auto", "cpu")
        ):
            raise UsageError("--peer llama.cpp decodes one text on a processor", fix="leave --batch and --device out")
        require_baseline(self.baseline, BASELINES)


def generation_comparisons(bench: GenerateBench, folder: Path) -> list[Comparison]:
    """Return a comparison for each batch, ready to run; all read the model that is written to ``folder`` once."""
    model = folder / "model"
    write_model(bench.config, model)
    return [_comparison(bench, batch, model, folder) for batch in bench.batches]


def _comparison(bench: GenerateBench, batch: int, model: Path, folder: Path) -> Comparison:
    config = bench.config
    task = {
        "folder": str(model),
        "prompts": random_prompts(config.model, batch, bench.prompt),
        "new": bench.new,
        "threads": config.runtime.threads,
        "device": find_device(config.runtime.device).type,
        "precision": bench.precision,
    }

    def resmol() -> Metrics:
        return run_worker("resmol.bench.workers.generate", {**task, "keep_freed_memory": True}, folder)

    def roofline() -> Metrics:
        sizes = {"of": "generation", "batch": batch, "prompt": bench.prompt, "new": bench.new}
        own = {**sizes, "model": config.model.model_dump(), "precision": bench.precision}
        own |= {"threads": config.runtime.threads, "device": task["device"]}
        return run_worker("resmol.bench.workers.roofline", {**own, "keep_freed_memory": True}, folder)

    return Comparison(
        title=f"greedy decoding with {config.name}, {batch} x ({bench.prompt} + {bench.new}) tokens, {bench.precision}",
        metric=DECODING,
        columns=(PREFILL, MEMORY),
        variants=make_variants(resmol, _peers(bench, task, folder), ("roofline: reading the weights", roofline)),
        facts={**machine_facts(config.runtime.threads), "parameters": total_parameters(config.model)},
        notes=generation_notes,
    )


def _peers(bench: GenerateBench, task: Metrics, folder: Path) -> dict[str, Callable[[], Metrics]]:
    """Return the measurements of the peer, by the name of their rows."""

    def transformers(*, tuned: bool) -> Metrics:
        own = {**task, "tuned": tuned, "keep_freed_memory": tuned}
        return run_worker("resmol.bench.workers.generate_transformers", own, folder)

    def llama_cpp(dtype: str) -> Metrics:
        file = folder / f"{dtype}.gguf"
        if not file.exists():
            _write_gguf(bench.config, Path(task["folder"]), file, dtype)
        own = {**task, "file": str(file), "threads": task["threads"] or torch.get_num_threads()}
        return run_worker("resmol.bench.workers.generate_llama_cpp", own, folder)

    if bench.baseline == "transformers":
        return {
            "transformers generate": partial(transformers, tuned=False),
            "transformers generate, tuned": partial(transformers, tuned=True),
        }
    if bench.baseline == "llama.cpp":
        return {f"llama.cpp {KINDS[dtype]}": partial(llama_cpp, dtype) for dtype in GGUF_TYPES[bench.precision]}
    return {}


def _write_gguf(config: RunConfig, folder: Path, file: Path, dtype: str) -> None:
    """Write the model of a folder as a GGUF file, with a vocabulary of its size."""
    tokenizer = load_tokenizer(None, sha256=config.tokenizer.sha256)
    roles = dict.fromkeys(("bos_token", "eos_token"), tokenizer.eos_id)
    described = ExportedTokenizer(tokenizer, SpecialTokens(roles, (tokenizer.eos_id,)))
    model = load_model(folder, tokenizer=tokenizer).model.requires_grad_(False)
    write_gguf(file, model, described, dtype, Description(config.name))


def write_model(config: RunConfig, folder: Path) -> None:
    """Write a model with random weights as a Hugging Face folder, which both loaders read."""
    model = CausalLM.empty(config.model)
    model.init_weights(config.train.seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model.to_hf()), encoding="utf-8", newline="\n")
    tensors = {name: tensor.detach().contiguous() for name, tensor in weight_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def random_prompts(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """Return the same random prompts on each call, without the tokens that begin or end a text."""
    draw = random.Random(0)  # noqa: S311 - a prompt, no secret
    special = {config.bos_token_id, config.eos_token_id}
    ordinary = [token for token in range(config.vocab_size) if token not in special] or [config.eos_token_id]
    return [draw.choices(ordinary, k=length) for _ in range(batch)]


def generation_notes(comparison: Comparison) -> list[str]:
    """Describe the roofline, and count the tokens that are the same."""
    notes = []
    ours = comparison.reference.measurements[0]["tokens"]
    if roofline := comparison.of_kind("roofline"):
        read = statistics.median(roofline.values("read_bytes_per_second"))
        prompt = statistics.median(roofline.values(PREFILL.key))
        reached = 100 * statistics.median(comparison.reference.values(PREFILL.key)) / prompt
        notes.append(
            f"Memory is read at {read / 1e9:.1f} GB/s. The matmuls of the prompt alone would run at "
            f"{prompt:,.0f} tokens/s, of which resmol has {reached:.0f} %."
        )
    peers = [one for one in comparison.variants if one.kind == "other" and one.measurements]
    notes += {
        f"llama.cpp computes with {one.measurements[0]['units']}." for one in peers if "units" in one.measurements[0]
    }
    for one in peers:
        same, total = equal_tokens(ours, one.measurements[0]["tokens"])
        notes.append(f"{one.name} generated the same {same} of {total} tokens, counted up to the first difference.")
    return notes


def equal_tokens(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """Return the number of equal tokens before the first difference in each sequence, and the number of all tokens."""
    same = 0
    for left, right in zip(ours, theirs, strict=True):
        differing = [number for number, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]]
        same += differing[0] if differing else len(left)
    return same, sum(map(len, ours))
