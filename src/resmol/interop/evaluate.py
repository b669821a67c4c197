"""Measure the loss of a model on held-out text, with the settings of its run where it has one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from resmol.data.loader import Loader
from resmol.data.resolve import Text, data_folder, is_prepared, prepare_text
from resmol.data.shards import Dataset, open_dataset
from resmol.errors import DataError, UsageError
from resmol.interop.load import LoadedModel, load_model
from resmol.system.user_paths import user_path
from resmol.train.evaluate import evaluate
from resmol.train.parallel import Runtime

DEFAULT_EVALUATION_LENGTH = 512


def evaluate_model(model: str | Path, data: str | None = None, *, windows: int = 0, seq_len: int = 0) -> dict[str, Any]:
    """Measure the loss of a model on held-out text.

    Args:
        model: Whatever `load_model` takes. A checkpoint has the settings and the text of the run that it lies in.
        data: A prepared folder (its held-out part, or all where it has none) or text; None takes the run's own.
        windows: How many windows to use; 0 takes all.
        seq_len: Tokens in a window; 0 takes the run's, or 512.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``, and what was measured.

    Raises:
        UsageError: ``windows`` or ``seq_len`` is negative.
        DataError: There is no text to evaluate on.
    """
    if windows < 0 or seq_len < 0:
        raise UsageError(f"windows {windows} and seq_len {seq_len} must not be negative", fix="0 takes the default")
    loaded = load_model(model)
    settings = loaded.source.settings
    with tempfile.TemporaryDirectory(prefix="resmol-evaluate-") as scratch:
        dataset = _evaluation_data(data, loaded, Path(scratch))
        stream = dataset.val if len(dataset.val) > 1 else dataset.train
        length = seq_len or (settings.data.seq_len if settings else DEFAULT_EVALUATION_LENGTH)
        length = min(length, loaded.config.max_position_embeddings, len(stream) - 1)
        loader = Loader(
            stream, seq_len=length, micro_batch_size=1, grad_accum_steps=1, seed=0,
            eos_id=dataset.eos_id, document_mask=settings.data.document_mask if settings else True, allow_short=True,
        )  # fmt: skip
        runtime = Runtime.single(loaded.model.lm_head.weight.device)
        batches = loader.sequential(max(1, 2048 // length), windows or None)
        result = evaluate(
            loaded.model, batches, loaded.tokenizer.byte_lengths(), runtime,
            spelled_bytes=loaded.tokenizer.spelled_end_bytes(loader.spelled_ends(windows or None)),
        )  # fmt: skip
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seq_len": length,
        "split": "val" if stream is dataset.val else "all",
        "data_fingerprint": dataset.fingerprint,
        "model": loaded.source.to_dict(),
    }


def _evaluation_data(data: str | None, loaded: LoadedModel, scratch: Path) -> Dataset:
    if data is not None and not is_prepared(user_path(data)):
        return prepare_text(scratch / "data", Text(inputs=(data,), val_fraction=0.0), loaded.tokenizer)
    if data is not None:
        return open_dataset(user_path(data))
    run, settings = loaded.source.run, loaded.source.settings
    if run is None or settings is None:
        raise DataError(
            f"{loaded.source.path} belongs to no run, so it has no held-out text of its own",
            fix="name some: --data input.txt, or a folder that `resmol prepare` wrote",
        )
    return open_dataset(data_folder(None, settings.data.path, run.data))
