"""What a start asks for: arguments, the stored configuration and the record of the run become one configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resmol.config.drift import reconcile
from resmol.config.load import FROM_SCRATCH, parse_overrides
from resmol.config.run_config import RunConfig, TokenizerConfig
from resmol.data.resolve import Text, is_prepared, named_folder, stored_folder
from resmol.data.shards import open_dataset
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.errors import ConfigError, UsageError
from resmol.run.checkpoint_manifest import STATE, list_checkpoints, step_of
from resmol.run.config_history import recorded_config
from resmol.run.directory import RunDir
from resmol.system.hub_download import is_hub_id, is_meant_to_be_local
from resmol.system.launcher import this_launch
from resmol.system.user_paths import user_path
from resmol.train.lr_schedule import first_changed_step
from resmol.train.vocabulary import Vocabulary, with_vocabulary

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def requested_changes(run: RunDir, text: Text | None, overrides: Sequence[str], epochs: float | None) -> dict[str, Any]:
    """Return ``section.key`` -> value to lay over the configuration (`UsageError`: no epochs, or no run)."""
    if not run.exists():
        _refuse_weights(run)
        if is_hub_id(str(run.path)) and not is_meant_to_be_local(run.path):
            logger.warning(f"{run.path} becomes a new folder here, and nothing is read from the Hub: {FROM_SCRATCH}")
    changes = parse_overrides(overrides) | _data_path(run, text)
    if epochs is not None:
        _check_epochs(epochs, changes, text)
    return changes


def _check_epochs(epochs: float, changes: Mapping[str, Any], text: Text | None) -> None:
    if not (math.isfinite(epochs) and epochs > 0):
        raise UsageError(f"--epochs is {epochs}", fix="give a number above 0, such as 1 or 0.5")
    if "train.steps" in changes:
        raise UsageError("--epochs and --steps both say when to stop", fix="leave one of them out")
    if this_launch().world_size > 1 and text is not None and not is_prepared(user_path(text.inputs[0])):
        raise UsageError(
            "--epochs with several processes needs data that is prepared already: each of them counts it",
            fix="run `resmol prepare OUT --input TEXT` first, and give --data OUT",
        )


def _data_path(run: RunDir, text: Text | None) -> dict[str, str]:
    """Return the change of the configuration that names the folder of the data."""
    if text is None:
        return {}
    folder = named_folder(text.inputs[0], run)
    return {"data.path": run.data.name if folder == run.data else folder.resolve().as_posix()}


def resolve_config(
    run: RunDir,
    config: RunConfig | None,
    changes: Mapping[str, Any],
    accept_drift: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration to run with, and the accepted drifts from the one that the ledger recorded.

    An edited ``config.toml`` is a request like any other; a lost one is taken from the ledger.

    Args:
        run: The run directory.
        config: The requested configuration; None takes the stored one.
        changes: ``section.key`` -> value, laid over it.
        accept_drift: Class B fields that may differ from the stored configuration.
        tokenizer: The tokenizer that the user named; a new run gets the vocabulary that fits it.

    Raises:
        UsageError: The run is new, and there is no configuration.
        ConfigError: A value is wrong, or a field differs that may not.
        DataError: The run was written in another format.
    """
    if not run.has_begun():
        return first_request(run, config, changes, tokenizer), {}
    stored = run.load_config() if run.exists() else None
    before = recorded_config(run.ledger, stored) or stored
    if before is None:
        return first_request(run, config, changes, tokenizer), {}
    if tokenizer is not None and tokenizer.sha256 != before.tokenizer.sha256:
        raise ConfigError(
            f"{run.path} was started with the tokenizer {before.tokenizer.sha256[:12]}; {tokenizer.path} is "
            f"{tokenizer.sha256[:12]}",
            fix="leave --tokenizer out, since the run has a copy of its own; or start a new run directory",
        )
    if config is not None and stored is not None:
        _refuse_edits(stored, before)
    requested = _laid_over(config or stored or before, changes)
    if config is not None and config.tokenizer == TokenizerConfig():  # a preset does not know the run's tokenizer
        requested = with_vocabulary(requested, Vocabulary.stated_by(before), changes)
    if not requested.data.path and requested.data.source is None:  # a preset does not say where it lies; the run does
        requested = requested.replace(_data_of(before))
    _refuse_mixing(run, before, requested)
    _refuse_late_averaging(before, requested)
    try:
        resolved, drifts = reconcile(before, requested, accept_drift)
    except ConfigError as error:
        if config is None:
            raise
        own = "leave --preset and --config out: the run has a configuration of its own, and a preset may change"
        raise ConfigError(error.what, fix=f"{own}; else {error.fix}") from None
    _refuse_another_past(run, before, resolved)
    return resolved, drifts


