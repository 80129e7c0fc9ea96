from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.fragments import TARGET_MAX, TARGET_MIN, Fragment, Piece, assert_complete, layout_digest, partition

sizes_of_models = st.lists(st.integers(1, 300), min_size=1, max_size=30).map(
    lambda sizes: [(f"layer.{index}", size) for index, size in enumerate(sizes)]
)


@given(sizes=sizes_of_models, target=st.integers(1, 200))
def test_every_element_is_in_exactly_one_fragment(sizes: list[tuple[str, int]], target: int) -> None:
    fragments = partition(sizes, target)
    elements = [
        (piece.name, index)
        for fragment in fragments
        for piece in fragment.pieces
        for index in range(piece.start, piece.stop)
    ]
    assert len(elements) == len(set(elements)) == sum(size for _, size in sizes)
    assert all(fragment.elements <= target for fragment in fragments)
    assert [fragment.number for fragment in fragments] == list(range(len(fragments)))


def test_a_parameter_that_fits_is_never_cut() -> None:
    fragments = partition([("a", 60), ("b", 60), ("c", 250)], 100)
    assert [[(piece.name, piece.start, piece.stop) for piece in each.pieces] for each in fragments] == [
        [("a", 0, 60)],
        [("b", 0, 60)],
        [("c", 0, 100)],
        [("c", 100, 200)],
        [("c", 200, 250)],
    ]


def test_each_fragment_has_one_owner_among_any_number_of_ranks() -> None:
    fragments = partition([("a", 1000)], 100)
    for world in (1, 2, 3, 8):
        assert [each.owner(world) for each in fragments] == [number % world for number in range(10)]


def test_the_target_follows_the_model_but_stays_within_its_limits() -> None:
    assert partition([("small", 1000)])[0].elements == 1000
    assert len(partition([("small", 136_960)])) == 3
    assert partition([("middle", 8 * 100_000)])[0].elements == 100_000
    assert partition([("large", 100 * TARGET_MAX)])[0].elements == TARGET_MAX
    huge = partition([("huge", 10_000_000_000)])
    assert len(huge) <= 512
    assert TARGET_MIN < TARGET_MAX < huge[0].elements


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece("a", 0, 5)],
        [Piece("a", 0, 6), Piece("a", 5, 10)],
        [Piece("a", 0, 4), Piece("a", 5, 10)],
        [Piece("a", 0, 10), Piece("a", 0, 10)],
        [Piece("a", 0, 10), Piece("a", 10, 10)],
    ],
)
def test_a_partition_with_gap_or_overlap_does_not_pass(pieces: list[Piece]) -> None:
    with pytest.raises(AssertionError):
        assert_complete([Fragment(0, tuple(pieces))], [("a", 10)])


def test_another_layout_has_another_digest() -> None:
    sizes = [("a", 10), ("b", 20)]
    assert layout_digest(partition(sizes, 30)) == layout_digest(partition(sizes, 30))
    assert layout_digest(partition(sizes, 30)) != layout_digest(partition(sizes, 20))
    assert layout_digest(partition(sizes, 30)) != layout_digest(partition([("a", 10), ("c", 20)], 30))
