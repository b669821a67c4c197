"""`auto` is decided once, by device and measurement, and said."""

from __future__ import annotations

import pytest

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.train import autotune as auto
from resmol.train.autotune import resolve_auto

DECIDED = ("device", "precision", "matmul_backend", "compile", "activation_checkpointing")


def test_auto_is_replaced_and_said(tiny_config: RunConfig) -> None:
    wanted = with_overrides(tiny_config, [f"runtime.{key}=auto" for key in DECIDED])
    decided, reasons = resolve_auto(wanted)
    assert "auto" not in decided.runtime.model_dump().values()
    assert len(reasons) == len(DECIDED) - 1  # the device needs no words
    assert resolve_auto(decided) == (decided, [])


def test_without_a_compiler_it_runs_uncompiled(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmol.train.autotune.shutil.which", lambda _: None)
    long_run = with_overrides(tiny_config, ["runtime.compile=auto", "train.steps=100000000"])
    decided, reasons = resolve_auto(long_run)
    assert decided.runtime.compile == "off"
    assert "no C++ compiler" in reasons[0]


def test_a_long_run_is_compiled_and_a_short_one_is_not(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmol.train.autotune.shutil.which", lambda name: name)
    for steps, expected in ((100_000_000, "on"), (10, "off")):
        wanted = with_overrides(tiny_config, ["runtime.compile=auto", f"train.steps={steps}"])
        assert resolve_auto(wanted)[0].runtime.compile == expected


@pytest.mark.parametrize(
    ("onednn", "bfloat16", "expected"),
    [
        (1.0, 2.5, ("mkl", "float32")),
        (1.0, 0.9, ("mkl", "float32")),
        (1.0, 0.6, ("mkl", "bfloat16")),
        (0.97, 1.0, ("mkl", "float32")),
        (0.7, 0.65, ("onednn", "float32")),
        (0.7, 0.5, ("onednn", "bfloat16")),
    ],
)
def test_another_arithmetic_must_be_clearly_faster(
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    onednn: float,
    bfloat16: float,
    expected: tuple[str, str],
) -> None:
    """bfloat16 is compared with the faster of the two ways to compute in float32."""
    monkeypatch.setattr(auto, "has_onednn", lambda: True)
    monkeypatch.setattr(auto, "measured_seconds", lambda *_: {"mkl": 1.0, "onednn": onednn, "bfloat16": bfloat16})
    decided, reasons = resolve_auto(
        with_overrides(tiny_config, ["runtime.precision=auto", "runtime.matmul_backend=auto"])
    )
    assert (decided.runtime.matmul_backend, decided.runtime.precision) == expected
    assert f"matmul_backend: {expected[0]}" in reasons[0]
    assert f"{1 / onednn:.2f}x" in reasons[0]
    assert f"precision: {expected[1]}" in reasons[1]
    assert f"{min(1.0, onednn if expected[0] == 'onednn' else 1.0) / bfloat16:.2f}x" in reasons[1]


def test_only_what_is_undecided_is_measured(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(auto, "has_onednn", lambda: True)
    monkeypatch.setattr(
        auto, "measured_seconds", lambda _config, names: asked.append(list(names)) or dict.fromkeys(names, 1.0)
    )
    for settings in ("auto mkl", "auto onednn", "float32 auto", "bfloat16 auto"):
        precision, backend = settings.split()
        changes = [f"runtime.precision={precision}", f"runtime.matmul_backend={backend}"]
        decided, _ = resolve_auto(with_overrides(tiny_config, changes))
        assert "auto" not in (decided.runtime.precision, decided.runtime.matmul_backend)
    assert asked == [["mkl", "bfloat16"], ["onednn", "bfloat16"], ["mkl", "onednn"]]


def test_the_measurement_measures(tiny_config: RunConfig) -> None:
    seconds = auto.measured_seconds(tiny_config, ["mkl", "bfloat16"])
    assert set(seconds) == {"mkl", "bfloat16"}
    assert all(0 < value < 60 for value in seconds.values())


@pytest.mark.parametrize(("free", "expected"), [(None, "off"), (10**12, "off"), (10, "on")])
def test_blocks_are_computed_again_when_memory_is_short(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, free: int | None, expected: str
) -> None:
    monkeypatch.setattr(auto, "free_memory", lambda: free)
    decided, reasons = resolve_auto(with_overrides(tiny_config, ["runtime.activation_checkpointing=auto"]))
    assert decided.runtime.activation_checkpointing == expected
    assert f"activation checkpointing: {expected}" in reasons[0]


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_overrides(tiny_config, ["runtime.activation_checkpointing=off"])
    needed = auto.needed_memory(config, recompute=False)
    monkeypatch.setattr(auto, "free_memory", lambda: needed)
    auto.check_memory(config)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="GB of memory") as caught:
        auto.check_memory(config)
    assert "activation_checkpointing=on" in caught.value.fix
    monkeypatch.setattr(auto, "free_memory", lambda: None)
    auto.check_memory(config)  # a system that does not say is given the benefit of the doubt
