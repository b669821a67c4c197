"""Choose what ``auto`` stands for: once, when a run starts, by rules on device, processor and size; the run stores it.

Nothing is timed at a start: beside another program a measurement can come out either way, and two runs of the same
command would have other bits. `benchmarks/arithmetic.py` measures what the rules rest on.

Memory is counted before it is allocated: a refusal with advice beats being killed in the first step.
"""

from __future__ import annotations

from typing import Any

import torch

from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.model.flops import training_flops_per_token, training_memory
from resmol.model.linear import default_matmul_backend
from resmol.system.launcher import this_launch
from resmol.train.compiler import compiler_problem
from resmol.train.devices import (
    choose_device,
    device_name,
    find_device,
    free_memory,
    has_bfloat16,
    has_float16,
    is_compiled,
)

# Regional compilation of SmolLM2-135M on two cores: 10 to 35 s for the first step, 1 to 3 % of every later one.
COMPILE_SECONDS = 30.0
COMPILE_SAVES = 0.02
CPU_FLOPS_PER_SECOND = 1.5e11
# From this many operations of a micro-batch on, bfloat16 gains more by its multiplication than its conversions cost.
BFLOAT16_FLOPS = 1e10
BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}  # what PyTorch calls them -> what people do
# Keep activations while they take this share of the free memory at most: the count is an estimate.
MEMORY_SHARE = 0.85


def resolve_auto(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Replace every ``auto`` of the runtime section by a choice.

    Returns:
        The configuration without ``auto``, and a sentence for each choice.
    """
    choices: dict[str, str] = {}
    reasons: list[str] = []
    device, reason = choose_device(config.runtime.device)
    if config.runtime.device == "auto":
        choices["device"] = device.type
        reasons.append(reason)
    if config.runtime.precision == "auto":
        choices["precision"], reason = _choose_precision(config, device)
        config = config.replace({"runtime.precision": choices["precision"]})  # memory and library depend on it
        reasons.append(reason)
    if config.runtime.matmul_backend == "auto":
        choices["matmul_backend"], reason = _choose_matmul_backend(config, device)
        reasons.append(reason)
    if config.runtime.compile == "auto":
        choices["compile"], reason = _choose_compile(config, device)
        reasons.append(reason)
    if config.runtime.activation_checkpointing == "auto":
        choices["activation_checkpointing"], reason = _choose_activation_checkpointing(config, device)
        reasons.append(reason)
    return config.replace({f"runtime.{key}": value for key, value in choices.items()}), [*filter(None, reasons)]


def needed_memory(config: RunConfig, *, recompute: bool) -> int:
    """Return the bytes that a step takes on each rank, counted (see `training_memory`), given a resolved precision."""
    parts = training_memory(
        config.model,
        config.batch.micro_batch_size,
        config.data.seq_len,
        config.runtime.loss_chunk_tokens,
        activation_checkpointing=recompute,
        low_precision=config.runtime.is_low_precision,
        eager=config.runtime.attention == "eager",
        averaging=config.averaging.fraction > 0,
        shards=config.parallel.shards(this_launch().world_size),
    )
    return sum(parts.values())


def check_memory(config: RunConfig) -> None:
    """Refuse a run that does not fit (`ConfigError`), given its resolved configuration."""
    device = find_device(config.runtime.device)
    recompute = config.runtime.activation_checkpointing == "on"
    needed, free = needed_memory(config, recompute=recompute), free_memory(device)
    if free is None or needed <= free:
        return
    smaller = "" if config.batch.micro_batch_size == 1 else "set a smaller batch.micro_batch_size, "
    again = "" if recompute else "set runtime.activation_checkpointing=on, "
    several, share = "", ""
    if _several_processes():
        several = " on each rank"
        share = "" if config.parallel.strategy == "fsdp" else "set parallel.strategy=fsdp, "
    raise ConfigError(
        f"training needs about {needed / 1e9:.1f} GB of memory{several}, and {free / 1e9:.1f} GB are free",
        fix=f"{share}{smaller}{again}choose a shorter data.seq_len or a smaller model, or end other programs",
    )


def check_memory_before_deciding(config: RunConfig) -> None:
    """Refuse a run that does not fit, whatever ``auto`` will be (`ConfigError`), within milliseconds.

    Compilation, whose choice takes seconds, changes no count.
    """
    check_memory(resolve_auto(config.replace({"runtime.compile": "off"}))[0])


def _choose_activation_checkpointing(config: RunConfig, device: torch.device) -> tuple[str, str]:
    if _several_processes():
        return "off", "activation checkpointing: off (memory was not counted, since there are several ranks)"
    needed, free = needed_memory(config, recompute=False), free_memory(device)
    chosen = "on" if free is not None and needed > MEMORY_SHARE * free else "off"
    room = "an unknown amount is" if free is None else f"{free / 1e9:.1f} GB are"
    return chosen, f"activation checkpointing: {chosen} (a step takes about {needed / 1e9:.1f} GB, {room} free)"


def _choose_precision(config: RunConfig, device: torch.device) -> tuple[str, str]:
    pin = "`--set runtime.precision=...` pins it"
    if device.type != "cpu":
        if has_bfloat16(device):
            return "bfloat16", f"precision: bfloat16 ({pin})"
        if has_float16(device):
            lacks = f"{device_name(device)} has a unit for it and none for bfloat16"
            return "float16", f"precision: float16 with a loss scale ({lacks}; {pin})"
        return "float32", f"precision: float32 ({device_name(device)} has no unit for bfloat16 or float16; {pin})"
    unit, flops = bfloat16_unit(), _micro_batch_flops(config)
    if not unit:
        return "float32", f"precision: float32 (this processor has no unit for bfloat16; {pin})"
    if flops < BFLOAT16_FLOPS:
        return (
            "float32",
            f"precision: float32 (a micro-batch of {flops:.0e} operations is too small for bfloat16; {pin})",
        )
    return "bfloat16", f"precision: bfloat16 (this processor multiplies it by {unit}; {pin})"


def bfloat16_unit() -> str:
    """Return what multiplies bfloat16 in this processor, empty where nothing does or this PyTorch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for key, name in BFLOAT16_UNITS.items() if capabilities.get(key)), "")


