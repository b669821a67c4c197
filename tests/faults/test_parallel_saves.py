"""Row W6: ranks save a checkpoint together, and one of them dies at any call of it."""

from __future__ import annotations

import json
from pathlib import Path

import parallel_saves
import pytest
from campaign import Campaign
from several_ranks import Strategy
from trials import Forks, finish

ROWS: dict[tuple[Strategy, int], str] = {("ddp", 2): "W6", ("fsdp", 2): "W6f", ("ddp", 4): "W6w", ("fsdp", 4): "W6fw"}
pytestmark = pytest.mark.usefixtures("shim")


@pytest.mark.parametrize(("strategy", "world_size"), ROWS)
def test_w6_a_rank_dies_at_every_call_of_a_parallel_save(
    campaign: Campaign, forks: Forks, tmp_path: Path, strategy: Strategy, world_size: int
) -> None:
    share, out = campaign.count(97, 1), tmp_path / "out.json"
    child = forks.start(parallel_saves.play, out, strategy, world_size, tmp_path, share)
    assert finish(child, timeout=3600) == 0
    points, calls, problems = json.loads(out.read_text(encoding="utf-8"))
    what = f"one of {world_size} ranks ({strategy}) dies before, after or within any call of a save"
    campaign.record(
        ROWS[strategy, world_size], what, "the old checkpoint or the new one, whole", problems, points,
        exhaustive=share == 1, note=f"calls of the ranks: {', '.join(map(str, calls))}",
    )  # fmt: skip
