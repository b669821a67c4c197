"""Worker of `resmol bench generate`: greedy decoding by resmol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from resmol.bench.workers.main import Metrics, worker_main
from resmol.inference.generate import DecodingState, decode, decode_batch
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import load_model
from resmol.model.llama import CausalLM


def continuations(model: CausalLM, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[list[int]], float, float]:
    """Continue each prompt greedily by ``new`` tokens, all prompts together.

    Returns:
        The new tokens, the seconds until each prompt has its first one (prefill), and the seconds of all others.
    """
    sampling = SamplingParams(max_new_tokens=new, temperature=0)
    rows = [DecodingState(model.config, prompt, sampling, eos_id=None) for prompt in prompts]
    started = time.perf_counter()
    passes = decode(model, rows[0]) if len(rows) == 1 else decode_batch(model, rows)
    for _ in rows:
        next(passes)  # the first pass for each prompt is the one over the prompt
    prefilled = time.perf_counter()
    for _ in passes:
        pass
    return [row.tokens for row in rows], prefilled - started, time.perf_counter() - prefilled


def generation_metrics(tokens: list[list[int]], prompt: int, prefill: float, decoding: float) -> Metrics:
    """Return the speeds; the first token of each sequence counts as prefill, the others as decoding."""
    later = sum(len(sequence) - 1 for sequence in tokens)
    return {
        "tokens_per_second": later / decoding,
        "prefill_per_second": len(tokens) * prompt / prefill,
        "prefill_seconds": prefill,
        "decoding_seconds": decoding,
        "tokens": tokens,
    }


def generate_with_resmol(task: Mapping[str, Any]) -> Metrics:
    """Load the model, decode once as a warm-up, and decode once more for the measurement."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    model = load_model(task["folder"], device=task["device"], precision=task["precision"]).model
    continuations(model, task["prompts"], task["new"])
    tokens, prefill, decoding = continuations(model, task["prompts"], task["new"])
    return generation_metrics(tokens, len(task["prompts"][0]), prefill, decoding)


if __name__ == "__main__":
    worker_main(generate_with_resmol)
