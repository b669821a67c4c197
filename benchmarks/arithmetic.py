"""Measure a slice of training in float32 by each library and in bfloat16: what `auto` rests on (train/autotune.py).

    python benchmarks/arithmetic.py                                   # nano and SmolLM2-135M, short and long windows
    python benchmarks/arithmetic.py --preset smollm2-360m --sizes 1x128 4x512

The slice has one block and its share of the vocabulary, so that blocks and output layer have the weight that they have
in the whole model. The candidates take turns, and the best times count: other programs can only make a time longer.
Prints a Markdown table: milliseconds for forward and backward, and what `auto` chooses there.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.model.flops import training_flops_per_token
from resmol.model.linear import set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.system.host import processor_name
from resmol.train.autotune import bfloat16_unit, resolve_auto
from resmol.train.devices import deterministic_kernels
from resmol.train.parallel import Runtime

CANDIDATES = ("mkl", "onednn", "bfloat16")
ROUNDS = 7


def slice_of(config: ModelConfig) -> ModelConfig:
    """Return the configuration of one block and its share of the vocabulary."""
    lowest = max(config.bos_token_id, config.eos_token_id) + 1
    vocabulary = max(lowest, config.vocab_size // config.num_hidden_layers)
    return config.model_copy(update={"num_hidden_layers": 1, "vocab_size": vocabulary})


def measured_seconds(config: RunConfig) -> dict[str, float]:
    """Return the best seconds of forward and backward for each candidate."""
    model = CausalLM(slice_of(config.model), attention=config.runtime.attention)
    shape = (config.batch.micro_batch_size, config.data.seq_len)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % model.config.vocab_size
    documents = torch.zeros_like(ids) if config.data.document_mask else None
    seconds = dict.fromkeys(CANDIDATES, math.inf)
    with deterministic_kernels(torch.device("cpu")):
        for candidate in CANDIDATES * ROUNDS:
            set_matmul_backend(model, "onednn" if candidate == "onednn" else "mkl")
            precision = torch.bfloat16 if candidate == "bfloat16" else None
            started = time.perf_counter()
            with Runtime.single("cpu", precision).autocast():
                loss = model.loss(ids, ids, documents, config.runtime.loss_chunk_tokens)
            loss.backward()
            seconds[candidate] = min(seconds[candidate], time.perf_counter() - started)
    return seconds


def main() -> None:
    """Parse the options, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["nano", "smollm2-135m-cpu"])
    parser.add_argument("--sizes", nargs="+", default=["1x64", "1x128", "8x64", "2x512"], help="windows x tokens")
    options = parser.parse_args()
    print(f"{processor_name()}, {torch.get_num_threads()} threads; unit for bfloat16: {bfloat16_unit() or 'none'}\n")
    print("| model | micro-batch | operations | mkl | onednn | bfloat16 | auto |\n" + "| --- " * 7 + "|")
    for preset in options.preset:
        for size in options.sizes:
            rows, length = (int(number) for number in size.split("x"))
            sizes = [f"batch.micro_batch_size={rows}", f"data.seq_len={length}"]
            config = load_preset(preset, [*sizes, f"batch.global_batch_tokens={rows * length}", "runtime.device=cpu"])
            runtime = resolve_auto(config.replace({"runtime.precision": "auto", "runtime.matmul_backend": "auto"}))[
                0
            ].runtime
            times = " | ".join(f"{1000 * value:.1f} ms" for value in measured_seconds(config).values())
            flops = rows * length * training_flops_per_token(config.model, length)
            chosen = runtime.precision if runtime.precision == "bfloat16" else runtime.matmul_backend
            print(f"| {preset} | {rows} x {length} | {flops:.1e} | {times} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
