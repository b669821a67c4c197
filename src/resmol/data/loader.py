"""From token shards to batches: fixed windows, in the order that `resmol.data.shuffle` computes.

Window w is the tokens [w*T, w*T + T + 1): its first T are the inputs, its last T the targets, so neighboring
windows share one token and every token but the stream's first is a target exactly once an epoch. The last
window may be short; it is padded, and the padding is no target. What a run has seen is one number: how many windows,
over all epochs. A step takes the next ones of the order, as many as the batch has today, so a batch size that changes
on the way skips nothing and repeats nothing.

With `recut` windows begin elsewhere in each epoch: the stream is a ring, which an epoch after the first enters at
another token (`ring_start`). An epoch is as long as before and has as many windows.

The windows of several streams, the sources of a mixture, are numbered through in the order of the streams; which of
them come next is then the business of `resmol.data.mixture`.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from resmol.data.document_ends import count_spelled_ends
from resmol.data.mixture import MixtureOrder
from resmol.data.shards import TokenStream
from resmol.data.shuffle import WindowShuffle
from resmol.errors import ConfigError, DataError
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.run.mixture_place import MixturePlace
from resmol.system.wording import counted


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the CPU. B rows (windows), T tokens each.

    Attributes:
        input_ids: Token ids.
        targets: The token after each input; IGNORE_INDEX where there is none.
        document_ids: The number of the document in its row, from 0; the end token belongs to the document it
            ends. None when masks are off, or when no row has a border: plain causal attention is then the same.
        window_ids: The window of each row, within its epoch.
        tokens: Targets other than IGNORE_INDEX.
    """

    input_ids: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    document_ids: Int64[Tensor, "B T"] | None
    window_ids: tuple[int, ...]
    tokens: int

    def cut(self, length: int) -> Batch:
        """Return the same tokens in rows of ``length``, a divisor of T; what came before in a window is out of sight.

        The rows of a window follow each other, and its documents keep their numbers.
        """
        if length == self.input_ids.shape[1]:
            return self
        documents = None if self.document_ids is None else self.document_ids.view(-1, length)
        return replace(
            self,
            input_ids=self.input_ids.view(-1, length),
            targets=self.targets.view(-1, length),
            document_ids=documents,
        )


class Batches(Sequence[Batch]):
    """Batches that are read from the shards when they are asked for, each time anew; a slice reads nothing.

    Args:
        read: Reads the batch of some windows (`DataError` when a shard is damaged).
        windows: The windows of each batch.
    """

    def __init__(self, read: Callable[[Sequence[int]], Batch], windows: Sequence[Sequence[int]]) -> None:
        self._read = read
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(self._read, self.windows[index])
        return self._read(self.windows[index])


@dataclass(frozen=True)
class StepBatch:
    """The data of one optimizer step, as one rank sees it.

    Attributes:
        batches: The micro-batches of this rank.
        tokens: Targets of the step over all ranks: the divisor of the loss.
        window_digest: The first 16 hex digits of the SHA-256 of the step's window ids (little-endian int64), over all
            ranks.
        windows_seen: Windows that the run has seen after this step, over all epochs.
        epoch: Passes over the stream that are done after this step; in a mixture, over as many windows as all have.
        mixture: Where the run stands in a mixture after this step; None without one.
        source_tokens: Targets of the step in each source of a mixture.
    """

    batches: Sequence[Batch]
    tokens: int
    window_digest: str
    windows_seen: int
    epoch: float
    mixture: MixturePlace | None = None
    source_tokens: tuple[int, ...] = ()