def first_request(
    run: RunDir, config: RunConfig | None, changes: Mapping[str, Any], tokenizer: Tokenizer | None
) -> RunConfig:
    """Return the configuration for a run that has not taken a step: the one that is given, else a failed start's."""
    if config is None and not run.exists():
        raise UsageError(
            f"{run.path} is a new run, and neither a preset nor a configuration was given",
            fix="add --preset nano (or another preset, or --config FILE)",
        )
    requested = _laid_over(config or run.load_config(), changes)
    return requested if tokenizer is None else with_vocabulary(requested, Vocabulary.of(tokenizer), changes)


def _laid_over(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with changes.

    Raises:
        ConfigError: They do not fit.
        UsageError: They name a text, and the configuration a mixture.
    """
    if config.data.source is not None and changes.get("data.path"):
        names = ", ".join(source.name for source in config.data.source)
        raise UsageError(
            f"--data names a text, and the configuration a mixture: {names}",
            fix="leave --data out; or give a configuration without [[data.source]]",
        )
    return config.replace(changes)


def _data_of(config: RunConfig) -> dict[str, Any]:
    """Return the changes that let another configuration read what this one reads."""
    if config.data.source is None:
        return {"data.path": config.data.path}
    data = config.data.model_dump(mode="json")
    return {"data.source": data["source"], "data.stage": data["stage"]}


def _refuse_mixing(run: RunDir, before: RunConfig, requested: RunConfig) -> None:
    """Refuse to make a mixture of a run's only text, or the other way round (`ConfigError`)."""
    was, wanted = (
        "one text" if config.data.source is None else f"a mixture of {len(config.data.source)}"
        for config in (before, requested)
    )
    if (before.data.source is None) != (requested.data.source is None):
        raise ConfigError(
            f"{run.path} reads {was}, and the configuration asks for {wanted}",
            fix="start a new run directory; a mixture may get other weights and more sources, but begins with a run",
        )


def _refuse_weights(run: RunDir) -> None:
    """Refuse the name of a file, a checkpoint or a model where a run is meant (`UsageError`)."""
    names = {run.path.name} if run.path.is_file() else {path.name for path in _entries(run.path)}
    if STATE in names:
        raise UsageError(f"{run.path} is a checkpoint", fix="name its run, the folder that holds checkpoints/")
    if any(name == "config.json" or name.endswith(WEIGHTS) for name in names):
        raise UsageError(f"{run.path} holds a model, not a run", fix=f"name a new folder for a run; {FROM_SCRATCH}")
    if run.path.is_file():
        raise UsageError(f"{run.path} is a file", fix="name a folder for the run")


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def tokenizer_of_data(run: RunDir, config: RunConfig | None, changes: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that prepared data was made with, where a new run asks for none (`DataError`: not here)."""
    folder = stored_folder(run, changes.get("data.path", ""))
    if config is not None and config.data.source is not None:
        folder = stored_folder(run, config.data.source[0].path, config.data.source[0].name)
    asked = TokenizerConfig() if config is None else config.tokenizer
    if run.has_begun() or folder == run.data or asked != TokenizerConfig() or "tokenizer.sha256" in changes:
        return None
    sha256 = open_dataset(folder).tokenizer_sha256
    return None if sha256 == asked.sha256 else load_tokenizer(sha256=sha256)


def _refuse_edits(stored: RunConfig, recorded: RunConfig) -> None:
    """Refuse an edited ``config.toml`` beside another configuration: one of the two would be ignored."""
    found, known = stored.bound_fields(), recorded.bound_fields()
    edits = [f"  - {key}: {known[key]!r} -> {value!r}" for key, value in found.items() if value != known[key]]
    if edits:
        raise ConfigError(
            "the run's config.toml was edited, and another configuration is given as well:\n" + "\n".join(edits),
            fix="undo the edit, or leave out --preset and --config to ask for what the file says now",
        )


def _refuse_late_averaging(before: RunConfig, requested: RunConfig) -> None:
    """Refuse to switch averaging on, off or over in a run: an average is one of all its steps from the first."""
    was, wanted = before.averaging, requested.averaging
    if was != wanted:
        kept = f"since its first step with {was.fraction}, every {was.every}" if was.fraction else "no weights"
        raise ConfigError(
            f"averaging.fraction is {wanted.fraction}, every {wanted.every}; this run averages {kept}",
            fix="start a new run directory: an average begins with a run"
            + ("; or leave averaging as it was, and take the weights of the last step" if was.fraction else ""),
        )


def _refuse_another_past(run: RunDir, before: RunConfig, after: RunConfig) -> None:
    """Refuse a schedule that gives another learning rate to a step that is done."""
    done = max((step_of(path) for path in list_checkpoints(run.checkpoints)), default=0)
    if step := first_changed_step(before.schedule, after.schedule, done):
        raise ConfigError(
            f"the schedule that is asked for gives step {step} another learning rate, and the run is at step {done}",
            fix=f"plan a decay that begins at step {done} or later: schedule.decay_start={done}",
        )
