"""Row 19: mistakes between the text and the batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from bench import Bench, Mistake, mistake
from tiny import synthetic_texts

from resmol.data import shard_writer
from resmol.data.loader import IGNORE_INDEX, Loader
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import Dataset, TokenStream
from resmol.train.build import make_loader

Writer = shard_writer.SplitWriter


def text_guard(bench: Bench) -> set[str]:
    """Prepare documents, longer than a window too, and ask for each of them; then see one epoch of batches."""
    texts = [*synthetic_texts(30, seed=4), " ".join(synthetic_texts(20, seed=5))]
    try:
        data = prepare(bench.folder / "data", from_texts(texts), bench.tokenizer, val_fraction=0.2, seed=1)
    except ValueError as error:
        return {f"counts in the manifest: {error}"}
    found = set()
    documents = {split: _documents(stream, bench) for split, stream in (("train", data.train), ("val", data.val))}
    expected = Counter(bench.tokenizer.decode(bench.tokenizer.encode(text)) for text in texts)
    if Counter(documents["train"]) + Counter(documents["val"]) - expected:
        found.add("every document, once and apart")
    if expected - (Counter(documents["train"]) + Counter(documents["val"])):
        found.add("every document, whole")
    if not documents["val"] or set(documents["train"]) & set(documents["val"]):
        found.add("held-out text is not trained on")
    return found | _coverage(bench, data)


def _documents(stream: TokenStream, bench: Bench) -> list[str]:
    ids = stream.read(0, len(stream))
    ends = np.flatnonzero(ids == bench.tokenizer.eos_id)
    parts = np.split(ids, ends + 1)
    return [
        bench.tokenizer.decode([i for i in part.tolist() if i != bench.tokenizer.eos_id]) for part in parts if len(part)
    ]


def _coverage(bench: Bench, data: Dataset) -> set[str]:
    """Count the targets of one epoch: all tokens but the first, each as often as it occurs."""
    loader = make_loader(bench.config, data.train)
    seen: Counter[int] = Counter()
    windows = [w for step in range(200) for w in loader.windows_after(step * loader.windows_per_step).tolist()]
    for window in windows[: -(-(len(data.train) - 1) // bench.config.data.seq_len)]:
        seen.update(loader._batch([window]).targets[0].tolist())
    del seen[IGNORE_INDEX]
    everything = Counter(data.train.read(1, len(data.train)).tolist())
    return set() if seen == everything else {"every token in an epoch"}


def last_part_never_seen(patch: pytest.MonkeyPatch) -> None:
    genuine = Loader.__init__

    def init(self: Loader, stream: TokenStream, **options: Any) -> None:
        genuine(self, stream, **options)
        whole = (len(stream) - 1) // options["seq_len"]
        if whole < self.n_windows:
            self.n_windows = whole
            self._order = type(self._order)(whole, options["seed"])

    patch.setattr(Loader, "__init__", init)


def glued(patch: pytest.MonkeyPatch) -> None:
    genuine = Writer.append

    def append(self: Any, ids: np.ndarray) -> None:
        if ids.tolist() != [0]:
            genuine(self, ids)

    patch.setattr(Writer, "append", append)


def cut_to_the_window(patch: pytest.MonkeyPatch) -> None:
    genuine = Writer.append
    patch.setattr(Writer, "append", lambda self, ids: genuine(self, ids[:64]))


def held_out_from_the_training_text(patch: pytest.MonkeyPatch) -> None:
    genuine_init, genuine_append, genuine_end, train = Writer.__init__, Writer.append, Writer.end_document, []

    def init(self: Any, root: Any, split: str, **options: Any) -> None:
        genuine_init(self, root, split, **options)
        train.extend([self] if split == "train" else [])

    def append(self: Any, ids: np.ndarray) -> None:
        genuine_append(self, ids)
        if self is not train[-1]:
            genuine_append(train[-1], ids)

    def end(self: Any) -> None:
        genuine_end(self)
        if self is not train[-1]:
            genuine_end(train[-1])

    for name, function in (("__init__", init), ("append", append), ("end_document", end)):
        patch.setattr(Writer, name, function)


MISTAKES: list[Mistake] = [
    mistake(19, "the last part of the text is never seen", last_part_never_seen, text_guard, "every token"),
    mistake(19, "documents glued without an end", glued, text_guard, "every document"),
    mistake(19, "documents cut to the window", cut_to_the_window, text_guard, "every document, whole"),
    mistake(19, "held-out text drawn from the training text", held_out_from_the_training_text, text_guard, "held-out"),
]
