"""Who trains on which samples: pure functions of the chain, the same at every site.

Samples are numbered 0 to total - 1. Those already in the chain are *done*; each round the lowest
others are dealt in one block per member, in site order. Nothing is remembered between rounds, so
what a dead or late site had been dealt is simply dealt again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from training.exchange import MemberSeat, SampleRange

Ranges = tuple[SampleRange, ...]

_FEISTEL_ROUNDS: Final = 4
_ITEMS_MAX: Final = 1 << 48


def union(ranges: Iterable[SampleRange]) -> Ranges:
    """Return the same samples as sorted ranges that neither touch nor overlap."""
    joined: list[SampleRange] = []
    for each in sorted(ranges):
        if joined and each.start <= joined[-1].stop:
            joined[-1] = SampleRange(joined[-1].start, max(joined[-1].stop, each.stop))
        else:
            joined.append(each)
    return tuple(joined)


def count(ranges: Iterable[SampleRange]) -> int:
    """Return the number of samples in ranges that do not overlap."""
    return sum(each.stop - each.start for each in ranges)


def disjoint(ranges: Sequence[SampleRange]) -> bool:
    """Return whether no sample is in two of `ranges`."""
    return count(ranges) == count(union(ranges))


def open_ranges(total: int, done: Ranges) -> Ranges:
    """Return the samples below `total` that are not in `done`, ascending."""
    gaps: list[SampleRange] = []
    reached = 0
    for each in union(done):
        if reached < min(each.start, total):
            gaps.append(SampleRange(reached, min(each.start, total)))
        reached = each.stop
    if reached < total:
        gaps.append(SampleRange(reached, total))
    return tuple(gaps)


def deal(
    total: int, done: Ranges, members: Sequence[MemberSeat], *, period_steps: int, batch_per_gpu: int
) -> dict[str, Ranges]:
    """Return each member's samples for the next round.

    A member's block is period_steps * batch_per_gpu * gpus of the lowest samples that are not
    done; at the end of the job the last blocks are shorter, or empty.
    """
    left = list(open_ranges(total, done))
    dealt: dict[str, Ranges] = {}
    for member in sorted(members, key=lambda seat: seat.site_id):
        block, left = _split(left, period_steps * batch_per_gpu * member.gpus)
        dealt[member.site_id] = tuple(block)
    return dealt


def deal_apart(
    total: int,
    done: Ranges,
    members: Sequence[MemberSeat],
    site_id: str,
    *,
    period_steps: int,
    batch_per_gpu: int,
    helps: bool,
) -> Ranges:
    """Return one member's next samples where sites do not proceed in step.

    Samples are cut into cells of period_steps * batch_per_gpu, and cell c belongs to GPU c mod all GPUs, so a
    site that is ahead leaves the others' cells alone, whatever they have done of them. Whoever has finished its own and
    `helps` takes the last samples that are left of the others', from the far end.
    """
    seats = sorted(members, key=lambda seat: seat.site_id)
    all_gpus = sum(seat.gpus for seat in seats)
    first = sum(seat.gpus for seat in seats if seat.site_id < site_id)
    gpus = next((seat.gpus for seat in seats if seat.site_id == site_id), 0)
    if not gpus:
        return ()
    cell = period_steps * batch_per_gpu
    left = open_ranges(total, done)
    taken: list[SampleRange] = []
    for each in left:
        number = each.start // cell
        while number * cell < each.stop:
            # Jump over the cells of other sites; there may be a great many.
            ahead = (first - number) % all_gpus
            if ahead and (number - first) % all_gpus >= gpus:
                number += ahead
                continue
            start, stop = max(each.start, number * cell), min(each.stop, (number + 1) * cell)
            if start < stop:
                taken.append(SampleRange(start, stop))
                if count(taken) >= gpus * cell:
                    return union(_split(taken, gpus * cell)[0])
            number += 1
    if taken or not helps:
        return union(taken)
    everything = count(left)
    return tuple(_split(list(left), max(0, everything - gpus * cell))[1])


def without(ranges: Iterable[SampleRange], done: Ranges) -> Ranges:
    """Return the samples of `ranges` that are not in `done`."""
    found: list[SampleRange] = []
    for each in union(ranges):
        inside = [SampleRange(max(d.start, each.start), min(d.stop, each.stop)) for d in done if _meet(d, each)]
        gaps = open_ranges(each.stop, tuple(inside))
        found += [SampleRange(max(gap.start, each.start), gap.stop) for gap in gaps if gap.stop > each.start]
    return tuple(found)


def _meet(one: SampleRange, other: SampleRange) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _split(ranges: list[SampleRange], samples: int) -> tuple[list[SampleRange], list[SampleRange]]:
    """Return the first `samples` samples of `ranges`, and the rest."""
    first: list[SampleRange] = []
    for position, each in enumerate(ranges):
        if not samples:
            return first, ranges[position:]
        cut = min(each.stop, each.start + samples)
        first.append(SampleRange(each.start, cut))
        samples -= cut - each.start
        if cut < each.stop:
            return first, [SampleRange(cut, each.stop), *ranges[position + 1 :]]
    return first, []


def steps(block: Ranges, *, batch_per_gpu: int, rank: int, world: int) -> Iterator[list[int]]:
    """Yield the sample numbers of `rank` for each inner step of its site's block.

    A step takes batch_per_gpu samples for each rank. The last one may have fewer: they are spread
    evenly, and a rank that would have none repeats the step's last sample, because all ranks must
    take the same number of steps. The union over ranks is the block.
    """
    left = list(block)
    while left:
        taken, left = _split(left, batch_per_gpu * world)
        group = [number for each in taken for number in range(each.start, each.stop)]
        share = group[len(group) * rank // world : len(group) * (rank + 1) // world]
        yield share or [group[-1]]


def items(numbers: Sequence[int], *, length: int, seed: int) -> list[int]:
    """Return the dataset index of each sample number: every data pass is a permutation of its own.

    Sample s belongs to data pass s // length. A keyed four-round Feistel network over the least
    even number of bits that holds `length`, walked until it lands inside, permutes the pass.
    """
    assert 0 < length <= _ITEMS_MAX, f"a dataset of {length} items"
    passes, positions = np.divmod(np.array(numbers, dtype=np.uint64), np.uint64(length))
    indices = np.empty_like(positions)
    for data_pass in np.unique(passes):
        chosen = passes == data_pass
        indices[chosen] = _permute(positions[chosen], length, seed, int(data_pass))
    return [int(index) for index in indices]


def _permute(positions: npt.NDArray[np.uint64], length: int, seed: int, data_pass: int) -> npt.NDArray[np.uint64]:
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = hashlib.sha256(f"hansa samples {seed} {data_pass}".encode()).digest()
    keys = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    values = positions.copy()
    walking = np.ones(values.shape, dtype=bool)
    while walking.any():
        left, right = values[walking] >> half, values[walking] & mask
        for each in keys[:_FEISTEL_ROUNDS]:
            left, right = right, left ^ (_mixed(right ^ each) & mask)
        values[walking] = (left << half) | right
        walking = values >= np.uint64(length)
    return values


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's finaliser of each value (Steele, Lea and Flood 2014); products wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
