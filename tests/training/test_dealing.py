from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import dealing
from training.exchange import MemberSeat, SampleRange

ranges = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12).map(
    lambda pairs: tuple(SampleRange(start, start + length) for start, length in pairs)
)
members = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(
    lambda gpus: [MemberSeat(f"site-{index}", 1, count) for index, count in enumerate(gpus)]
)


def numbers(parts: tuple[SampleRange, ...]) -> list[int]:
    return [number for each in parts for number in range(each.start, each.stop)]


@given(parts=ranges)
def test_a_union_has_the_same_samples_sorted_and_once(parts: tuple[SampleRange, ...]) -> None:
    joined = dealing.union(parts)
    assert numbers(joined) == sorted(set(numbers(parts)))
    assert all(earlier.stop < later.start for earlier, later in pairwise(joined))
    assert dealing.disjoint(parts) == (len(numbers(parts)) == len(set(numbers(parts))))


@given(total=st.integers(1, 400), done=ranges, seats=members, period=st.integers(1, 5), batch=st.integers(1, 7))
def test_a_deal_is_the_lowest_open_samples_in_site_order(
    total: int, done: tuple[SampleRange, ...], seats: list[MemberSeat], period: int, batch: int
) -> None:
    dealt = dealing.deal(total, done, seats[::-1], period_steps=period, batch_per_gpu=batch)
    still_open = [number for number in range(total) if number not in set(numbers(done))]
    expected = still_open
    for seat in seats:
        size = period * batch * seat.gpus
        assert numbers(dealt[seat.site_id]) == expected[:size]
        expected = expected[size:]


@settings(max_examples=50)
@given(total=st.integers(1, 400), seats=members, seed=st.integers(0, 1000))
def test_whoever_is_lost_every_sample_is_done_exactly_once(total: int, seats: list[MemberSeat], seed: int) -> None:
    chance = np.random.default_rng(seed)
    done: tuple[SampleRange, ...] = ()
    counted: list[int] = []
    for _ in range(1000):
        if dealing.count(done) == total:
            break
        dealt = dealing.deal(total, done, seats, period_steps=3, batch_per_gpu=4)
        for site_id in sorted(dealt):
            if chance.random() < 0.7:
                counted += numbers(dealt[site_id])
                done = dealing.union([*done, *dealt[site_id]])
    assert sorted(counted) == list(range(total))


@given(size=st.integers(1, 60), batch=st.integers(1, 6), world=st.integers(1, 5))
def test_ranks_take_equally_many_steps_and_cover_the_block(size: int, batch: int, world: int) -> None:
    block = (SampleRange(3, 3 + size // 2 + 1), SampleRange(100, 100 + size))
    plans = [list(dealing.steps(block, batch_per_gpu=batch, rank=rank, world=world)) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(step and len(step) <= batch for plan in plans for step in plan)
    assert {number for plan in plans for step in plan for number in step} == set(numbers(block))
    for steps in list(zip(*plans, strict=True))[:-1]:
        assert sum(map(len, steps)) == batch * world, "only the last step is short"


def test_a_rank_left_over_in_the_last_step_repeats_a_sample() -> None:
    block = (SampleRange(0, 5),)
    assert list(dealing.steps(block, batch_per_gpu=2, rank=0, world=2)) == [[0, 1], [4]]
    assert list(dealing.steps(block, batch_per_gpu=2, rank=1, world=2)) == [[2, 3], [4]]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 1000, 4097])
def test_each_data_pass_is_a_permutation_of_its_own(length: int) -> None:
    orders = [dealing.items(range(length * k, length * (k + 1)), length=length, seed=9) for k in range(3)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length >= 64:
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != dealing.items(range(length), length=length, seed=10)


def test_an_item_does_not_depend_on_the_batch_that_asks_for_it() -> None:
    whole = dealing.items(range(90, 130), length=100, seed=1)
    assert [dealing.items([number], length=100, seed=1)[0] for number in range(90, 130)] == whole


def test_the_order_is_the_one_that_other_versions_deal() -> None:
    """A golden vector: sites of one job may run unlike releases, and must read the same items."""
    assert dealing.items(range(8), length=1000, seed=5) == GOLDEN_ITEMS


GOLDEN_ITEMS = [447, 789, 958, 996, 592, 535, 950, 44]


@given(
    total=st.integers(1, 300),
    gpus=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    order=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    helps=st.booleans(),
)
def test_sites_that_keep_apart_do_everything_once_in_whatever_order_they_come(
    *, total: int, gpus: list[int], order: list[int], helps: bool
) -> None:
    members = [MemberSeat(f"s{place}", 1, count) for place, count in enumerate(gpus)]
    done: tuple[SampleRange, ...] = ()
    for pick in [*order, *list(range(len(gpus))) * 80]:
        member = members[pick % len(members)]
        dealt = dealing.deal_apart(total, done, members, member.site_id, period_steps=2, batch_per_gpu=3, helps=helps)
        assert dealing.count(dealt) <= 6 * member.gpus
        assert not helps or dealt or dealing.count(done) == total
        assert dealing.disjoint([*done, *dealt])
        done = dealing.union([*done, *dealt])
    assert done == (SampleRange(0, total),)


@given(total=st.integers(1, 400), gpus=st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_sites_that_keep_apart_are_never_dealt_the_same_while_they_do_not_help(total: int, gpus: list[int]) -> None:
    members = [MemberSeat(f"s{place}", 1, count) for place, count in enumerate(gpus)]
    dealt = [
        dealing.deal_apart(total, (), members, each.site_id, period_steps=2, batch_per_gpu=3, helps=False)
        for each in members
    ]
    assert dealing.disjoint([each for ranges in dealt for each in ranges])


@given(pairs=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8), cut=st.integers(0, 8))
def test_what_is_left_without_the_done_samples_is_the_difference_of_sets(
    pairs: list[tuple[int, int]], cut: int
) -> None:
    ranges = [SampleRange(start, start + length) for start, length in pairs]
    wanted, done = ranges[:cut], dealing.union(ranges[cut:])
    numbers = {n for each in wanted for n in range(each.start, each.stop)}
    numbers -= {n for each in done for n in range(each.start, each.stop)}
    assert sorted(n for each in dealing.without(wanted, done) for n in range(each.start, each.stop)) == sorted(numbers)
