"""The held-out loss, as a mean over tokens and as bits per byte of text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from resmol.data.loader import Batch
from resmol.errors import DataError
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.model.llama import CausalLM
from resmol.train.parallel import Runtime


@dataclass(frozen=True)
class Evaluation:
    """A held-out loss.

    Attributes:
        loss: Nats per token, a mean over all tokens (not a mean of means).
        tokens: How many tokens were predicted.
        bytes: How many bytes of UTF-8 these tokens stand for.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The same loss per byte of text, which does not depend on the tokenizer; NaN without any bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(
    model: CausalLM,
    batches: Iterable[Batch],
    byte_lengths: Int[np.ndarray, " V"],
    runtime: Runtime,
    chunk_tokens: int = 256,
) -> Evaluation:
    """Return the loss of ``model`` on ``batches``; neither its mode nor any random state changes.

    Args:
        model: The model, on the runtime's device.
        batches: Windows in order, each token a target once.
        byte_lengths: Bytes that each token id stands for; special tokens stand for none.
        runtime: Device and arithmetic, the same as in training.
        chunk_tokens: Tokens whose logits exist at the same time.

    Raises:
        DataError: There is nothing to evaluate on.
    """
    total, tokens, covered = 0.0, 0, 0
    for batch in batches:
        input_ids, targets = batch.input_ids.to(runtime.device), batch.targets.to(runtime.device)
        documents = None if batch.document_ids is None else batch.document_ids.to(runtime.device)
        with runtime.autocast():
            total += float(model.loss(input_ids, targets, documents, chunk_tokens))
        tokens += batch.tokens
        counted = batch.targets[batch.targets != IGNORE_INDEX].numpy()
        covered += int(byte_lengths[counted].sum())
    if not tokens:
        raise DataError(
            "there are no held-out tokens to evaluate on", fix="prepare the data with --val-fraction above 0"
        )
    return Evaluation(total / tokens, tokens, covered)
