"""A right model as a student writes it, and how far a third-party implementation is from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.model.llama import CausalLM
from resmol.verify.third_party.factory import import_factory
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_third_party
from resmol.verify.tiny_models import fill

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "my_smollm2.py"
SmolLM2: Any = import_factory(f"{EXAMPLE}:SmolLM2")
Config: Any = import_factory(f"{EXAMPLE}:Config")

SMALL: ModelConfig = load_preset("nano").model.model_copy(
    update={"vocab_size": 512, "num_hidden_layers": 2, "initializer_range": 48**-0.5}
)
IDS = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))


def loaded(factory: Any, name_map: Any = None, config: ModelConfig = SMALL) -> tuple[ThirdPartyModel, CausalLM]:
    """Return an implementation and ours, with the same weights."""
    ours = fill(CausalLM(config), seed=3)
    model = build_third_party(factory, config, name_map)
    assert model.mapping.complete, model.mapping
    model.load(ours.state_dict())
    return model, ours


@torch.no_grad()
def distance(factory: Any, name_map: Any = None, config: ModelConfig = SMALL) -> float:
    """Return the largest difference of the logits, relative to the largest."""
    model, ours = loaded(factory, name_map, config)
    right = ours(IDS)
    return float((model.logits(IDS) - right).abs().max() / right.abs().max())


def returning(change: Any) -> Any:
    """Return the right model with something else made of its logits [B, T, V]."""

    class Changed(SmolLM2):  # type: ignore[misc]
        def forward(self, ids: Tensor) -> Any:
            return change(super().forward(ids))

    def build(config: Config) -> nn.Module:
        return Changed(config)

    build.__annotations__["config"] = Config
    return build
