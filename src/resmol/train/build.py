"""Build what a run works with: model and optimizer, batches, compiled blocks."""

from __future__ import annotations

import torch._functorch.config

from resmol.config.run_config import RunConfig
from resmol.data.loader import Loader
from resmol.data.shards import TokenStream
from resmol.model.linear import set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.train.loop import TrainState
from resmol.train.optimizer import build_optimizer
from resmol.train.parallel import Runtime

ACTIVATION_MEMORY_BUDGET = 0.9  # the share of what the compiler would keep for the backward pass by itself


def new_state(config: RunConfig, runtime: Runtime) -> TrainState:
    """Return a model with its initial weights, and an optimizer that has seen nothing."""
    model = CausalLM.empty(config.model, attention=config.runtime.attention)
    model.init_weights(config.train.seed)
    set_matmul_backend(model, "onednn" if config.runtime.matmul_backend == "onednn" else "mkl")
    model.model.activation_checkpointing = config.runtime.activation_checkpointing == "on"
    model.to(runtime.device)
    return TrainState(model, build_optimizer(model, config.optimizer))


def make_loader(config: RunConfig, stream: TokenStream) -> Loader:
    """Return the batches of a token stream, cut and shuffled as the configuration says."""
    return Loader(
        stream,
        seq_len=config.data.seq_len,
        micro_batch_size=config.batch.micro_batch_size,
        grad_accum_steps=config.grad_accum_steps,
        seed=config.data.seed,
        eos_id=config.model.eos_token_id,
        document_mask=config.data.document_mask,
    )


def compile_blocks(model: CausalLM, config: RunConfig) -> None:
    """Compile the transformer block, in place, where the configuration says so; names and weights stay.

    The compiler may keep less than all for the backward pass: it then computes again what costs no product (norms and
    SwiGLU), while it reads what that is made of anyway. A smaller budget would make it repeat products.
    """
    if config.runtime.compile == "on":
        torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
        for layer in model.model.layers:
            layer.compile(dynamic=False)
