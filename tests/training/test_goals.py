"""A goal's choice among predicted configurations, and what it says when none reaches the goal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.goals import CHANCE_MIN, Goal, Option, Wanted, choose

SAMPLES = 3_600_000.0
SLOW = Option("slow", 500.0, 0.1, 1_000_000)  # 2 hours, 2 credits
MIDDLE = Option("middle", 1_000.0, 0.1, 2_500_000)  # 1 hour, 2.5 credits
FAST = Option("fast", 2_000.0, 0.1, 8_000_000)  # half an hour, 4 credits
ALL = [FAST, SLOW, MIDDLE]


def chosen(wanted: Wanted, options: list[Option] = ALL) -> tuple[str, bool, str]:
    found = choose(options, wanted)
    assert found is not None
    return options[found.place].name, found.reached, found.why


@pytest.mark.parametrize(("hours", "name"), [(3.0, "slow"), (1.5, "middle"), (0.6, "fast")])
def test_a_deadline_is_met_as_cheaply_as_can_be(hours: float, name: str) -> None:
    found = chosen(Wanted(Goal.DEADLINE, SAMPLES, seconds=hours * 3600))
    assert found[:2] == (name, True)
    assert "cheapest" in found[2]


def test_an_open_prediction_needs_more_room_before_a_deadline() -> None:
    wanted = Wanted(Goal.DEADLINE, SAMPLES, seconds=1.05 * 3600)
    assert chosen(wanted)[0] == "middle"
    vague = Option("middle", 1_000.0, 0.8, 2_500_000)
    name, _, why = chosen(wanted, [FAST, SLOW, vague])
    assert name == "fast"
    assert "middle would cost" in why


def test_a_deadline_that_nothing_meets_gets_the_best_chance_and_is_called_missed() -> None:
    found = chosen(Wanted(Goal.DEADLINE, SAMPLES, seconds=0.4 * 3600))
    assert found[:2] == ("fast", False)
    assert "none is in time" in found[2]


@pytest.mark.parametrize(("credits_", "name", "reached"), [(5, "fast", True), (3, "middle", True), (1, "slow", False)])
def test_a_budget_buys_the_fastest_that_fits(credits_: int, name: str, reached: bool) -> None:  # noqa: FBT001  a column
    assert chosen(Wanted(Goal.BUDGET, SAMPLES, budget_micros=credits_ * 1_000_000))[:2] == (name, reached)


def test_value_weighs_speed_against_price_by_the_bid() -> None:
    assert chosen(Wanted(Goal.VALUE, SAMPLES, bid_micros_per_million=800_000))[0] == "slow"
    assert chosen(Wanted(Goal.VALUE, SAMPLES, bid_micros_per_million=5_000_000))[0] == "fast"
    assert chosen(Wanted(Goal.VALUE, SAMPLES, bid_micros_per_million=100))[:2] == ("slow", False)


def test_a_goal_without_its_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="its figure"):
        Wanted(Goal.BUDGET, SAMPLES)
    assert choose([], Wanted(Goal.BUDGET, SAMPLES, budget_micros=1)) is None


OPTIONS = st.lists(
    st.builds(
        Option,
        st.uuids().map(str),
        st.floats(1, 1e6),
        st.floats(0.01, 1.0),
        st.integers(1, 10**9),
    ),
    min_size=1,
    max_size=8,
)


@given(OPTIONS, st.floats(1, 1e7))
def test_no_cheaper_option_is_in_time_than_the_one_chosen(options: list[Option], seconds: float) -> None:
    wanted = Wanted(Goal.DEADLINE, 1e6, seconds=seconds)
    found = choose(options, wanted)
    assert found is not None
    timely = [option for option in options if wanted.chance(option) >= CHANCE_MIN]
    assert found.reached == bool(timely)
    if timely:
        least = min(option.total_micros(1e6) for option in timely)
        assert math.isclose(options[found.place].total_micros(1e6), least)
