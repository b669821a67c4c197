"""Tell the ends of documents from end tokens that a text spells: both are the same token."""

from __future__ import annotations

import numpy as np

from resmol.data.shards import TokenStream

_BLOCK_TOKENS = 1 << 20


def count_spelled_ends(stream: TokenStream, eos_id: int, start: int, stop: int) -> int:
    """Return how many of the tokens [start, stop) are end tokens where, by the index, no document ends.

    A text that holds the spelling ``<|endoftext|>`` has the token there, unless it was prepared as text.

    Raises:
        DataError: A shard is damaged.
        OSError: An index cannot be read.
    """
    count, first = 0, 0
    for shard in stream.shards:
        begin, end = max(start, first), min(stop, first + shard.tokens)
        if begin < end:
            document_ends = np.fromfile(stream.root / f"{shard.name}.index", dtype="<u8").astype(np.int64)
            to_file = shard.start - first  # from a position in the stream to one in the file
            for position in range(begin, end, _BLOCK_TOKENS):
                tokens = stream.read(position, min(position + _BLOCK_TOKENS, end))
                ends = np.flatnonzero(tokens == eos_id) + position + to_file + 1
                count += int(np.count_nonzero(~np.isin(ends, document_ends)))
        first += shard.tokens
    return count
