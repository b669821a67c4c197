"""transformers' results, computed once: they depend on the architecture, the weights and the ids, not on our code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from resmol.verify.parity import Baseline, baseline


@contextmanager
def baselines_once() -> Iterator[None]:
    """Let `verify` compute each baseline once while the context is open."""
    known: dict[Any, Baseline] = {}

    def remembered(config: Any, weights: Mapping[str, Tensor], precision: Any = "float32", **options: Any) -> Baseline:
        key = (config, precision, _digest({**weights, **options}))
        if key not in known:
            kept = {name: tensor.clone() for name, tensor in weights.items()}  # the reference shares their memory
            known[key] = baseline(config, kept, precision, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("parity", "training", "third_party.check"):
            patch.setattr(f"resmol.verify.{module}.baseline", remembered)
        yield


def _digest(tensors: Mapping[str, Tensor | None]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
