"""Worker of `resmol bench generate`: transformers' ``model.generate``, greedy, with its cache, as its users call it.

``tuned`` adds what its documentation recommends for speed: a static cache and a compiled forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from resmol.bench.workers.generate import generation_metrics
from resmol.bench.workers.main import Metrics, worker_main


class Clock(transformers.StoppingCriteria):  # type: ignore[misc] # transformers has no types here
    """Records the time of each token, as a stopping criterion that never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Record the time; never stop."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_with_transformers(task: Mapping[str, Any]) -> Metrics:
    """Load the model, decode once as a warm-up (and to compile), and decode once more for the measurement."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["precision"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(task["folder"], dtype=dtype).eval()
    model.to(task["device"])
    model.generation_config.eos_token_id = None  # a fixed length, as ours
    if task["tuned"]:
        model.forward = torch.compile(model.forward)
    prompts = torch.tensor(task["prompts"], device=task["device"])
    options = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": task["new"],
        "do_sample": False,
        "use_cache": True,
        **({"cache_implementation": "static"} if task["tuned"] else {}),
    }
    for _ in range(2):
        clock, started = Clock(), time.perf_counter()
        criteria = transformers.StoppingCriteriaList([clock])
        found = model.generate(prompts, stopping_criteria=criteria, **options)
    times = clock.times
    new = found[:, prompts.shape[1] :].tolist()
    metrics = generation_metrics(new, prompts.shape[1], times[0] - started, times[-1] - times[0])
    return {**metrics, "versions": {"transformers": transformers.__version__}}


if __name__ == "__main__":
    worker_main(generate_with_transformers)
