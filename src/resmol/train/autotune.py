"""Choose what ``auto`` stands for: once, when a run starts, by device and by measurement; the run stores the choice.

Memory is counted before it is allocated: a refusal with advice beats being killed in the first step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch

from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.model.flops import training_flops_per_token, training_memory
from resmol.model.linear import has_onednn, set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.system.host import free_memory
from resmol.system.launcher import this_launch
from resmol.train.parallel import Runtime, deterministic_kernels, find_device

Arithmetic: TypeAlias = Literal["mkl", "onednn", "bfloat16"]

# Regional compilation of SmolLM2-135M on two cores: 10 to 35 s for the first step, 1 to 3 % of every later one.
COMPILE_SECONDS = 30.0
COMPILE_SAVES = 0.02
CPU_FLOPS_PER_SECOND = 1.5e11
# bfloat16 must be this much faster to be worth its rounding; oneDNN, so that noise does not decide.
BFLOAT16_MUST_GAIN = 1.2
ONEDNN_MUST_GAIN = 1.05
MEASUREMENTS = 7
# Keep activations while they take this share of the free memory at most: the count is an estimate.
MEMORY_SHARE = 0.85


def resolve_auto(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Replace every ``auto`` of the runtime section by a choice.

    Returns:
        The configuration without ``auto``, and a sentence for each choice.
    """
    choices: dict[str, str] = {}
    reasons: list[str] = []
    device = find_device(config.runtime.device)
    if config.runtime.device == "auto":
        choices["device"] = device.type
    if "auto" in (config.runtime.precision, config.runtime.matmul_backend):
        arithmetic, why = _choose_arithmetic(config, device)
        choices |= arithmetic
        config = config.replace({f"runtime.{key}": value for key, value in arithmetic.items()})  # for memory
        reasons += why
    if config.runtime.compile == "auto":
        choices["compile"], reason = _choose_compile(config, device)
        reasons.append(reason)
    if config.runtime.activation_checkpointing == "auto":
        choices["activation_checkpointing"], reason = _choose_activation_checkpointing(config, device)
        reasons.append(reason)
    return config.replace({f"runtime.{key}": value for key, value in choices.items()}), reasons


def needed_memory(config: RunConfig, *, recompute: bool) -> int:
    """Return the bytes that a training step takes, counted (see `training_memory`), given a resolved precision."""
    parts = training_memory(
        config.model,
        config.batch.micro_batch_size,
        config.data.seq_len,
        config.runtime.loss_chunk_tokens,
        activation_checkpointing=recompute,
        bfloat16=config.runtime.precision == "bfloat16",
        eager=config.runtime.attention == "eager",
    )
    return sum(parts.values())


def check_memory(config: RunConfig) -> None:
    """Refuse a run that does not fit (`ConfigError`), given its resolved configuration."""
    device = find_device(config.runtime.device)
    recompute = config.runtime.activation_checkpointing == "on"
    needed, free = needed_memory(config, recompute=recompute), _free_memory(device)
    if free is None or needed <= free:
        return
    smaller = "" if config.batch.micro_batch_size == 1 else "set a smaller batch.micro_batch_size, "
    again = "" if recompute else "set runtime.activation_checkpointing=on, "
    raise ConfigError(
        f"training needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
        fix=f"{smaller}{again}choose a shorter data.seq_len or a smaller model, or end other programs",
    )


