"""Worker of `resmol bench prepare`: resmol writes shards, hashes, a manifest and held-out documents, durably."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resmol.bench.workers.main import Metrics, worker_main
from resmol.data.resolve import Text, prepare_text
from resmol.data.tokenizer import load_tokenizer
from resmol.system.peak_memory import peak_memory_bytes


def prepare_with_resmol(task: Mapping[str, Any]) -> Metrics:
    """Prepare the text as `resmol prepare` does; imports are not timed."""
    tokenizer = load_tokenizer(task["tokenizer"], sha256=task["sha256"])
    base, started = peak_memory_bytes(), time.perf_counter()
    dataset = prepare_text(Path(task["out"]), Text(inputs=(task["text"],)), tokenizer)
    seconds = time.perf_counter() - started
    tokens = dataset.manifest.train.tokens + dataset.manifest.val.tokens
    return {
        "seconds": seconds,
        "tokens": tokens,
        "megabytes_per_second": task["text_bytes"] / 1e6 / seconds,
        "bytes_above_base": peak_memory_bytes() - base,
    }


if __name__ == "__main__":
    worker_main(prepare_with_resmol)
