from __future__ import annotations

import itertools

import numpy as np
import pytest

from training.shards import Shard

SHAPES = [(7,), (1,), (5, 4), (4, 6), (3, 4, 5), (0, 3)]
CUTS = [(0, 1), (0, 7), (2, 3), (3, 11), (0, 60), (19, 60)]


def parts(shape: tuple[int, ...], axes: tuple[int, ...], stride: int = 1) -> list[Shard]:
    """Cut each of `axes` in two uneven parts, or deal its coordinates out in turns; one shard for each combination."""
    along = []
    for axis, length in enumerate(shape):
        whole = np.arange(length)
        halves = [whole[: length // 3 + 1], whole[length // 3 + 1 :]]
        turns = [whole[start::2] for start in (0, 1)]
        along.append((turns if stride > 1 else halves) if axis in axes else [whole])
    return [Shard(shape, coordinates, speaks=True) for coordinates in itertools.product(*along)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_element_of_a_range_is_found_once_and_in_its_place(shape: tuple[int, ...], stride: int) -> None:
    tensor = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    for axes in [(), (0,), (len(shape) - 1,), tuple(range(len(shape)))]:
        shards = parts(shape, axes, stride)
        assert sum(each.elements for each in shards) == tensor.size
        for start, stop in ((start, min(stop, tensor.size)) for start, stop in CUTS if start < tensor.size):
            found = np.zeros(stop - start, dtype=np.int64)
            for shard in shards:
                local = tensor[np.ix_(*shard.coordinates)].reshape(-1)
                held, places = shard.overlap(start, stop)
                found[places] += local[held]
            assert np.array_equal(found, tensor.reshape(-1)[start:stop])


def test_whole_rows_are_told_as_ranges() -> None:
    shard = Shard((6, 4), (np.arange(2, 4), np.arange(4)), speaks=True)
    assert shard.overlap(0, 24) == (slice(0, 8), slice(8, 16))
    assert shard.overlap(10, 13) == (slice(2, 5), slice(0, 3))
    assert shard.overlap(0, 8) == (slice(0, 0), slice(0, 0))
