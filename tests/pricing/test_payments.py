"""Payment rules: what the same placements cost under each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.errors import QuantityError
from pricing.payments import (
    PaymentRule,
    Trade,
    pay_as_bid,
    premium_micros_per_hour,
    shading_gain,
    threshold,
    threshold_cut,
    uniform,
)

TRADES = [Trade("a", value=100, gross=60, asks=40), Trade("b", value=50, gross=55, asks=30)]


def test_no_buyer_pays_above_its_value_under_any_rule() -> None:
    assert uniform(TRADES) == {"a": 60, "b": 50}
    assert pay_as_bid(TRADES) == {"a": 100, "b": 50}
    assert threshold(TRADES, {"a": 45, "b": 10}) == {"a": 55, "b": 40}


def test_discounts_are_cut_alike_when_the_surplus_cannot_pay_them() -> None:
    # 80 of surplus cannot pay 90: the larger discount is honoured more.
    assert threshold_cut([60, 30], 80) == 5
    assert threshold_cut([60, 30], 30) == 30
    assert threshold_cut([60, 30], 0) == 60


def test_a_trade_without_a_discount_is_refused() -> None:
    with pytest.raises(QuantityError, match="job b has no VCG discount"):
        threshold(TRADES, {"a": 1})


def test_what_uniform_prices_charge_beyond_the_threshold_rule_is_the_room_for_shading() -> None:
    assert shading_gain(uniform(TRADES), threshold(TRADES, {"a": 45, "b": 10})) == {"a": 5, "b": 10}


@given(discounts=st.lists(st.integers(0, 10_000), max_size=20), surplus=st.integers(0, 50_000))
def test_the_cut_is_the_least_that_the_surplus_can_pay(discounts: list[int], surplus: int) -> None:
    cut = threshold_cut(discounts, surplus)
    assert sum(max(0, discount - cut) for discount in discounts) <= surplus
    if cut:
        assert sum(max(0, discount - cut + 1) for discount in discounts) > surplus


def test_pay_as_bid_adds_what_the_price_leaves_of_the_value() -> None:
    assert premium_micros_per_hour(PaymentRule.PAY_AS_BID, gross=70, charge_max=100) == 30
    assert premium_micros_per_hour(PaymentRule.PAY_AS_BID, gross=130, charge_max=100) == 0
    assert premium_micros_per_hour(PaymentRule.UNIFORM, gross=70, charge_max=100) == 0
