"""Mixtures: which source each window of a run comes from, and which of that source's windows it is.

**Which source.** In a stage with the weights w_1 ... w_k (shares that add up to 1), n windows hold x_i(n) of source i.
The (j+1)-th window of source i may come as window number floor(j / w_i) + 1 at the earliest, and has to come as number
ceil((j+1) / w_i) at the latest. Of the sources whose next window may come, the one whose latest number is the smallest
is read, the first in the list if several are: earliest deadline first. Each window of the stage is a unit job with such
a release and such a deadline, for which that rule meets every deadline (Baruah, Cohen, Plaxton and Varvel,
"Proportionate progress", Algorithmica 15, 1996; Steiner and Yeomans, "Level schedules for mixed-model, just-in-time
processes", Management Science 39, 1993). So floor(w_i n) <= x_i(n) <= ceil(w_i n) after any number n of windows, which
reading the source with the largest deficit does not guarantee for many sources. Weights are taken as the exact
fractions that their decimals state, and the arithmetic is that of integers: there is no rounding that could add up.

**Which of its windows.** The n-th window that is read of a source is the n-th of its own `WindowShuffle`, whatever is
read in between: the same as in a run of that source alone.

Both are functions of the configuration, the seed and the windows read so far. Counts begin anew with each stage. The
batch size enters only through the place at which a stage begins, micro-batches and ranks do not enter at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from resmol.config.data_config import StageConfig
from resmol.data.shuffle import WindowShuffle
from resmol.run.mixture_place import MixturePlace


def assign(weights: Sequence[int], counts: Sequence[int], number: int) -> list[int]:
    """Return the sources of the next windows of a stage.

    Args:
        weights: The weight of each source; 0 is never read.
        counts: Windows of each source that the stage holds so far.
        number: How many to assign.
    """
    counts, total, done = list(counts), sum(weights), sum(counts)
    chosen = []
    for after in range(done + 1, done + number + 1):
        released = [i for i, weight in enumerate(weights) if counts[i] * total < weight * after]
        source = min(released, key=lambda i: -(-(counts[i] + 1) * total // weights[i]))
        counts[source] += 1
        chosen.append(source)
    return chosen


def whole_weights(stage: StageConfig, names: Sequence[str]) -> list[int]:
    """Return the weights of all sources as the smallest whole numbers with the same ratios; 0 where there is none."""
    exact = [Fraction(repr(stage.weights[name])) if name in stage.weights else Fraction(0) for name in names]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [weight // math.gcd(*whole) for weight in whole]


def stage_at(stages: Sequence[StageConfig], step: int) -> StageConfig:
    """Return the stage in force at a step, from 1."""
    return next(stage for stage in reversed(stages) if stage.start <= step)


def entered(place: MixturePlace | None, stage: StageConfig, sources: int) -> MixturePlace:
    """Return the place from which a step in ``stage`` reads on: with counts of 0 where the stage was not in force yet.

    Args:
        place: After the step before; None at the beginning of a run. A source that was added since has not been read.
        stage: In force at the step.
        sources: How many there are.
    """
    seen = () if place is None else place.seen
    in_stage = place.in_stage if place is not None and place.stage == stage else ()
    more = (0,) * (sources - len(seen))
    return MixturePlace(seen=seen + more, stage=stage, in_stage=in_stage + (0,) * (sources - len(in_stage)))


class MixtureOrder:
    """The order of the windows of a mixture, from a place on.

    The windows of all sources are numbered through, those of the first source first.

    Attributes:
        names: The sources.
        sizes: Windows of each of them.
        offsets: The number of the first window of each of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        seed: int,
        stages: Sequence[StageConfig],
        windows_per_step: int,
        *,
        step: int = 0,
        place: MixturePlace | None = None,
    ) -> None:
        """Plan the stages; compute nothing yet.

        Args:
            names: The sources.
            sizes: Windows of each source.
            seed: Seed of their orders.
            stages: The stages of the configuration.
            windows_per_step: Windows of a step.
            step: Steps that are done.
            place: Where the run stands after them.
        """
        self.names, self.sizes = tuple(names), tuple(sizes)
        self.offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        self._shuffles = [WindowShuffle(size, seed) for size in sizes]
        self._stages, self._per_step, self._step = tuple(stages), windows_per_step, step
        self._base = entered(place, stage_at(stages, step + 1), len(sizes))
        self._first = sum(self._base.seen)
        self._known = {self._first: self._base}  # and the newest ones: training asks for one step after the other

    def windows(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the windows of the step that begins at the first of these consecutive positions.

        Raises:
            ValueError: They are not the positions of one step.
        """
        first = int(positions[0])
        if not np.array_equal(positions, np.arange(first, first + self._per_step)):
            raise ValueError("the windows of a mixture are read step by step")
        place = self.place_at(first)
        sources = self._take_step(first, place)
        result = np.empty_like(positions)
        for source, (shuffle, offset) in enumerate(zip(self._shuffles, self.offsets, strict=True)):
            mine = sources == source
            own = np.arange(np.count_nonzero(mine), dtype=np.int64) + place.seen[source]
            result[mine] = shuffle.windows(own) + offset
        return result

    def place_at(self, windows_seen: int) -> MixturePlace:
        """Return the place of a step that begins after so many windows (`ValueError` where none begins)."""
        reached = max((known for known in self._known if known <= windows_seen), default=None)
        if reached is None or (windows_seen - self._first) % self._per_step:
            raise ValueError(f"no step of {self._per_step} windows after {self._first} begins at {windows_seen}")
        for first in range(reached, windows_seen, self._per_step):
            self._take_step(first, self._known[first])
        return self._known[windows_seen]

    def most_read(self, step: int) -> tuple[int, ...]:
        """Return how many windows of each source a run will have read after ``step``, rounded up in each stage."""
        most = list(self._base.seen)
        for number, stage in enumerate(self._stages):
            last = self._stages[number + 1].start - 1 if number + 1 < len(self._stages) else step
            begin, end = max(stage.start - 1, self._step), min(last, step)
            if begin >= end:
                continue
            before = self._base.in_stage if stage == self._base.stage else (0,) * len(self.sizes)
            weights, after = whole_weights(stage, self.names), sum(before) + (end - begin) * self._per_step
            for source, (weight, old) in enumerate(zip(weights, before, strict=True)):
                most[source] += -(-weight * after // sum(weights)) - old
        return tuple(most)

    def _take_step(self, first: int, place: MixturePlace) -> Int64[np.ndarray, " G"]:
        """Return the sources of the step that begins at a place, and keep the place of the one that follows."""
        sources = np.array(assign(whole_weights(place.stage, self.names), place.in_stage, self._per_step))
        after = first + self._per_step
        if after not in self._known:
            counts = np.bincount(sources, minlength=len(self.sizes)).tolist()
            done = MixturePlace(
                seen=tuple(map(sum, zip(place.seen, counts, strict=True))),
                stage=place.stage,
                in_stage=tuple(map(sum, zip(place.in_stage, counts, strict=True))),
            )
            step = self._step + (after - self._first) // self._per_step
            self._known = {self._first: self._base, first: place}
            self._known[after] = entered(done, stage_at(self._stages, step + 1), len(self.sizes))
        return sources
