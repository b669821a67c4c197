"""`auto` is decided once, by device and measurement, and said."""

from __future__ import annotations

import pytest

from resmol import auto
from resmol.auto import resolve_auto, save_in_background
from resmol.config import RunConfig
from resmol.config_files import with_overrides
from resmol.flops import total_parameters


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


@pytest.mark.parametrize(("copies", "expected"), [(None, False), (3.9, False), (4.1, True)])
def test_saves_run_in_the_background_where_the_copy_has_room(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, copies: float | None, expected: bool
) -> None:
    """Room: four copies of float32 weights and two moments, 12 bytes for each parameter."""
    size = 12 * total_parameters(tiny_config.model)
    monkeypatch.setattr("resmol.auto.os.cpu_count", lambda: 2)
    monkeypatch.setattr(auto, "free_memory", lambda: None if copies is None else int(copies * size))
    decided, reasons = save_in_background(tiny_config)
    assert decided is expected
    assert ("on" if expected else "off") in reasons[0].split()
    both = with_overrides(tiny_config, ["runtime.threads=2"])
    assert save_in_background(both) == (False, ["saves in the background: off (training takes all 2 processors)"])
    for word in ("on", "off"):
        said = with_overrides(tiny_config, [f"checkpoint.background={word}"])
        assert save_in_background(said) == (word == "on", [])
