"""Sets of samples as merged half-open ranges: which samples are done, and what would overlap them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from training.exchange import SampleRange


@dataclass(frozen=True, slots=True)
class RangeSet:
    """Samples as sorted ranges that neither touch nor overlap."""

    ranges: tuple[SampleRange, ...] = ()

    @property
    def count(self) -> int:
        """Return how many samples are in the set."""
        return sum(part.stop - part.start for part in self.ranges)

    def overlaps(self, other: Iterable[SampleRange]) -> SampleRange | None:
        """Return the first range of `other` that shares a sample with the set, None where none does."""
        for wanted in other:
            # The last range that starts before `wanted` ends is the only one that can reach into it.
            index = bisect_right(self.ranges, wanted.stop - 1, key=lambda part: part.start)
            if index and self.ranges[index - 1].stop > wanted.start:
                return wanted
        return None

    def union(self, other: Iterable[SampleRange]) -> RangeSet:
        """Return the set with the samples of `other` added."""
        merged: list[SampleRange] = []
        for part in sorted((*self.ranges, *other)):
            if merged and part.start <= merged[-1].stop:
                merged[-1] = SampleRange(merged[-1].start, max(merged[-1].stop, part.stop))
            else:
                merged.append(part)
        return RangeSet(tuple(merged))
