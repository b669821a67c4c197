"""Which device is taken, with a reason, and what it is asked; accelerators stand in, since none may be here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from resmol.errors import ConfigError
from resmol.system import host
from resmol.train import devices
from resmol.train.devices import choose_device, device_problem, find_device


def accelerator(kind: str | None, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Let PyTorch find an accelerator of a kind, whose module has these functions."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace(**answers))


def test_without_an_accelerator_auto_takes_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator(None, monkeypatch)
    assert choose_device("auto") == (torch.device("cpu"), "device: cpu (PyTorch finds no accelerator here)")
    with pytest.raises(ConfigError, match=r"runtime\.device is mps, and PyTorch .* finds no accelerator here"):
        find_device("mps")


@pytest.mark.parametrize(("kind", "problem"), [("cuda", "not asked"), ("mps", ""), ("xpu", "")])
def test_auto_takes_an_accelerator_that_works(kind: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator(kind, monkeypatch, get_device_name=lambda _: "T4")
    monkeypatch.setattr(devices, "device_problem", lambda _: problem)
    device, reason = choose_device("auto")
    assert device == torch.device(kind, 0)
    assert reason == f"device: {kind} (T4; `--set runtime.device=cpu` takes the processor)"
    assert choose_device(kind) == (device, "")
    assert choose_device("cpu") == (torch.device("cpu"), "")
    with pytest.raises(ConfigError, match=f"finds {kind} here"):
        find_device("xpu" if kind == "mps" else "mps")


def test_auto_takes_the_processor_where_a_small_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator("mps", monkeypatch)
    monkeypatch.setattr(devices, "device_problem", lambda _: "aten::x is not implemented")
    expected = "device: cpu (a small model fails on mps: aten::x is not implemented)"
    assert choose_device("auto") == (torch.device("cpu"), expected)
    assert find_device("mps") == torch.device("mps", 0), "who names it gets it"


def test_an_accelerator_of_an_unknown_kind_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator("hpu", monkeypatch)
    assert find_device("auto") == torch.device("cpu")


def test_each_rank_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    accelerator("cuda", monkeypatch)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(devices, "this_launch", lambda: SimpleNamespace(local_rank=3))
    assert find_device("cuda") == torch.device("cuda", 3)
    assert chosen == [3]


def test_a_small_model_is_really_tried() -> None:
    assert device_problem("cpu") == ""
    assert device_problem("meta"), "which has shapes and no numbers"


def test_what_a_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps, cpu = (torch.device(kind) for kind in ("cuda", "mps", "cpu"))
    monkeypatch.setattr(host, "free_memory", lambda: 7)
    assert devices.device_name(cpu) == "cpu"
    assert devices.free_memory(cpu) == 7
    answers = {"mem_get_info": lambda _: (5, 9), "is_bf16_supported": lambda including_emulation: including_emulation}
    accelerator("cuda", monkeypatch, **answers)
    assert (devices.free_memory(cuda), devices.has_bfloat16(cuda)) == (5, False)
    accelerator("mps", monkeypatch)
    assert (devices.free_memory(mps), devices.has_bfloat16(mps), devices.device_name(mps)) == (7, False, "mps")
    assert devices.profiler_activities(cuda) == [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    assert devices.profiler_activities(cpu) == [ProfilerActivity.CPU]
    assert [devices.is_compiled(device) for device in (cuda, mps)] == [True, False]
