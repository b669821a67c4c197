"""A training step's loss and gradients, in every way that the runtime section can choose, against float64.

The step is training's own: the model is built, compiled and differentiated by the functions that `resmol train` calls,
from two micro-batches of windows that hold two documents each. The reference gets both windows at once, with its own
mask and its own shift of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from resmol.checks import Check
from resmol.config.data_config import DataConfig
from resmol.config.model_config import ModelConfig
from resmol.config.run_config import BatchConfig, RunConfig
from resmol.config.runtime_config import RuntimeConfig
from resmol.data.loader import Batch
from resmol.model.linear import has_onednn
from resmol.model.llama import CausalLM
from resmol.run.checkpoint_manifest import LossScale
from resmol.train.build import compile_blocks, new_state
from resmol.train.compiler import compiler_problem
from resmol.train.gradients import accumulate_gradients
from resmol.train.loss_scale import factor_of_sum
from resmol.train.parallel import open_runtime
from resmol.verify.capture import Captured
from resmol.verify.parity import LOSS_SCALE, Baseline, Precision, baseline, ids_for, rms_errors
from resmol.verify.tiny_models import fill, two_tiny_blocks

WINDOW = 144  # tokens: two blocks of the blockwise attention backward pass
DOCUMENT_STARTS = (61, 133)  # where the second document of each window begins
LOSS_CHUNK = 100  # two chunks of each window, of different lengths


BASELINES: dict[str, Precision] = {
    "float32": "float32", "bfloat16": "bfloat16 autocast", "float16": "float16 autocast",
}  # fmt: skip


class Variant(NamedTuple):
    """One way to compute a training step: the name of its row, the runtime fields it sets, what a failure means."""

    row: str
    runtime: Mapping[str, Any]
    guards: str


VARIANTS = (
    Variant(
        "training, mkl",
        {},
        "A tied matrix that receives the gradient of one of its two uses, or twice that of one; gradients that are "
        "averaged over micro-batches instead of summed over tokens; a document mask that training does not apply.",
    ),
    Variant(
        "training, onednn",
        {"matmul_backend": "onednn"},
        "Products of the second matmul library, whose gradients are written by hand.",
    ),
    Variant(
        "training, bfloat16",
        {"precision": "bfloat16"},
        "Sums, norms or a softmax that lose their float32 under autocast.",
    ),
    Variant(
        "training, float16",
        {"precision": "float16"},
        "Gradients that underflow, or keep the factor that keeps them from it.",
    ),
    Variant(
        "training, checkpointing",
        {"activation_checkpointing": "on"},
        "Activation checkpointing: blocks that are computed again from another input, or whose gradient is lost.",
    ),
    Variant(
        "training, compiled",
        {"compile": "on"},
        "The compiled block: its attention has a backward pass written by hand, in blocks of queries.",
    ),
)


def training_parity(config: ModelConfig) -> list[Check]:
    """Compare a training step of every variant, on two tiny blocks of the architecture.

    A variant that this machine cannot compute passes, and its row says why it was not checked.
    """
    tiny = two_tiny_blocks(config).model_copy(update={"max_position_embeddings": WINDOW + 1})
    weights = fill(CausalLM(tiny), seed=11).state_dict()
    ids = ids_for(tiny.vocab_size, len(DOCUMENT_STARTS), WINDOW + 1, seed=12)
    document_ids = (torch.arange(WINDOW + 1) >= torch.tensor(DOCUMENT_STARTS)[:, None]).long()
    baselines: dict[Precision, Baseline] = {
        precision: baseline(tiny, weights, precision, ids=ids, document_ids=document_ids)
        for precision in BASELINES.values()
    }
    return [_check(variant, _run_config(tiny, variant), weights, baselines) for variant in VARIANTS]


def _run_config(model: ModelConfig, variant: Variant) -> RunConfig:
    runtime: dict[str, Any] = {
        "device": "cpu",
        "precision": "float32",
        "matmul_backend": "mkl",
        "compile": "off",
        "activation_checkpointing": "off",
        "loss_chunk_tokens": LOSS_CHUNK,
    }
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=WINDOW),
        batch=BatchConfig(micro_batch_size=1, global_batch_tokens=len(DOCUMENT_STARTS) * WINDOW),
        runtime=RuntimeConfig(**{**runtime, **variant.runtime}),
    )


def _check(
    variant: Variant, config: RunConfig, weights: Mapping[str, Tensor], baselines: Mapping[Precision, Baseline]
) -> Check:
    base = baselines[BASELINES[config.runtime.precision]]
    compared = [name for name in base.exact if name.startswith(("loss", "gradients"))]

    def without_numbers(measured: str, *, passed: bool) -> Check:
        return Check(variant.row, passed, measured, "the reference's loss and gradients", variant.guards)

    if config.runtime.matmul_backend == "onednn" and not has_onednn():
        return without_numbers("not checked: this PyTorch has no oneDNN", passed=True)
    if config.runtime.compile == "on" and (problem := compiler_problem("cpu")):
        return without_numbers(f"not checked: {problem}", passed=True)
    try:
        found = _step(config, weights, base)
    except RuntimeError as error:  # PyTorch's compiler
        return without_numbers(f"{type(error).__name__}: {error}".splitlines()[0], passed=False)
    if config.runtime.compile == "on" and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        return without_numbers("not checked: PyTorch's compiler is switched off", passed=True)
    return base.compare_all(variant.row, compared, rms_errors(found, base.exact), variant.guards)


def _step(config: RunConfig, weights: Mapping[str, Tensor], base: Baseline) -> Captured:
    """Return the mean loss and its gradients, from one micro-batch for each window."""
    assert base.document_ids is not None
    batches = [
        Batch(ids[None, :-1], ids[None, 1:], documents[None, :-1], (window,), WINDOW)
        for window, (ids, documents) in enumerate(zip(base.ids, base.document_ids, strict=True))
    ]
    budget = torch._functorch.config.activation_memory_budget
    try:
        with open_runtime(config) as runtime:
            model = new_state(config, runtime).model
            model.load_state_dict(weights)
            compile_blocks(model, config)
            factor = factor_of_sum(LossScale(scale=LOSS_SCALE), config) if runtime.scales_loss else None
            total = accumulate_gradients(model, batches, config, runtime, factor)
    finally:
        torch._functorch.config.activation_memory_budget = budget  # `compile_blocks` sets it for the whole process
    tokens = len(batches) * WINDOW
    divisor = tokens * (factor or 1)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total / tokens} | {f"gradients {name}": grad / divisor for name, grad in gradients.items()}
