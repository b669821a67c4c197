"""What the checks compute again and again, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from references import baselines_once
from torch import Tensor

from resmol.model.llama import CausalLM
from resmol.verify.third_party.diagnose import Setting
from resmol.verify.third_party.parts import Parts
from resmol.verify.tiny_models import LateReference, late_reference


@pytest.fixture(scope="module", autouse=True)
def references_are_computed_once() -> Iterator[None]:
    """Most of the time of `verify` is the reference's."""
    with baselines_once():
        yield


@pytest.fixture(scope="module")
def computed_once() -> Iterator[None]:
    """Let the checks share the results of the known bugs, and those at late positions: no module changes them.

    The weights and the ids follow from the configuration and the length, since their seeds are fixed.
    """

    def of_parts(setting: Setting, parts: Parts) -> Tensor:
        key = (setting.config, tuple(setting.ids.shape), setting.last_block, parts)
        if key not in memory:
            memory[key] = computed(setting, parts)
        return memory[key]

    def of_late_reference(model: CausalLM, length: int, precision: Any) -> LateReference:
        key = (model.config, length, precision)
        if key not in memory:
            memory[key] = late_reference(model, length, precision)
        return memory[key]

    memory: dict[Any, Any] = {}
    computed = Setting.computed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmol.verify.tiny_models.late_reference", of_late_reference)
        patch.setattr(Setting, "computed", of_parts)
        yield
