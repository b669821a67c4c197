"""What the checks of third-party modules compute again and again, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from resmol.verify.parity import Baseline, baseline
from resmol.verify.third_party.diagnose import Setting
from resmol.verify.third_party.parts import Parts


@pytest.fixture(scope="module")
def computed_once() -> Iterator[None]:
    """Let the checks share transformers' results, and those of the known bugs: they depend on nothing of the module.

    The weights and the ids follow from the configuration and the length, since their seeds are fixed.
    """

    def of_baseline(config: Any, weights: Any, precision: Any = "float32") -> Baseline:
        base = memory.get((config, precision)) or baseline(config, weights, precision)
        if (config, precision) not in memory:
            memory[config, precision] = base
            base.reference.generate = remembered(base.reference.generate)
        return base

    def remembered(generate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        continuations: list[Tensor] = []

        def once(*arguments: Any, **options: Any) -> Tensor:
            if not continuations:
                continuations.append(generate(*arguments, **options))
            return continuations[0]

        return once

    def of_parts(setting: Setting, parts: Parts) -> Tensor:
        key = (setting.config, tuple(setting.ids.shape), setting.last_block, parts)
        if key not in memory:
            memory[key] = computed(setting, parts)
        return memory[key]

    memory: dict[Any, Any] = {}
    computed = Setting.computed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmol.verify.third_party.check.baseline", of_baseline)
        patch.setattr(Setting, "computed", of_parts)
        yield