def _free_memory(device: torch.device) -> int | None:
    """Return the free bytes for each process of a run on this machine, or None where they are unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory()
    return None if free is None else free // this_launch().local_world_size


def _choose_activation_checkpointing(config: RunConfig, device: torch.device) -> tuple[str, str]:
    if _several_processes():
        return "off", "activation checkpointing: off (memory was not counted, since there are several ranks)"
    needed, free = needed_memory(config, recompute=False), _free_memory(device)
    chosen = "on" if free is not None and needed > MEMORY_SHARE * free else "off"
    room = "an unknown amount is" if free is None else f"{free / 1e9:.1f} GB are"
    return chosen, f"activation checkpointing: {chosen} (a step takes about {needed / 1e9:.1f} GB, {room} free)"


def _choose_arithmetic(config: RunConfig, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Choose precision and matmul backend by measuring them against each other."""
    if device.type == "cuda" or _several_processes():
        return _arithmetic_by_rule(config, device)
    precision, backend = config.runtime.precision, config.runtime.matmul_backend
    plain = "mkl" if backend == "auto" else backend
    libraries: list[Arithmetic] = ["mkl", "onednn"] if backend == "auto" and has_onednn() else [plain]
    narrow: list[Arithmetic] = [] if precision == "float32" else ["bfloat16"]
    candidates = narrow if precision == "bfloat16" else libraries + narrow
    if len(candidates) == 1:  # nothing to choose
        return {"precision": precision, "matmul_backend": plain}, []
    seconds = measured_seconds(config, candidates)
    reasons = []
    if len(libraries) > 1:
        gain = seconds["mkl"] / seconds["onednn"]
        plain = "onednn" if gain >= ONEDNN_MUST_GAIN else "mkl"
        reasons.append(
            f"matmul_backend: {plain} (float32 matmuls of oneDNN measured {gain:.2f}x as fast as those of MKL here)"
        )
    if precision == "auto":
        gain = seconds[plain] / seconds["bfloat16"]
        precision = "bfloat16" if gain >= BFLOAT16_MUST_GAIN else "float32"
        reasons.append(f"precision: {precision} (a step in bfloat16 measured {gain:.2f}x as fast as in float32 here)")
    return {"precision": precision, "matmul_backend": plain}, reasons


def _arithmetic_by_rule(config: RunConfig, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Choose where there is nothing to measure (CUDA), or each rank would measure something else."""
    precision, backend = config.runtime.precision, config.runtime.matmul_backend
    reasons = []
    if precision == "auto" and device.type == "cuda":
        precision = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        reasons.append(f"precision: {precision}")
    elif precision == "auto":
        precision = "float32"
        reasons.append("precision: float32 (not measured, since there are several ranks)")
    return {"precision": precision, "matmul_backend": "mkl" if backend == "auto" else backend}, reasons


def _several_processes() -> bool:
    """Return whether each of several ranks would measure for itself, and they could disagree."""
    return this_launch().world_size > 1


def measured_seconds(config: RunConfig, candidates: Sequence[Arithmetic]) -> dict[Arithmetic, float]:
    """Return the seconds of forward and backward on a slice of the model: in float32 by a library, or in bfloat16.

    The slice has one block and its share of the vocabulary, so that blocks and output layer have the weight that they
    have in the whole model. The candidates alternate, and their best times are compared: other programs that compete
    for the processor can only make a measurement longer.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    model = CausalLM(_slice_of(config.model), attention=config.runtime.attention)
    shape = (config.batch.micro_batch_size, config.data.seq_len)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % model.config.vocab_size
    documents = torch.zeros_like(ids) if config.data.document_mask else None
    seconds: dict[Arithmetic, float] = dict.fromkeys(candidates, math.inf)
    with deterministic_kernels(torch.device("cpu")):
        for candidate in [*candidates] * MEASUREMENTS:
            set_matmul_backend(model, "onednn" if candidate == "onednn" else "mkl")
            precision = torch.bfloat16 if candidate == "bfloat16" else None
            started = time.perf_counter()
            with Runtime.single("cpu", precision).autocast():
                loss = model.loss(ids, ids, documents, config.runtime.loss_chunk_tokens)
            loss.backward()
            seconds[candidate] = min(seconds[candidate], time.perf_counter() - started)
    return seconds


def _slice_of(config: ModelConfig) -> ModelConfig:
    lowest = max(config.bos_token_id, config.eos_token_id) + 1
    vocabulary = max(lowest, config.vocab_size // config.num_hidden_layers)
    return config.model_copy(update={"num_hidden_layers": 1, "vocab_size": vocabulary})


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _choose_compile(config: RunConfig, device: torch.device) -> tuple[str, str]:
    if not has_compiler():
        return "off", "compile: off (there is no C++ compiler here)"
    if device.type == "cuda":
        return "on", "compile: on"
    tokens = config.train.steps * config.batch.global_batch_tokens
    flops = tokens * training_flops_per_token(config.model, config.data.seq_len)
    saved = COMPILE_SAVES * flops / CPU_FLOPS_PER_SECOND
    chosen = "on" if saved > COMPILE_SECONDS else "off"
    return (
        chosen,
        f"compile: {chosen} (it would take about {COMPILE_SECONDS:.0f} s and save about {saved:.0f} s)",
    )