def _micro_batch_flops(config: RunConfig) -> int:
    tokens = config.batch.micro_batch_size * config.data.seq_len
    return tokens * training_flops_per_token(config.model, config.data.seq_len)


def _choose_matmul_backend(config: RunConfig, device: torch.device) -> tuple[str, str]:
    chosen = default_matmul_backend() if device.type == "cpu" else "mkl"
    if device.type != "cpu" or config.runtime.is_low_precision:
        return chosen, ""  # it multiplies nothing then
    return chosen, f"matmul_backend: {chosen} (a rule by the processor; `--set runtime.matmul_backend=...` pins it)"


def _several_processes() -> bool:
    """Return whether each of several ranks would count its own memory, and they could disagree."""
    return this_launch().world_size > 1


def _choose_compile(config: RunConfig, device: torch.device) -> tuple[str, str]:
    if device.type != "cpu":
        return _on_if_it_works(device, "compile: on") if is_compiled(device) else ("off", "compile: off")
    tokens = config.train.steps * config.batch.global_batch_tokens
    flops = tokens * training_flops_per_token(config.model, config.data.seq_len)
    saved = COMPILE_SAVES * flops / CPU_FLOPS_PER_SECOND
    reason = f"(it would take about {COMPILE_SECONDS:.0f} s and save about {saved:.0f} s)"
    if saved <= COMPILE_SECONDS:
        return "off", f"compile: off {reason}"
    return _on_if_it_works(device, f"compile: on {reason}")


def _on_if_it_works(device: torch.device, sentence: str) -> tuple[str, str]:
    """Choose compilation with this sentence, or none where torch.compile does not work."""
    problem = compiler_problem(device.type)
    return ("off", f"compile: off ({problem}; the run trains uncompiled)") if problem else ("on", sentence)
