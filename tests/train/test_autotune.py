"""`auto` is decided once, by rules, and said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.config.runtime_config import ParallelConfig
from resmol.errors import ConfigError
from resmol.model.flops import training_memory
from resmol.model.llama import CausalLM
from resmol.train import autotune as auto
from resmol.train.autotune import resolve_auto

DECIDED = ("device", "precision", "matmul_backend", "compile", "activation_checkpointing")


def test_auto_is_replaced_and_said(tiny_config: RunConfig) -> None:
    wanted = with_overrides(tiny_config, [f"runtime.{key}=auto" for key in DECIDED])
    decided, reasons = resolve_auto(wanted)
    assert "auto" not in decided.runtime.model_dump().values()
    assert len(reasons) == len(DECIDED)
    assert resolve_auto(decided) == (decided, [])


def test_without_a_compiler_it_runs_uncompiled(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "compiler_problem", lambda device: f"no compiler for {device}")
    long_run = with_overrides(tiny_config, ["runtime.compile=auto", "train.steps=100000000"])
    decided, reasons = resolve_auto(long_run)
    assert decided.runtime.compile == "off"
    assert reasons[0] == "compile: off (no compiler for cpu; the run trains uncompiled)"


def test_a_long_run_is_compiled_and_a_short_one_is_not(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "compiler_problem", lambda _device: "")
    for steps, expected in ((100_000_000, "on"), (10, "off")):
        wanted = with_overrides(tiny_config, ["runtime.compile=auto", f"train.steps={steps}"])
        assert resolve_auto(wanted)[0].runtime.compile == expected


@pytest.mark.parametrize(
    ("capabilities", "windows", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 16384, "bfloat16"),
        ({"avx512_bf16": True}, 16384, "bfloat16"),
        ({"avx512_bf16": True}, 1, "float32"),
        ({"amx_bf16": False, "avx512_f": True}, 16384, "float32"),
        ({}, 16384, "float32"),
    ],
    ids=["AMX", "AVX-512", "a small micro-batch", "no unit", "unknown"],
)
def test_precision_is_a_rule_of_processor_and_size(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], windows: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    sizes = [f"batch.micro_batch_size={windows}", f"batch.global_batch_tokens={16 * windows}"]
    wanted = with_overrides(tiny_config, ["runtime.precision=auto", *sizes])
    for _ in range(2):
        decided, reasons = resolve_auto(wanted)
        assert decided.runtime.precision == expected
        assert f"precision: {expected} (" in reasons[0]
        assert "`--set runtime.precision=...` pins it" in reasons[0]


@pytest.mark.parametrize(
    ("kind", "capability", "expected", "reason"),
    [
        ("cuda", (8, 0), "bfloat16", "`--set"),
        ("cuda", (7, 5), "float16", "with a loss scale (a card has a unit for it and none for bfloat16; "),
        ("cuda", (6, 0), "float16", "with a loss scale (a card has a unit for it and none for bfloat16; "),
        ("cuda", (6, 1), "float32", "(a card has no unit for bfloat16 or float16; "),
        ("mps", (8, 0), "float32", "(a card has no unit for bfloat16 or float16; "),
    ],
    ids=["A100", "T4", "P100", "GTX 1080", "a Mac"],
)
def test_precision_on_an_accelerator(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch,
    kind: str, capability: tuple[int, int], expected: str, reason: str,
) -> None:  # fmt: skip
    answers = SimpleNamespace(
        get_device_capability=lambda _: capability,
        get_device_name=lambda _: "a card",
        is_bf16_supported=lambda including_emulation: including_emulation or capability >= (8, 0),
    )
    if kind == "mps":
        del answers.is_bf16_supported
    monkeypatch.setattr(torch, "get_device_module", lambda _device: answers)
    chosen, sentence = auto._choose_precision(tiny_config, torch.device(kind))
    assert chosen == expected
    assert sentence.startswith(f"precision: {expected} ")
    assert reason in sentence
    assert "`--set runtime.precision=...` pins it" in sentence


def test_a_version_of_pytorch_that_cannot_tell_takes_float32(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_auto(with_overrides(tiny_config, ["runtime.precision=auto"]))[0].runtime.precision == "float32"


@pytest.mark.parametrize("backend", ["mkl", "onednn"])
def test_the_library_is_a_rule_of_the_processor(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(auto, "default_matmul_backend", lambda: backend)
    decided, reasons = resolve_auto(with_overrides(tiny_config, ["runtime.matmul_backend=auto"]))
    assert decided.runtime.matmul_backend == backend
    assert f"matmul_backend: {backend} (" in reasons[0]
    narrow = with_overrides(tiny_config, ["runtime.matmul_backend=auto", "runtime.precision=bfloat16"])
    assert not any("matmul_backend" in reason for reason in resolve_auto(narrow)[1]), "no matmul is in float32"


def test_nothing_is_timed(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement beside another program can come out either way; two runs of one command must have equal bits."""
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a clock was read"))
    monkeypatch.setattr(CausalLM, "loss", lambda *_: pytest.fail("a model was run"))
    resolve_auto(with_overrides(tiny_config, [f"runtime.{key}=auto" for key in DECIDED if key != "compile"]))


@pytest.mark.parametrize(("free", "expected"), [(None, "off"), (10**12, "off"), (10, "on")])
def test_blocks_are_computed_again_when_memory_is_short(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, free: int | None, expected: str
) -> None:
    monkeypatch.setattr("resmol.system.host.free_memory", lambda: free)
    decided, reasons = resolve_auto(with_overrides(tiny_config, ["runtime.activation_checkpointing=auto"]))
    assert decided.runtime.activation_checkpointing == expected
    assert f"activation checkpointing: {expected}" in reasons[0]


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_overrides(tiny_config, ["runtime.activation_checkpointing=off"])
    needed = auto.needed_memory(config, recompute=False)
    monkeypatch.setattr("resmol.system.host.free_memory", lambda: needed)
    auto.check_memory(config)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="GB of memory") as caught:
        auto.check_memory(config)
    assert "activation_checkpointing=on" in caught.value.fix
    assert "strategy=fsdp" in caught.value.fix
    shared = with_overrides(config, ["parallel.strategy=fsdp"])
    parts = training_memory(config.model, config.batch.micro_batch_size, config.data.seq_len, 256)
    kept = parts["weights"] + parts["gradients"] + parts["adamw moments"]
    gathered = auto.needed_memory(shared, recompute=False) - (needed - kept // 2)
    assert 0 < gathered < kept  # two ranks share what is kept, and gather some of it
    monkeypatch.setattr("resmol.system.host.free_memory", lambda: None)
    auto.check_memory(config)  # a system that does not say is given the benefit of the doubt


def test_replicas_share_among_themselves() -> None:
    assert ParallelConfig(strategy="fsdp", replicas=2).shards(8) == 4
    assert ParallelConfig(strategy="fsdp").shards(8) == 8
    assert ParallelConfig().shards(8) == 1
