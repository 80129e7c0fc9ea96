"""A bid is a value per progress: linear, capped by the hold, and never rounded in the market's favour."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.asks import Ask
from pricing.errors import QuantityError
from pricing.value import bid_for_value, value_micros_per_hour

SPEEDS = st.floats(1e-6, 1e9, allow_nan=False)


def test_value_is_bid_times_samples_an_hour() -> None:
    # 2 credits for a million samples, 1000 samples a second: 3.6 million an hour.
    assert value_micros_per_hour(2_000_000, 1000.0) == 7_200_000


@given(st.integers(1, 10**15), SPEEDS)
def test_value_is_the_exact_product_rounded_down(bid: int, samples_per_s: float) -> None:
    exact = Fraction(bid) * Fraction(samples_per_s) * 3600 / 10**6
    assert 0 <= exact - value_micros_per_hour(bid, samples_per_s) < 1


@given(st.integers(1, 10**15), SPEEDS)
def test_the_bid_for_a_value_is_the_least_that_reaches_it(value: int, samples_per_s: float) -> None:
    bid = bid_for_value(value, samples_per_s)
    assert value_micros_per_hour(bid, samples_per_s) >= value
    assert bid == 1 or value_micros_per_hour(bid - 1, samples_per_s) < value


def test_a_speed_that_is_none_is_refused() -> None:
    for speed in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(QuantityError, match="no speed"):
            value_micros_per_hour(1, speed)


def test_a_payout_is_the_price_less_the_fee_and_never_below_the_ask() -> None:
    ask = Ask("ada/A100", 1_000_000)
    assert ask.payout_micros_per_gpu_hour(2_000_000, 500) == 1_900_000
    assert ask.payout_micros_per_gpu_hour(1_010_000, 500) == 1_000_000
    with pytest.raises(QuantityError, match="below its ask"):
        ask.payout_micros_per_gpu_hour(999_999, 0)
    with pytest.raises(QuantityError, match="negative"):
        Ask("ada/A100", -1)