class Loader:
    """The batches of a token stream, or of several.

    Attributes:
        names: What the streams are called, in a mixture.
        n_windows: Windows per epoch, ceil((N - 1) / T) for each stream of N tokens.
        windows_per_step: Windows of one optimizer step, over all ranks.
    """

    def __init__(
        self,
        stream: TokenStream | Sequence[TokenStream],
        *,
        seq_len: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        eos_id: int,
        document_mask: bool = True,
        allow_short: bool = False,
        order: MixtureOrder | None = None,
        names: Sequence[str] = (),
        recut: bool = False,
    ) -> None:
        """Check the sizes; read nothing.

        Args:
            stream: The tokens; several streams have an ``order``, or are read by `sequential` alone.
            seq_len: T.
            micro_batch_size: B.
            grad_accum_steps: Micro-batches of one optimizer step, over all ranks.
            seed: Seed of the order.
            eos_id: The token that ends a document; also the padding of the last window's inputs.
            document_mask: Whether batches carry document ids.
            allow_short: Accept a stream of less than one full window (two tokens at least), for evaluation.
            order: The order of the windows of a mixture.
            names: What the streams are called, in a mixture.
            recut: Whether windows begin elsewhere in each epoch after the first; of one stream.

        Raises:
            ConfigError: A size below 1.
            DataError: Fewer than T + 1 tokens.
        """
        sizes = {"seq_len": seq_len, "micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}", fix="give a number of at least 1")
        self.names = tuple(names)
        self._streams = (stream,) if isinstance(stream, TokenStream) else tuple(stream)
        needed = 2 if allow_short else seq_len + 1
        for one in self._streams:
            if len(one) < needed:
                raise DataError(
                    f"the text has {counted(len(one), 'token')}; a window of {seq_len} needs {needed}",
                    fix="give more text, or a smaller seq_len, or (for held-out data) a larger --val-fraction",
                )
        self._sizes = [count_windows(one, seq_len) for one in self._streams]
        self._offsets = [sum(self._sizes[:number]) for number in range(len(self._sizes))]
        self.n_windows = sum(self._sizes)
        self.windows_per_step = micro_batch_size * grad_accum_steps
        self._seq_len = seq_len
        self._micro_batch_size = micro_batch_size
        self._grad_accum_steps = grad_accum_steps
        self._eos_id = eos_id
        self._document_mask = document_mask
        self._mixture = order
        self._order = order or WindowShuffle(self.n_windows, seed)
        self._ring_seed = seed if recut else None

    def windows_after(self, windows_seen: int) -> Int64[np.ndarray, " G"]:
        """Return the windows of the step that follows ``windows_seen`` windows: the next G positions of the order."""
        if windows_seen < 0:
            raise ValueError(f"a run cannot have seen {windows_seen} windows")
        return self._order.windows(np.arange(windows_seen, windows_seen + self.windows_per_step, dtype=np.int64))

    def step_after(self, windows_seen: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Return the data of the step that follows ``windows_seen`` windows; no token is read until its batches are.

        The ranks share the micro-batches in contiguous blocks, in the order of the ranks.

        Raises:
            ConfigError: The ranks cannot share the micro-batches equally.
        """
        if world_size < 1 or not 0 <= rank < world_size or self._grad_accum_steps % world_size:
            raise ConfigError(
                f"{self._grad_accum_steps} micro-batches a step do not divide by {world_size} ranks",
                fix="choose a number of micro-batches per step that the number of ranks divides",
            )
        windows = self.windows_after(windows_seen)
        numbers = windows
        if self._ring_seed is not None:  # over all epochs, which begin in different places
            numbers = windows + np.arange(windows_seen, windows_seen + len(windows)) // self.n_windows * self.n_windows
        share = self.windows_per_step // world_size
        tokens, after = self._targets(windows), windows_seen + self.windows_per_step
        return StepBatch(
            batches=self._batches(numbers[rank * share : (rank + 1) * share].tolist(), self._micro_batch_size),
            tokens=sum(tokens),
            window_digest=hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()[:16],
            windows_seen=after,
            epoch=after / self.n_windows,
            mixture=None if self._mixture is None else self._mixture.place_at(after),
            source_tokens=() if self._mixture is None else tuple(tokens),
        )

    def sequential(self, batch_size: int, limit: int | None = None) -> Batches:
        """Return the windows in the order of the text, for evaluation; the last batch may have fewer rows.

        A limit leaves as much of each stream, and a batch holds windows of one of them (`streams_of`).

        Args:
            batch_size: Rows of a batch.
            limit: Windows to read at most.
        """
        windows = sorted(islice(self._in_turn(), limit))  # those of a stream are numbered through
        borders = [bisect.bisect_left(windows, offset) for offset in (*self._offsets, self.n_windows)]
        streams = [windows[begin:end] for begin, end in pairwise(borders)]
        return Batches(self._batch, [one for stream in streams for one in _divided(stream, batch_size)])

    def streams_of(self, batches: Batches) -> list[int]:
        """Return the stream that each batch of `sequential` is of, by its number."""
        return [bisect.bisect_right(self._offsets, windows[0]) - 1 for windows in batches.windows]

    def spelled_ends(self, limit: int | None = None) -> int:
        """Return how many targets of `sequential` are end tokens that the text spells, and no end of a document."""
        windows = list(islice(self._in_turn(), limit))
        ends = 0
        for stream, offset, size in zip(self._streams, self._offsets, self._sizes, strict=True):
            count = sum(offset <= window < offset + size for window in windows)
            ends += count_spelled_ends(stream, self._eos_id, 1, min(count * self._seq_len + 1, len(stream)))
        return ends

    def _in_turn(self) -> Iterator[int]:
        for number in range(max(self._sizes)):
            yield from (o + number for o, size in zip(self._offsets, self._sizes, strict=True) if number < size)

    def _batches(self, windows: Sequence[int], size: int) -> Batches:
        return Batches(self._batch, _divided(windows, size))

    def _targets(self, windows: Int64[np.ndarray, " G"]) -> list[int]:
        """Return the targets of these windows in each stream: as many as tokens, but in the last window of a stream."""
        targets = []
        for stream, offset, size in zip(self._streams, self._offsets, self._sizes, strict=True):
            count = int(np.count_nonzero((windows >= offset) & (windows < offset + size)))
            last = int(np.count_nonzero(windows == offset + size - 1))
            targets.append(count * self._seq_len - last * (size * self._seq_len - (len(stream) - 1)))
        return targets

    def _batch(self, windows: Sequence[int]) -> Batch:
        shape = (len(windows), self._seq_len)
        inputs = np.full(shape, self._eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, window in enumerate(windows):
            tokens = self._tokens(window)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        ends = inputs == self._eos_id
        return Batch(
            input_ids=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            document_ids=_document_ids(ends) if self._document_mask else None,
            window_ids=tuple(window % self.n_windows for window in windows),
            tokens=int(np.count_nonzero(targets != IGNORE_INDEX)),
        )

    def _tokens(self, window: int) -> np.ndarray:
        """Read the inputs of a window and the token after them; windows are numbered through over the epochs."""
        epoch, window = divmod(window, self.n_windows)
        number = bisect.bisect_right(self._offsets, window) - 1
        stream, start = self._streams[number], (window - self._offsets[number]) * self._seq_len
        stop = min(start + self._seq_len + 1, len(stream))
        if self._ring_seed is None or epoch == 0:
            return stream.read(start, stop)
        begin, length = ring_start(self._ring_seed, epoch, len(stream)), stop - start
        first = (begin + start) % len(stream)
        head = stream.read(first, min(first + length, len(stream)))
        return np.concatenate([head, stream.read(0, length - len(head))]) if len(head) < length else head


def ring_start(seed: int, epoch: int, tokens: int) -> int:
    """Return the token at which an epoch after the first enters the ring: any one, as if drawn at random."""
    digest = hashlib.sha512(f"resmol window cut, seed {seed}, epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:16], "little") % tokens


def _divided(windows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def count_windows(stream: TokenStream, seq_len: int) -> int:
    """Return the windows of a stream; the last one may be short."""
    return -(-(len(stream) - 1) // seq_len)


def _document_ids(ends: Bool[np.ndarray, "B T"]) -> Int64[Tensor, "B T"] | None:
    """Return how many documents ended before each position; None if none did anywhere."""
    if not ends[:, :-1].any():
        return None
    return torch.from_numpy(np.cumsum(ends, axis=1, dtype=np.int64) - ends)
