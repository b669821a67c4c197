"""What a run reads: one prepared folder; or a mixture of several, in proportions that may change at a step.

In a file, either each ``[[data.source]]`` has a ``weight``, which is short for one stage from step 1 on; or the weights
are in ``[[data.stage]]`` tables, by the names of the sources. A `RunConfig` holds sources and stages either way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from pydantic import Field, model_validator

from resmol.config.strict_model import StrictModel, param
from resmol.system.user_paths import user_path

_NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"


class SourceConfig(StrictModel):
    """One prepared folder.

    Attributes:
        name: What stages and ledger call it; the last part of ``path`` where it is left out.
        path: The folder, relative to the file that states it; empty is ``RUN/data/NAME``.
        max_epochs: How often it may be read; a run that would read it more often does not start.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    path: str = ""
    max_epochs: Annotated[float, Field(gt=0)] = 1.0


class StageConfig(StrictModel):
    """The proportions from a step on, until the next stage.

    Attributes:
        start: The first step of the stage.
        weights: Name of a source -> its share of the windows, in any unit; a source that is not named is not read.
    """

    start: Annotated[int, Field(ge=1)]
    weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]


class DataConfig(StrictModel):
    """How the token stream is cut into windows and shuffled (its content is bound by a fingerprint)."""

    path: str = param("", "C", "folder of the prepared data, relative to the run; empty: as before, or RUN/data")
    source: tuple[SourceConfig, ...] | None = param(
        None, "C", "of a mixture, instead of path: tables with `path`, `weight`, `name` (the last part of the path) "
        "and `max_epochs` (1.0: how often it may be read)",
    )  # fmt: skip
    stage: tuple[StageConfig, ...] | None = param(
        None, "B", "of a mixture, instead of the weights of its sources: tables with `start` (the first step, 1 in the "
        "first) and `weights` (by name; a source without one is not read)",
    )  # fmt: skip
    seq_len: int = param(2048, "A", "tokens in a training window", ge=2)
    seq_len_warmup_steps: int = param(
        0, "A", "steps in which windows are cut up: a third of them into eighths, then quarters, then halves", ge=0
    )
    recut: bool = param(False, "A", "windows begin elsewhere in the text in each epoch after the first")
    document_mask: bool = param(True, "A", "attention stays inside a document")
    seed: int = param(8, "A", "key of the permutation of the windows", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _weights_are_in_stages(cls, table: Any) -> Any:
        return with_stages(table) if isinstance(table, dict) else table

    @model_validator(mode="after")
    def _sources_and_stages_belong_together(self) -> DataConfig:
        check_mixture(self.source, self.stage, self.path)
        if self.recut and self.source is not None:
            raise ValueError("recut is for data without sources: each source of a mixture has epochs of its own")
        if self.seq_len_warmup_steps and self.seq_len % 8:
            raise ValueError(
                f"seq_len ({self.seq_len}) is no multiple of 8, and seq_len_warmup_steps cuts it into eighths"
            )
        return self

    def seq_len_at(self, step: int) -> int:
        """Return how many tokens attention spans in a step, from 1 (sequence-length warm-up; Li et al. 2021).

        The windows, their order and the tokens of a step stay what they are: only the rows they are computed in change.
        """
        if step > self.seq_len_warmup_steps:
            return self.seq_len
        halvings = 3 - 3 * (step - 1) // self.seq_len_warmup_steps
        return self.seq_len >> halvings


def with_stages(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``data`` table of a file in its full form: each source has a name, and stages have the weights.

    Raises:
        ValueError: There is no source, two have the same name, or weights are missing or stated twice.
    """
    # What a validator returns is no JSON any more, in which alone a list is a tuple.
    table = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    sources = table.get("source")
    if not isinstance(sources, tuple) or not all(isinstance(one, dict) for one in sources):
        return table
    if not sources:
        raise ValueError("source is an empty list: name a prepared folder in [[data.source]], or leave it out")
    named = [{"name": PureWindowsPath(str(one.get("path", ""))).name, **one} for one in sources]
    names = [str(one["name"]) for one in named]
    if unfit := next((one for one in named if not re.fullmatch(_NAME, str(one["name"]))), None):
        raise ValueError(
            f"{unfit['name']!r} is no name for a source: add a `name` of letters, digits, '_', '-' and '.'"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two sources are called {twice[0]}: give one of them another `name`")
    weights = {str(one["name"]): one.pop("weight") for one in named if "weight" in one}
    if table.get("stage") is not None:
        if weights:
            raise ValueError("the weights are in [[data.stage]] already: leave `weight` out of [[data.source]]")
        return {**table, "source": tuple(named)}
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"the source {missing[0]} has no weight: add `weight`, or [[data.stage]] tables with weights")
    return {**table, "source": tuple(named), "stage": ({"start": 1, "weights": weights},)}


def check_mixture(sources: Sequence[SourceConfig] | None, stages: Sequence[StageConfig] | None, path: str) -> None:
    """Refuse sources and stages that do not belong together (`ValueError`)."""
    if sources is None or stages is None:
        if stages is not None:
            raise ValueError("[[data.stage]] has weights of sources, and there is no [[data.source]]")
        return
    if path:
        raise ValueError(f"path ({path}) and [[data.source]] both say what to read: leave one of them out")
    paths = [os.path.normpath(source.path) for source in sources if source.path]
    if twice := next((one for one in paths if paths.count(one) > 1), None):
        raise ValueError(f"two sources read {twice}: state it once, with the sum of the weights")
    starts = [stage.start for stage in stages]
    if starts[:1] != [1] or any(later <= sooner for sooner, later in pairwise(starts)):
        raise ValueError(f"the stages start at steps {starts}: let the first start at 1, and each after the one before")
    names = [source.name for source in sources]
    if unknown := next((name for stage in stages for name in stage.weights if name not in names), None):
        raise ValueError(f"a stage has a weight for {unknown}, which is none of the sources {', '.join(names)}")


def with_absolute_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a table of sections in which the paths of sources begin in ``folder`` unless they are absolute."""
    sources = table["data"].get("source") if isinstance(table.get("data"), dict) else None
    if not isinstance(sources, list):
        return table
    placed = [
        {**one, "path": os.path.normpath(folder.absolute() / user_path(one["path"]))}
        if isinstance(one, dict) and isinstance(one.get("path"), str) and one["path"]
        else one
        for one in sources
    ]
    return {**table, "data": {**table["data"], "source": placed}}
