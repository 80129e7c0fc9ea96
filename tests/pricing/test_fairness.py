from __future__ import annotations

from itertools import permutations
from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.fairness import core_slack, division_distance, sampled_shapley, shapley_values

GAMES = st.integers(1, 5).flatmap(
    lambda players: st.lists(st.floats(-10, 10), min_size=2**players - 1, max_size=2**players - 1).map(
        lambda values: [0.0, *values]
    )
)


def test_the_glove_game_pays_the_scarce_glove_two_thirds() -> None:
    # Player 0 has a left glove, 1 and 2 a right one each; a pair is worth 1 (Shapley 1953, a textbook case).
    values = [1.0 if mask & 1 and mask & 6 else 0.0 for mask in range(8)]
    assert shapley_values(values) == pytest.approx((2 / 3, 1 / 6, 1 / 6))


@given(GAMES)
def test_shapley_is_the_mean_over_all_orders_and_divides_the_whole(values: list[float]) -> None:
    players = len(values).bit_length() - 1
    exact = shapley_values(values)
    means, _ = sampled_shapley(values.__getitem__, players, list(permutations(range(players))))
    assert exact == pytest.approx(means, abs=1e-9)
    assert sum(exact) == pytest.approx(values[-1], abs=1e-9)


def test_a_sampled_shapley_value_comes_with_its_standard_error() -> None:
    values = [1.0 if mask & 1 and mask & 6 else 0.0 for mask in range(8)]
    orders = list(permutations(range(3)))
    means, errors = sampled_shapley(values.__getitem__, 3, orders)
    # Player 0 adds 1 in four of six orders: variance 4/15 of the sample of six.
    assert len(orders) == factorial(3)
    assert means[0] == pytest.approx(2 / 3)
    assert errors[0] == pytest.approx((4 / 15 / 6) ** 0.5)


def test_a_game_without_all_its_coalitions_is_refused() -> None:
    with pytest.raises(ValueError, match="2\\^n"):
        shapley_values([0.0, 1.0, 2.0])


def test_core_slack_is_what_the_worst_off_coalition_gets_above_its_value() -> None:
    values = {0b01: 1.0, 0b10: 2.0, 0b11: 5.0}
    assert core_slack(values, [2.0, 3.0]) == pytest.approx(0.0)
    assert core_slack(values, [0.5, 4.5]) == pytest.approx(-0.5)
    assert core_slack({0: 9.0}, [1.0]) == pytest.approx(0.0)


def test_divisions_are_as_far_apart_as_the_share_that_changes_hands() -> None:
    assert division_distance([1.0, 3.0], [2.0, 2.0]) == pytest.approx(0.25)
    assert division_distance([0.0, 0.0], [0.0, 0.0]) == 0
