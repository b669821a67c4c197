"""How much of each source of a mixture a run has read, as its ledger recorded it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resmol.run.ledger import Record, last_fact


@dataclass(frozen=True)
class SourceRead:
    """One source.

    Attributes:
        name: Its name.
        tokens: Targets that were read from it, over all epochs.
        share: Of all tokens.
        epochs: How often its windows were read.
        fingerprint: That of its tokens.
    """

    name: str
    tokens: int
    share: float
    epochs: float
    fingerprint: str


def sources_read(records: list[Record], steps: Iterable[Record]) -> list[SourceRead]:
    """Return what some steps read of each source; nothing for a run without a mixture.

    Args:
        records: The ledger.
        steps: Steps of its history, from the first on.
    """
    sources: list[dict[str, Any]] = last_fact(records, "sources") or []
    tokens, seen = [0] * len(sources), [0] * len(sources)
    for record in steps if sources else ():
        for number, count in enumerate(record["sources_tokens"]):  # sources that were added later are not in it
            tokens[number] += count
            seen[number] = record["sources_seen"][number]
    shares = [count / max(sum(tokens), 1) for count in tokens]
    return [
        SourceRead(one["name"], count, share, windows / one["windows"], one["fingerprint"])
        for one, count, windows, share in zip(sources, tokens, seen, shares, strict=True)
    ]
