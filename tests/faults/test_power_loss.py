"""Row K3: the power fails, and what was not synced is gone, or half of it, or zeros."""

from __future__ import annotations

import json
from pathlib import Path

import drills
import pytest
from campaign import Campaign
from trials import Forks, Setting, finish

pytestmark = pytest.mark.usefixtures("shim")


@pytest.mark.parametrize("meanwhile", [False, True], ids=["in turn", "meanwhile"])
def test_k3_power_loss_after_any_operation(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path, meanwhile: bool
) -> None:
    share, mixtures = campaign.count(23, 1), campaign.count(1, 8)
    out = tmp_path / "out.json"
    child = forks.start(
        drills.play, out, "power_losses", setting, tmp_path, share=share, mixtures=mixtures, seed=campaign.seed,
        meanwhile=meanwhile,
    )  # fmt: skip
    assert finish(child, timeout=1200) == 0
    states, operations, problems = json.loads(out.read_text())
    campaign.record(
        "K3b" if meanwhile else "K3",
        "the same, steps being executed during the saves" if meanwhile else
        "power loss after any operation, unsynced data and names kept or not",
        "an acknowledged checkpoint or a newer one", problems, states, exhaustive=share == 1,
        note=f"{operations} operations",
    )  # fmt: skip
