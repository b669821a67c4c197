"""Worker of `resmol bench learn`: transformers.Trainer, and the held-out loss of its model on the way.

It trains as in `train_transformers`, from our initial weights on our windows in our order. The held-out windows are
those that resmol evaluates on; the time that this takes is no time of training.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from resmol.bench.workers.main import Metrics, worker_main
from resmol.bench.workers.train_transformers import Stopwatch, Windows, build_model, training_arguments

ROWS = 8  # windows whose logits exist at the same time


class HeldOut(transformers.TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Measures the held-out loss after some steps."""

    def __init__(self, task: Mapping[str, Any], watch: Stopwatch) -> None:
        self.points: list[dict[str, float]] = []
        self._task, self._watch, self._windows = task, watch, load_file(task["held_out"])

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Measure after every so many steps, and after the last one."""
        step, task = state.global_step, self._task
        if step % task["evaluate_every"] and step != task["steps"]:
            return
        loss = held_out_loss(model, self._windows)
        predicted = int((self._windows["targets"] != -100).sum())
        self.points.append(
            {
                "step": step,
                "tokens": step * task["step_tokens"],
                "seconds": round(sum(self._watch.seconds), 3),
                "loss": loss / predicted,
                "bits_per_byte": loss / math.log(2) / task["held_out_bytes"],
            }
        )


@torch.no_grad()
def held_out_loss(model: Any, windows: Mapping[str, Tensor]) -> float:
    """Return the summed loss of a model on windows, in nats."""
    model.eval()
    total, chunks = 0.0, zip(windows["input_ids"].split(ROWS), windows["targets"].split(ROWS), strict=True)
    for input_ids, targets in chunks:
        logits = model(input_ids=input_ids.to(model.device)).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(model.device), reduction="sum"))
    model.train()
    return total


def learn_with_trainer(task: Mapping[str, Any]) -> Metrics:
    """Train with transformers.Trainer; return its curve."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    watch = Stopwatch()
    held_out = HeldOut(task, watch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=build_model(task),
            args=training_arguments(task, folder),
            train_dataset=Windows(load_file(task["windows"])),
            callbacks=[watch, held_out],  # in this order: the time of a step ends before the evaluation
        )
        trainer.train()
    return {"curve": held_out.points, "versions": {"transformers": transformers.__version__}}


if __name__ == "__main__":
    worker_main(learn_with_trainer)
