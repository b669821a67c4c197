"""Worker of `resmol bench generate`: llama.cpp, greedy, by the generator of llama-cpp-python, with its defaults."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import llama_cpp

from resmol.bench.workers.generate import generation_metrics
from resmol.bench.workers.main import Metrics, worker_main


def generate_with_llama_cpp(task: Mapping[str, Any]) -> Metrics:
    """Load the GGUF file, decode once as a warm-up, and decode once more for the measurement."""
    (prompt,), new = task["prompts"], task["new"]
    threads = {"n_threads": task["threads"], "n_threads_batch": task["threads"]}
    model: Any = llama_cpp.Llama(task["file"], n_ctx=len(prompt) + new, verbose=False, **threads)
    for _ in range(2):
        model.reset()
        tokens, times, started = [], [], time.perf_counter()
        for token in islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), new):
            tokens.append(int(token))
            times.append(time.perf_counter())
    metrics = generation_metrics([tokens], len(prompt), times[0] - started, times[-1] - times[0])
    units = ", ".join(re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode()))
    return {**metrics, "versions": {"llama-cpp-python": llama_cpp.__version__}, "units": units}


if __name__ == "__main__":
    worker_main(generate_with_llama_cpp)
