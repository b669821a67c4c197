"""The held-out loss, as a mean over tokens and as bits per byte of text.

Several ranks share the batches, and the sums are added in the order of the text on each of them, so that the loss
does not depend on the number of ranks, not even in its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.data.loader import Batch
from resmol.errors import DataError
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.model.llama import CausalLM
from resmol.train.devices import to_device
from resmol.train.parallel import Runtime

TOKENS_AT_ONCE = 2048  # of a forward pass: enough that reading the weights is not what takes the time


@dataclass(frozen=True)
class Evaluation:
    """A held-out loss.

    Attributes:
        loss: Nats per token, a mean over all tokens (not a mean of means).
        tokens: Tokens that were predicted.
        bytes: Bytes of UTF-8 that these tokens stand for.
        batches: The summed loss of each batch and its tokens.
    """

    loss: float
    tokens: int
    bytes: int
    batches: tuple[tuple[float, int], ...] = ()

    @property
    def bits_per_byte(self) -> float:
        """The same loss per byte of text, which does not depend on the tokenizer; NaN without any bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    def by_source(self, sources: Sequence[int], names: Sequence[str]) -> dict[str, float]:
        """Return the mean over the tokens of each source, given the source that each batch is of."""
        losses = {}
        for number, name in enumerate(names):
            rows = [row for row, source in zip(self.batches, sources, strict=True) if source == number]
            if rows:  # a limit may leave none
                losses[name] = sum(loss for loss, _ in rows) / sum(tokens for _, tokens in rows)
        return losses


def windows_at_once(seq_len: int) -> int:
    """Return how many windows one forward pass takes, whatever training does: so the loss does not depend on that."""
    return max(1, TOKENS_AT_ONCE // seq_len)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    batches: Sequence[Batch],
    byte_lengths: Int[np.ndarray, " V"],
    runtime: Runtime,
    chunk_tokens: int = 256,
    *,
    spelled_bytes: int = 0,
) -> Evaluation:
    """Return the loss of ``model`` on ``batches``; neither its mode nor any random state changes.

    Each rank evaluates every ``world_size``-th batch; all of them must call this, and get the same result.

    Args:
        model: The model, on the runtime's device.
        batches: Windows in order, each token a target once; the same on every rank.
        byte_lengths: Bytes that each token id stands for; the end token stands for none.
        runtime: Device and arithmetic, the same as in training.
        chunk_tokens: Tokens whose logits exist at the same time.
        spelled_bytes: Bytes of the end tokens that the text spells (`Loader.spelled_ends`), in all batches.

    Raises:
        DataError: There is nothing to evaluate on.
    """
    if not batches:
        raise DataError(
            "there are no held-out tokens to evaluate on", fix="prepare the data with --val-fraction above 0"
        )
    # A row for each batch: summed loss, tokens, bytes. Rows of other ranks stay zero here, so adding them up is exact.
    sums = torch.zeros(len(batches), 3, dtype=torch.float64)
    # Ranks that share a model gather its weights together, so all of them do the same number of passes.
    end = len(batches) if runtime.mesh is None else -(-len(batches) // runtime.world_size) * runtime.world_size
    for number in range(runtime.rank, end, runtime.world_size):
        batch = batches[number % len(batches)]
        input_ids, targets = (to_device(ids, runtime.device) for ids in (batch.input_ids, batch.targets))
        documents = None if batch.document_ids is None else to_device(batch.document_ids, runtime.device)
        with runtime.gathered(model), runtime.autocast():
            loss = model.loss(input_ids, targets, documents, chunk_tokens)
        if number >= len(batches):
            continue
        covered = byte_lengths[batch.targets[batch.targets != IGNORE_INDEX].numpy()].sum()
        sums[number] = torch.tensor([float(loss), batch.tokens, int(covered)], dtype=torch.float64)
    return _add_up(sums, runtime, spelled_bytes)


def _add_up(sums: Float[Tensor, "N 3"], runtime: Runtime, spelled_bytes: int) -> Evaluation:
    """Collect the rows of all ranks, and add them one after the other, as a single rank does."""
    everything = sums.to(runtime.device)
    runtime.all_reduce_sum(everything)
    loss = tokens = covered = 0.0
    rows = everything.tolist()
    for row in rows:
        loss, tokens, covered = loss + row[0], tokens + row[1], covered + row[2]
    batches = tuple((row[0], int(row[1])) for row in rows)
    return Evaluation(loss / tokens, int(tokens), int(covered) + spelled_bytes, batches)
