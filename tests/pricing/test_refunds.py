"""A refund is the share of the work that was lost, never more than was earned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.errors import QuantityError
from pricing.refunds import refund_micros, underdelivery_micros

AMOUNT = st.integers(0, 10**15)


def test_what_was_lost_goes_back_in_proportion_rounded_down() -> None:
    assert refund_micros(earned_micros=100, samples_delivered=3, samples_kept=1) == 66
    assert refund_micros(earned_micros=100, samples_delivered=3, samples_kept=3) == 0
    assert refund_micros(earned_micros=100, samples_delivered=3, samples_kept=9) == 0
    assert refund_micros(earned_micros=100, samples_delivered=0, samples_kept=0) == 100


@given(AMOUNT, AMOUNT, AMOUNT)
def test_a_refund_is_within_what_was_earned(earned: int, delivered: int, kept: int) -> None:
    assert 0 <= refund_micros(earned_micros=earned, samples_delivered=delivered, samples_kept=kept) <= earned


def test_nothing_is_below_nought() -> None:
    with pytest.raises(QuantityError, match="below nought"):
        refund_micros(earned_micros=1, samples_delivered=-1, samples_kept=0)


def test_a_delivery_within_its_promise_gives_nothing_back_and_below_it_the_missing_share() -> None:
    promised = {"earned_micros": 1_000, "samples_promised_low": 300}
    assert underdelivery_micros(samples_delivered=300, **promised) == 0
    assert underdelivery_micros(samples_delivered=900, **promised) == 0
    assert underdelivery_micros(samples_delivered=100, **promised) == 666
    assert underdelivery_micros(samples_delivered=0, **promised) == 1_000
    assert underdelivery_micros(earned_micros=1_000, samples_delivered=0, samples_promised_low=0) == 0
    with pytest.raises(QuantityError, match="below nought"):
        underdelivery_micros(earned_micros=-1, samples_delivered=0, samples_promised_low=0)
