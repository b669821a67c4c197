"""The gradient of a step: a sum over its tokens, over all micro-batches and ranks; never a mean of means.

Each rank adds up the gradients of the summed loss of its micro-batches. With several ranks that each hold the whole
model, PyTorch's DistributedDataParallel (Li et al. 2020) adds them up over the ranks in buckets, during the last
micro-batch's backward pass. Where they share the model, FSDP2 does (`sharding.py`). Two ranks with one micro-batch
each give the bits of one process with two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resmol.config.run_config import RunConfig
from resmol.data.loader import Batch
from resmol.model.llama import CausalLM, DocumentIds
from resmol.model.varlen_attention import DocumentOffsets, document_offsets
from resmol.train.devices import to_device
from resmol.train.parallel import Runtime

REDUCTION = "reduction of the gradients"


class _Loss(nn.Module):
    """The loss as a forward pass, as DDP wants it."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        """Return the summed loss (`CausalLM.loss`)."""
        return self.model.loss(*arguments)


def replicated(model: CausalLM, runtime: Runtime) -> DistributedDataParallel:
    """Wrap a model that each rank holds whole, so that backward passes add up its gradients over the ranks.

    DDP forms its buckets anew after the first backward pass, in the order in which that one finished the gradients. A
    ring all-reduce adds in an order that depends on the place in a bucket, so the first step after a resume would have
    other bits than in an uninterrupted run. Here the first backward pass is one of a single token, whose gradient
    nobody uses: all steps have the same buckets.

    A collective: all ranks must call it.
    """
    ddp = DistributedDataParallel(_Loss(model), init_sync=False, gradient_as_bucket_view=True)
    ddp.register_comm_hook(runtime, lambda runtime, bucket: _sum_over_ranks(runtime, bucket))  # it reads annotations
    token = torch.zeros((1, 1), dtype=torch.long, device=runtime.device)
    with runtime.collective(REDUCTION), torch.compiler.set_stance("force_eager"):
        ddp(token, token).backward()
    model.zero_grad(set_to_none=True)
    return ddp


def _sum_over_ranks(runtime: Runtime, bucket: Any) -> Any:
    """Return the future of a bucket's sum over the ranks; DDP's own hook would divide it by their number."""
    if bucket.is_last() and runtime.monitor is not None:
        runtime.monitor.waits()
    reduction: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return reduction.get_future().then(lambda done: done.value()[0])


def accumulate_gradients(
    model: CausalLM | DistributedDataParallel,
    batches: Sequence[Batch],
    config: RunConfig,
    runtime: Runtime,
    factor: float | None = None,
    length: int | None = None,
) -> Tensor:
    """Add up the gradients of the *summed* loss over micro-batches and ranks; return the summed loss.

    Args:
        model: Its gradients are added to; `replicated` where several ranks hold all of it.
        batches: The micro-batches of this rank.
        config: Chunking of the loss.
        runtime: Device, arithmetic and the other ranks.
        factor: What the gradients, but not the loss, are multiplied by (`loss_scale.factor_of_sum`); None is 1.
        length: Tokens that a row of the forward pass has (`DataConfig.seq_len_at`); None leaves windows whole.
    """
    compute: Callable[..., Tensor] = model.loss if isinstance(model, CausalLM) else model
    seed = None if factor is None else torch.tensor(factor, device=runtime.device)
    total = torch.zeros((), device=runtime.device)
    for number, window_batch in enumerate(batches):
        batch = window_batch if length is None else window_batch.cut(length)
        documents = _documents(batch, config, runtime)
        input_ids, targets = (to_device(ids, runtime.device) for ids in (batch.input_ids, batch.targets))
        with _reduced(model, runtime, last=number == len(batches) - 1):
            with runtime.autocast():
                loss = compute(input_ids, targets, documents, config.runtime.loss_chunk_tokens)
            loss.backward(seed)
        total += loss.detach()
    runtime.all_reduce_sum(total)
    return total


def _documents(batch: Batch, config: RunConfig, runtime: Runtime) -> DocumentIds:
    ids = batch.document_ids
    if ids is None or config.runtime.attention != "varlen":
        return None if ids is None else to_device(ids, runtime.device)
    offsets, longest = document_offsets(ids)
    return DocumentOffsets(to_device(offsets, runtime.device), longest)


@contextmanager
def _reduced(model: CausalLM | DistributedDataParallel, runtime: Runtime, *, last: bool) -> Iterator[None]:
    """Surround forward and backward pass of a micro-batch; what can wait for the last one is reduced in that.

    FSDP adds up each micro-batch over the ranks that share the model, since a rank has no room for a whole gradient;
    only between replicas it waits for the last one.
    """
    with runtime.collective(REDUCTION, computes=True):
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
            return
        if runtime.mesh is not None:
            cast("Any", model).set_requires_all_reduce(last)
            assert runtime.monitor is not None
            runtime.monitor.waits()  # every layer does
        yield
