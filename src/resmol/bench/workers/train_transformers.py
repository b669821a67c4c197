"""Worker of `resmol bench train`: transformers.Trainer, used as its users use it.

It gets our initial weights and our windows in our order, so its losses must be ours; the same batch, steps and
hyperparameters; and no logging, saving, evaluation or progress bar, which would slow it down. All else is its default.
``tuned`` adds what its documentation recommends for speed: torch_compile and the fused optimizer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from resmol.bench.workers.main import Metrics, worker_main


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of T tokens and their targets; ``shift_labels`` keeps the model from shifting the targets once more."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._inputs, self._targets = tensors["input_ids"], tensors["targets"]

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window."""
        targets = self._targets[index]
        return {"input_ids": self._inputs[index], "labels": targets, "shift_labels": targets}


class Stopwatch(transformers.TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Times each step, from the fetched batch to the finished update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the time of a step."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the time of the step."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._started)


def build_model(task: Mapping[str, Any]) -> Any:
    """Return transformers' model with the weights of the task."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**task["model"]))
    missing, unexpected = model.load_state_dict(load_file(task["weights"]), strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if name != "lm_head.weight"], missing
    model.tie_weights()
    return model


def training_arguments(task: Mapping[str, Any], folder: str) -> Any:
    """Return the Trainer's arguments: the task's hyperparameters, training alone, and otherwise the defaults."""
    optimizer, tuned, on_cpu = task["optimizer"], task["tuned"], task["device"] == "cpu"
    faster = {"torch_compile": True, "optim": "adamw_torch_fused"} if tuned else {}
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=task["rows"],
        max_steps=task["steps"],
        learning_rate=optimizer["lr"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["clip_norm"],
        lr_scheduler_type=task["lr_scheduler"],
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=task["precision"] == "bfloat16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        **faster,
    )


def train_with_trainer(task: Mapping[str, Any]) -> Metrics:
    """Train with transformers.Trainer; return its speed after the warm-up and its mean loss over all steps."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=build_model(task),
            args=training_arguments(task, folder),
            train_dataset=Windows(load_file(task["windows"])),
            callbacks=[watch],
        )
        done = trainer.train()
    timed = watch.seconds[task["warmup"] :]
    return {
        "tokens_per_second": task["rows"] * task["seq_len"] * len(timed) / sum(timed),
        "step_seconds": timed,
        "mean_loss": done.training_loss,
        "versions": {"transformers": transformers.__version__},
    }


if __name__ == "__main__":
    worker_main(train_with_trainer)
