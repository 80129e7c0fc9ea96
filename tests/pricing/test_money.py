"""Money is exact: what people write, what the market keeps, and what a delivery costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.errors import AmountError, QuantityError
from pricing.money import CREDITS_MAX, cost_micros, divide_up, egress_micros, format_credits, parse_credits, rate_micros


def test_an_amount_reads_exactly() -> None:
    assert parse_credits("12.5") == 12_500_000
    assert parse_credits("0.000001") == 1
    assert parse_credits(" 7 ") == 7_000_000
    assert parse_credits("-0.1") == -100_000
    # 0.1 + 0.2 is not 0.3 in floats.
    assert parse_credits("0.1") + parse_credits("0.2") == parse_credits("0.3")


@pytest.mark.parametrize(
    "text", ["", "1,000", "1e3", "0.0000001", "€5", "1.", ".5", "--1", "nan", "٣", "1_0", "9" * 11]
)
def test_what_is_no_amount_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(AmountError, match=r"12\.5"):
        parse_credits(text)


def test_an_amount_above_what_the_market_keeps_is_refused() -> None:
    assert parse_credits(str(CREDITS_MAX)) == CREDITS_MAX * 1_000_000
    with pytest.raises(AmountError, match="largest"):
        parse_credits(f"{CREDITS_MAX}.000001")


def test_an_amount_is_written_with_two_decimals_or_as_many_as_it_needs() -> None:
    assert [format_credits(n) for n in (12_500_000, 0, 1, -1, 1_234_567)] == [
        "12.50", "0.00", "0.000001", "-0.000001", "1.234567",
    ]  # fmt: skip


@given(st.integers(-(10**15), 10**15))
def test_an_amount_survives_being_written_and_read(micros: int) -> None:
    assert parse_credits(format_credits(micros)) == micros


def test_a_cost_is_rounded_down_once() -> None:
    assert cost_micros(3_600_000, 1) == 1
    assert cost_micros(3_599_999, 1) == 0
    assert cost_micros(2_000_000, 4 * 3_600_000) == 8_000_000
    assert egress_micros(20_000, 999_999_999) == 19_999
    assert rate_micros(3_600_000, 999) == 999


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))
def test_metering_in_pieces_never_costs_more_than_at_once(price: int, first_ms: int, second_ms: int) -> None:
    pieces = cost_micros(price, first_ms) + cost_micros(price, second_ms)
    assert 0 <= cost_micros(price, first_ms + second_ms) - pieces <= 1


def test_negative_prices_and_quantities_are_refused() -> None:
    for call in (
        lambda: cost_micros(-1, 1),
        lambda: cost_micros(1, -1),
        lambda: egress_micros(1, -1),
        lambda: rate_micros(-1, 1),
    ):
        with pytest.raises(QuantityError, match="never negative"):
            call()


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_dividing_up_covers_all_and_no_more(dividend: int, divisor: int) -> None:
    up = divide_up(dividend, divisor)
    assert up * divisor >= dividend
    assert (up - 1) * divisor < dividend
