"""`auto` is decided once, by device and measurement, and said."""

from __future__ import annotations

import pytest

from resmol import auto
from resmol.auto import resolve_auto
from resmol.config import RunConfig
from resmol.config_files import with_overrides


def test_auto_is_replaced_and_said(tiny_config: RunConfig) -> None:
    wanted = with_overrides(tiny_config, [f"runtime.{key}=auto" for key in ("device", "precision", "compile")])
    decided, reasons = resolve_auto(wanted)
    assert "auto" not in decided.runtime.model_dump().values()
    assert len(reasons) == 2
    assert resolve_auto(decided) == (decided, [])


def test_without_a_compiler_it_runs_uncompiled(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmol.auto.shutil.which", lambda _: None)
    long_run = with_overrides(tiny_config, ["runtime.compile=auto", "train.steps=100000000"])
    decided, reasons = resolve_auto(long_run)
    assert decided.runtime.compile == "off"
    assert "no C++ compiler" in reasons[0]


def test_a_long_run_is_compiled_and_a_short_one_is_not(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmol.auto.shutil.which", lambda name: name)
    for steps, expected in ((100_000_000, "on"), (10, "off")):
        wanted = with_overrides(tiny_config, ["runtime.compile=auto", f"train.steps={steps}"])
        assert resolve_auto(wanted)[0].runtime.compile == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.4, "float32"), (1.1, "float32"), (1.5, "bfloat16")])
def test_bfloat16_must_be_clearly_faster(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, gain: float, expected: str
) -> None:
    monkeypatch.setattr(auto, "bfloat16_gain", lambda _: gain)
    decided, reasons = resolve_auto(with_overrides(tiny_config, ["runtime.precision=auto"]))
    assert decided.runtime.precision == expected
    assert f"{gain:.2f}x" in reasons[0]


def test_the_measurement_measures(tiny_config: RunConfig) -> None:
    assert auto.bfloat16_gain(tiny_config) > 0
