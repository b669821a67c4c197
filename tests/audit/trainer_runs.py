"""Runs of transformers' Trainer: a tiny Llama, trained and resumed as people do, rightly and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SAMPLES, BATCH, TOKENS, VOCABULARY = 96, 4, 8, 64  # 24 steps an epoch


def samples(count: int = SAMPLES) -> list[dict[str, torch.Tensor]]:
    """Return texts that can be learned: every token is the one before it, plus a fixed number."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCABULARY, (count,), generator=generator)
    rows = [(start + 3 * torch.arange(TOKENS)) % VOCABULARY for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def train(
    folder: Path, stop: int, *, resume: Path | None = None, frozen: bool = False, rows: int = SAMPLES, **given: Any
) -> None:
    """Train up to a step, as a process that ends there would.

    Args:
        folder: Where the checkpoints go.
        stop: The step after which the process ends.
        resume: The checkpoint to go on from.
        frozen: Let no matrix but the embedding learn.
        rows: Samples in the data set.
        given: Training arguments that differ from the usual ones.
    """
    usual: dict[str, Any] = {
        "max_steps": 60, "learning_rate": 5e-3, "warmup_steps": 5, "lr_scheduler_type": "linear", "logging_steps": 2,
        "save_steps": 10, "per_device_train_batch_size": BATCH, "include_num_input_tokens_seen": True, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**usual, **given}
    )

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, _arguments: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= stop

    made = model()
    if frozen:
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("embed" in name or parameter.ndim == 1)
    trainer = transformers.Trainer(model=made, args=arguments, train_dataset=samples(rows), callbacks=[Ends()])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
