"""The Python interface: train a model, load one, measure one. The command line calls nothing else for these."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.config.load import load_config
from resmol.data.loader import Loader
from resmol.data.shards import Dataset, open_dataset, verify_shards
from resmol.data.resolve import Text, data_folder, is_prepared, open_or_prepare, prepare_text
from resmol.train.parallel import Runtime
from resmol.errors import UsageError
from resmol.train.evaluate import evaluate
from resmol.config.model_config import ModelConfig
from resmol.train.start import Launch, launch
from resmol.interop.load import LoadedModel, load_model
from resmol.run.directory import RunDir
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.train.loop import TrainState
from resmol.verify import verify, verify_foreign
from resmol.run.log_writers import View

Say = Callable[[str], None]
DEFAULT_EVALUATION_LENGTH = 512
_NAME_MAP_FIX = "give a JSON object: their name -> Hugging Face's"


def _silent(_: str) -> None:
    return None


def train_model(
    config: RunConfig | None,
    run: str | Path,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    accept_drift: Sequence[str] = (),
    allow_fresh: bool = False,
    strict: bool = False,
    views: Callable[[RunConfig], Sequence[View]] = lambda _: (),
    say: Say = _silent,
) -> TrainState:
    """Start a run, or resume it bit for bit, and train it to ``train.steps``.

    Args:
        config: The configuration; None resumes with the stored one.
        run: The run directory.
        data: A prepared folder, or text to prepare on the fly; None reads what the run read before.
        overrides: ``section.key=value``, laid over the configuration.
        tokenizer: Where to find ``tokenizer.json``; None looks in the usual places.
        accept_drift: Class B fields that may differ from the stored configuration.
        allow_fresh: Begin again when every checkpoint is damaged.
        strict: Refuse an environment in which bitwise equality is not promised.
        views: Makes what shows the ledger while it grows.
        say: Receives sentences for the user.

    Returns:
        The state after the last step: ``model``, ``optimizer``, ``step``, ``tokens_seen``.

    Raises:
        ResmolError: Every failure is one of these, with a sentence on what to do.
    """
    directory = RunDir(Path(run))
    if data is not None:
        folder = data_folder(data, "", directory.data)
        own = folder == directory.data
        overrides = [*overrides, f"data.path={directory.data.name if own else folder.resolve()}"]

    def open_data(settled: RunConfig) -> tuple[Dataset, Tokenizer]:
        found = run_tokenizer(directory, settled, tokenizer, say)
        dataset = open_or_prepare(data_folder(None, settled.data.path, directory.data), data, found, say)
        verify_shards(dataset, say)
        return dataset, found

    return launch(
        Launch(
            run=directory,
            config=config,
            overrides=overrides,
            dataset=open_data,
            views=views,
            say=say,
            accept_drift=accept_drift,
            allow_fresh=allow_fresh,
            strict=strict,
        )
    )


def run_tokenizer(run: RunDir, config: RunConfig, source: str | Path | None, say: Say = _silent) -> Tokenizer:
    """Return the tokenizer of a run: the copy in its directory if there is one."""
    own = run.tokenizer if run.tokenizer.is_file() and source is None else source
    return load_tokenizer(own, sha256=config.tokenizer.sha256, say=say)


def evaluate_model(
    model: str | Path, data: str | None = None, *, windows: int = 0, seq_len: int = 0, say: Say = _silent
) -> dict[str, Any]:
    """Measure the loss of a model on held-out text.

    Args:
        model: A run, a checkpoint, a Hugging Face folder or a Hub id.
        data: A prepared folder (its held-out part, or all where it has none) or text; None takes the run's own.
        windows: How many windows to use; 0 takes all.
        seq_len: Tokens in a window; 0 takes the run's, or 512.
        say: Receives sentences for the user.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``, and what was measured.

    Raises:
        UsageError: ``windows`` or ``seq_len`` is negative.
        DataError: There is no text to evaluate on.
    """
    if windows < 0 or seq_len < 0:
        raise UsageError(f"windows {windows} and seq_len {seq_len} must not be negative", fix="0 takes the default")
    loaded = load_model(model, say=say)
    run = RunDir(Path(model))
    config = load_config(run.config) if run.exists() else None
    with tempfile.TemporaryDirectory(prefix="resmol-evaluate-") as scratch:
        dataset = _evaluation_data(data, config, run, loaded, Path(scratch), say)
        stream = dataset.val if len(dataset.val) > 1 else dataset.train
        length = seq_len or (config.data.seq_len if config else DEFAULT_EVALUATION_LENGTH)
        length = min(length, loaded.config.max_position_embeddings, len(stream) - 1)
        loader = Loader(
            stream, seq_len=length, micro_batch_size=1, micro_batches_per_step=1, seed=0,
            eos_id=dataset.eos_id, document_mask=config.data.document_mask if config else True, allow_short=True,
        )  # fmt: skip
        runtime = Runtime(0, 1, loaded.model.lm_head.weight.device, None)
        batches = loader.sequential(max(1, 2048 // length), windows or None)
        result = evaluate(loaded.model, batches, loaded.tokenizer.byte_lengths(), runtime)
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seq_len": length,
        "split": "val" if stream is dataset.val else "all",
        "data_fingerprint": dataset.fingerprint,
        "model": loaded.provenance.to_dict(),
    }


def verify_model(
    config: ModelConfig,
    weights: str = "random",
    model: str | None = None,
    names: Path | None = None,
    say: Say = _silent,
) -> list[Check]:
    """Verify our implementation, with random or given weights, or somebody else's.

    Args:
        config: The architecture, for random weights and for other implementations.
        weights: ``random``, or whatever `load_model` takes; the architecture is then theirs.
        model: Another implementation as ``module:callable``: called with ``config``, it returns a module that takes ids
            and returns logits. Naming it runs its code.
        names: A JSON file that maps its parameter names to Hugging Face's.
        say: Receives sentences for the user.

    Raises:
        UsageError: ``model`` cannot be imported, or ``names`` is not a map of names.
    """
    if model is not None:
        return verify_foreign(import_factory(model), config, _name_map(names), say=say)
    if weights == "random":
        return verify(config, say=say)
    loaded = load_model(weights, device="cpu", say=say)
    return verify(loaded.config, weights=loaded.model, say=say)


def import_factory(name: str) -> Callable[[ModelConfig], nn.Module]:
    """Import ``module:callable``, looking into the current directory as well (`UsageError` when it is not there)."""
    module_name, colon, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--model {name}: {error}", fix="name an importable module and a callable in it") from None
    if not callable(found):
        raise UsageError(f"--model {name} is not module:callable", fix="write e.g. --model my_model:build")
    return cast("Callable[[ModelConfig], nn.Module]", found)


def _name_map(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", fix=_NAME_MAP_FIX) from None
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise UsageError(f"{path} is not a map of names", fix=_NAME_MAP_FIX)
    return table


def _evaluation_data(
    data: str | None, config: RunConfig | None, run: RunDir, loaded: LoadedModel, scratch: Path, say: Say
) -> Dataset:
    if data is not None and not is_prepared(Path(data)):
        return prepare_text(scratch / "data", Text(inputs=(data,), val_fraction=0.0), loaded.tokenizer, say)
    return open_dataset(data_folder(data, config.data.path if config else "", run.data))
