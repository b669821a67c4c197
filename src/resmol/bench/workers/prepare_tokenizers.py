"""Worker of `resmol bench prepare`: the bare tokenizers library, in a script as its users write it.

It reads the same JSON lines with the same number of threads and writes the ids. ``tuned`` uses the call that computes
no offsets, in smaller batches, and discards the ids. Imports are not timed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from resmol.bench.workers.main import Metrics, worker_main
from resmol.system.peak_memory import peak_memory_bytes

DOCUMENTS_AT_ONCE, TUNED_DOCUMENTS = 1000, 256  # the first is the default batch of `datasets.map`


def encode_with_tokenizers(task: Mapping[str, Any]) -> Metrics:
    """Encode the text with one end-of-document token after each document, as resmol does."""
    tokenizer, tuned = tokenizers.Tokenizer.from_file(task["tokenizer"]), task["tuned"]
    encode = tokenizer.encode_batch_fast if tuned else tokenizer.encode_batch
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    end = tokenizer.token_to_id("<|endoftext|>")
    tokens, base, started = 0, peak_memory_bytes(), time.perf_counter()
    with Path(task["out"]).open("wb") as out:
        for documents in batches(Path(task["text"]), TUNED_DOCUMENTS if tuned else DOCUMENTS_AT_ONCE):
            for encoding in encode(documents, add_special_tokens=False):
                tokens += len(encoding) + 1
                if not tuned:
                    out.write(np.array([*encoding.ids, end], dtype=dtype).tobytes())
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": tokens,
        "megabytes_per_second": task["text_bytes"] / 1e6 / seconds,
        "bytes_above_base": peak_memory_bytes() - base,
    }


def batches(path: Path, size: int) -> Iterator[list[str]]:
    """Yield the texts of a file of JSON lines in lists of ``size``."""
    with path.open(encoding="utf-8") as lines:
        while batch := [json.loads(line)["text"] for line in itertools.islice(lines, size)]:
            yield batch


if __name__ == "__main__":
    worker_main(encode_with_tokenizers)
