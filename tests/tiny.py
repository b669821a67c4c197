"""What tests and fixtures share: made-up texts, the type of the tiny run, a made-up step, a forged ledger."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from resmol.run.checkpoint import digest_all
from resmol.run.checkpoint_manifest import MANIFEST, WEIGHTS, Manifest, checkpoint_name, file_entry, read_manifest
from resmol.run.directory import RunDir
from resmol.run.ledger import GENESIS, Record, canonical, float_bits, read_ledger
from resmol.train.step import TrainState


def synthetic_texts(count: int, *, seed: int = 0, words: int = 60) -> list[str]:
    """Return ``count`` texts of made-up words, numbers, punctuation and some letters beyond ASCII."""
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ner", "ta", "shu", "ver", "ing", "é", "ß", "the", "an"]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(200)]
    texts = []
    for _ in range(count):
        parts = [draw.choice(lexicon) for _ in range(draw.randint(words // 2, words))]
        parts[draw.randrange(len(parts))] = str(draw.randrange(10_000))
        texts.append(" ".join(parts) + draw.choice([".", "!\n", "?\r\n", " …"]))
    return texts


class TrainTiny(Protocol):
    """Starts or resumes a tiny run in this process."""

    def __call__(self, run: Path, steps: int, *overrides: str, **options: Any) -> TrainState: ...


def step_record(step: int) -> dict[str, object]:
    """Return the fields of a made-up step."""
    loss = 11.0 / step**0.1
    return {
        "step": step, "loss": loss, "loss_bits": float_bits(loss), "grad_norm": 1.0, "grad_norm_bits": float_bits(1.0),
        "lr": 1e-3, "tokens": 64, "tokens_seen": 64 * step, "windows_seen": step,
        "windows": "0" * 16, "epoch": step / 100, "seconds": 0.01,
    }  # fmt: skip


def rewrite(run: RunDir, change: Callable[[list[Record]], list[Record]]) -> None:
    """Forge a ledger: change the records, then chain them anew, as a careful forger would."""
    head, lines = GENESIS, []
    for number, record in enumerate(change(read_ledger(run.ledger).records), start=1):
        line = canonical({**record, "seq": number, "prev": head})
        head = hashlib.sha256(line).hexdigest()
        lines.append(line + b"\n")
    run.ledger.write_bytes(b"".join(lines))


def change_weight(run: RunDir, step: int) -> None:
    """Change one bit of one weight in a checkpoint, and every hash that covers it."""
    path = run.checkpoints / checkpoint_name(step)
    weights = load_file(path / WEIGHTS)
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    old = read_manifest(path)
    files = {**old.files, WEIGHTS: file_entry(path / WEIGHTS, digest_all(weights))}
    new = old.model_copy(update={"files": files})
    manifest = Manifest.model_validate(new.model_dump())  # its digest is computed once
    (path / MANIFEST).write_bytes(manifest.to_bytes())
    rewrite(run, lambda records: [
        {**r, "manifest_sha256": manifest.sha256} if r.get("manifest_sha256") == old.sha256 else r for r in records
    ])  # fmt: skip
