"""Measure the loss of a model on held-out text, with the settings of its run where it has one."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from resmol.data.loader import Batch, Loader
from resmol.data.resolve import Text, is_prepared, prepare_text
from resmol.data.shards import Dataset, TokenStream, open_dataset
from resmol.data.sources import RunData, datasets_of, open_recorded
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.model_ref import ModelRef
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.system.user_paths import user_path
from resmol.train.evaluate import evaluate, windows_at_once
from resmol.train.parallel import Runtime

logger = logging.getLogger(__name__)

DEFAULT_EVALUATION_LENGTH = 512


def evaluate_model(
    model: str | Path | ModelRef,
    data: str | None = None,
    *,
    windows: int = 0,
    seq_len: int = 0,
    text_field: str = "text",
    tokenizer: Tokenizer | str | Path | None = None,
) -> dict[str, Any]:
    """Measure the loss of a model on held-out text.

    A document of a text begins with what the model's tokenizer puts before one, if the model was trained elsewhere; the
    beginning is read, and not predicted.

    Args:
        model: Whatever `load_model` takes. A checkpoint has the settings and the text of the run that it lies in.
        data: A prepared folder (its held-out part, or all where it has none) or text; None takes the run's own.
        windows: How many windows to use; 0 takes all.
        seq_len: Tokens in a window; 0 takes the run's, or 512.
        text_field: The field or column of ``data`` with the text, as `ReadOptions` has it.
        tokenizer: What `load_model` takes.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``, and what was measured.

    Raises:
        UsageError: ``windows`` or ``seq_len`` is negative.
        DataError: There is no text to evaluate on.
    """
    if windows < 0 or seq_len < 0:
        raise UsageError(f"windows {windows} and seq_len {seq_len} must not be negative", fix="0 takes the default")
    loaded = load_model(model, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory(prefix="resmol-evaluate-") as scratch:
        opened = _evaluation_data(data, text_field, loaded, Path(scratch))
        dataset, held_out = next(iter(datasets_of(opened).values())), _held_out(opened)
        loader, length = _loader(held_out or [dataset.train], seq_len, loaded, dataset.eos_id)
        batches = loader.sequential(windows_at_once(length), windows or None)
        _require_rows(batches if dataset.vocab_size > loaded.config.vocab_size else (), loaded.config.vocab_size)
        starts = _DocumentStarts(batches, loaded, dataset.eos_id)
        result = evaluate(
            loaded.model, starts, loaded.tokenizer.byte_lengths(), Runtime.single(loaded.model.lm_head.weight.device),
            spelled_bytes=loaded.tokenizer.spelled_end_bytes(loader.spelled_ends(windows or None) - starts.ends()),
        )  # fmt: skip
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seq_len": length,
        "split": "val" if held_out else "train" if _was_trained_on(dataset, loaded) else "all",
        "data_fingerprint": opened.fingerprint,
        "model": loaded.source.to_dict(),
    }


def _held_out(data: RunData) -> list[TokenStream]:
    """Return the held-out text of each source that has some."""
    return [dataset.val for dataset in datasets_of(data).values() if len(dataset.val) > 1]


def _loader(texts: Sequence[TokenStream], seq_len: int, loaded: LoadedModel, eos_id: int) -> tuple[Loader, int]:
    """Return the windows of texts that fill one, and their length: the one asked for (0: the run's), or the longest."""
    settings = loaded.source.settings
    wanted = seq_len or (settings.data.seq_len if settings else DEFAULT_EVALUATION_LENGTH)
    length = min(wanted, loaded.config.max_position_embeddings, max(len(text) - 1 for text in texts))
    loader = Loader(
        [text for text in texts if len(text) > length], seq_len=length, micro_batch_size=1, grad_accum_steps=1, seed=0,
        eos_id=eos_id, document_mask=settings.data.document_mask if settings else True, allow_short=True,
    )  # fmt: skip
    return loader, length


def _evaluation_data(data: str | None, text_field: str, loaded: LoadedModel, scratch: Path) -> RunData:
    if data is not None and not is_prepared(user_path(data)):
        text = Text(inputs=(data,), val_fraction=0.0, options=ReadOptions(text_field=text_field))
        return prepare_text(scratch / "data", text, loaded.tokenizer)
    if data is not None:
        return _prepared(user_path(data), loaded.tokenizer)
    run, settings = loaded.source.run, loaded.source.settings
    if run is None or settings is None:
        raise DataError(
            f"{loaded.source.path} belongs to no run, so it has no held-out text of its own",
            fix="name some: --data input.txt, or a folder that `resmol prepare` wrote",
        )
    own = open_recorded(run, settings.data)
    if not _held_out(own):
        folder = next(dataset.root for dataset in datasets_of(own).values())
        raise DataError(
            f"the data of {run.path} has no held-out text: all of it was trained on",
            fix=f"name another text: --data input.txt; or, for the loss on the training text, --data {folder}",
        )
    return own


def _was_trained_on(dataset: Dataset, loaded: LoadedModel) -> bool:
    """Return whether the model's run read this data, or text that it was made of."""
    run, settings = loaded.source.run, loaded.source.settings
    if run is None or settings is None:
        return False
    try:
        own = datasets_of(open_recorded(run, settings.data)).values()
    except DataError:  # the run's data is not here any more
        return False
    inputs = {one.sha256 for mine in own for one in mine.manifest.source.inputs}
    if dataset.fingerprint in {mine.fingerprint for mine in own}:
        return True
    return any(one.sha256 in inputs for one in dataset.manifest.source.inputs)


def _prepared(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """Open a prepared folder; say so if its ids may be another tokenizer's."""
    dataset = open_dataset(folder)
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        logger.warning(
            f"{folder} was prepared with another tokenizer.json ({dataset.tokenizer_sha256[:12]}) than the model's "
            f"({tokenizer.sha256[:12]}); the loss means something only if both give the same ids"
        )
    return dataset


def _require_rows(batches: Sequence[Batch], rows: int) -> None:
    """Refuse tokens that the model has no row for, before it is asked about them."""
    highest = max((int(batch.input_ids.max()) for batch in batches), default=0)
    if highest >= rows:
        raise DataError(
            f"the text holds the token {highest}, and the model has {rows} rows",
            fix="evaluate on a text without added tokens, prepared with the model's own tokenizer",
        )


class _DocumentStarts(Sequence[Batch]):
    """Batches in which the token that begins a document is read, and is no target.

    Where a document begins with the token that also ends one, the second of two in a row begins the next document, so
    that its text can see it.

    Args:
        batches: The batches as the loader reads them.
        loaded: The model, with its tokenizer.
        eos_id: The token that ends a document.
    """

    def __init__(self, batches: Sequence[Batch], loaded: LoadedModel, eos_id: int) -> None:
        self._batches = batches
        self._start = loaded.tokenizer.document_start
        self._eos_id = eos_id

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        batch = self._batches[index]
        return self._with_starts(batch) if self._start else batch

    def ends(self) -> int:
        """Return how many beginnings of documents look like an end token that a text spells."""
        if self._start[:1] != [self._eos_id]:
            return 0
        return sum(batch.tokens - self._with_starts(batch).tokens for batch in self._batches)

    def _with_starts(self, batch: Batch) -> Batch:
        follows_end = batch.input_ids == self._eos_id
        begins = follows_end & (batch.targets == self._start[0])
        targets = batch.targets.masked_fill(begins, IGNORE_INDEX)
        documents = batch.document_ids
        if documents is not None and self._start[0] == self._eos_id:
            first = torch.tensor([window == 0 for window in batch.window_ids])  # a text begins with a beginning
            documents = _document_ids(follows_end, torch.cat([first[:, None], begins[:, :-1]], dim=1))
        return replace(batch, targets=targets, document_ids=documents, tokens=int((targets != IGNORE_INDEX).sum()))


def _document_ids(ends: Bool[Tensor, "B T"], starts: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """Return how many documents ended before each position; an end token that begins a document ends none."""
    closing = (ends & ~starts).long()
    return closing.cumsum(1) - closing
