"""The Python interface as somebody meets it in a notebook: names that complete, values that fit a line."""

from __future__ import annotations

from pathlib import Path

from tiny import TrainTiny

import resmol


def test_names_complete_and_exist() -> None:
    assert dir(resmol) == sorted(resmol.__all__)
    assert all(getattr(resmol, name) is not None for name in resmol.__all__)


def test_values_are_shown_in_a_line(tmp_path: Path, train_tiny: TrainTiny) -> None:
    state = train_tiny(tmp_path / "run", 2, "sampling.every=0", "evaluation.every=0")
    assert repr(state) == f"TrainState(step=2, tokens_seen={state.tokens_seen}, windows_seen=8)"
    shown = repr(resmol.load_model(tmp_path / "run", device="cpu"))
    assert shown.startswith(f"LoadedModel(checkpoint {tmp_path / 'run'}")
    assert shown.endswith(" parameters)")
