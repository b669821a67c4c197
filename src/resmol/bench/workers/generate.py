"""Ours in `resmol bench generate`: greedy decoding by `resmol.inference.generate`, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from resmol.bench.workers.main import Metrics, answer
from resmol.inference.generate import DecodingState, SamplingParams, decode, decode_batch
from resmol.interop.load import load_model
from resmol.model.llama import CausalLM


def continuations(model: CausalLM, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[list[int]], float, float]:
    """Continue each prompt greedily by ``new`` tokens, all prompts together.

    Returns:
        The new tokens, the seconds until each prompt has its first one, and the seconds of all others.
    """
    sampling = SamplingParams(max_new_tokens=new, temperature=0)
    rows = [DecodingState(model.config, prompt, sampling, eos_id=None) for prompt in prompts]
    started = time.perf_counter()
    passes = decode(model, rows[0]) if len(rows) == 1 else decode_batch(model, rows)
    for _ in rows:
        next(passes)  # the first passes, one for each prompt, are those over the prompts
    prefilled = time.perf_counter()
    for _ in passes:
        pass
    return [row.tokens for row in rows], prefilled - started, time.perf_counter() - prefilled


def generation_numbers(tokens: list[list[int]], prompt: int, prefill: float, decoding: float) -> Metrics:
    """Return the speeds: the first token of each sequence belongs to its prompt, the others to decoding."""
    later = sum(len(sequence) - 1 for sequence in tokens)
    return {
        "tokens_per_second": later / decoding,
        "prefill_per_second": len(tokens) * prompt / prefill,
        "prefill_seconds": prefill,
        "decoding_seconds": decoding,
        "tokens": tokens,
    }


def generate_ours(task: Mapping[str, Any]) -> Metrics:
    """Load the model, decode once as a warm-up, and once for the clock."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    model = load_model(task["folder"], device=task["device"]).model
    continuations(model, task["prompts"], task["new"])
    tokens, prefill, decoding = continuations(model, task["prompts"], task["new"])
    return generation_numbers(tokens, len(task["prompts"][0]), prefill, decoding)


if __name__ == "__main__":
    answer(generate_ours)
