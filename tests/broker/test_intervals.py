"""An interval holds as often as it says, whatever the prediction is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from broker.intervals import RECORD_MIN, SECONDS_MAX, Outcome, interval


@pytest.mark.parametrize("bias", [0.2, 1.0, 5.0])
def test_nine_of_ten_outcomes_fall_inside_however_wrong_the_prediction(bias: float) -> None:
    """The promise of the forecasts: between 85 and 95 of a hundred hold, once a family has a record."""
    drawn = np.random.default_rng(7)
    record: list[Outcome] = []
    inside = 0
    for number in range(1200):
        predicted_s = math.exp(drawn.uniform(3, 9))
        actual_s = predicted_s * bias * math.exp(drawn.normal(0, 0.6))
        found = interval(predicted_s, record[-200:], first_half_width_log=1.0)
        assert found.low_s <= found.middle_s <= found.high_s
        if number >= 200:
            inside += found.low_s <= actual_s <= found.high_s
        record.append(Outcome(predicted_s, actual_s))
    assert 0.87 <= inside / 1000 <= 0.93


def test_the_width_follows_the_record() -> None:
    sharp = [Outcome(100, 100 + number % 3) for number in range(50)]
    vague = [Outcome(100, 100 * 2 ** (number % 7 - 3)) for number in range(50)]
    narrow, wide = (interval(100, record, first_half_width_log=1.0) for record in (sharp, vague))
    assert narrow.high_s - narrow.low_s < 5
    assert wide.high_s - wide.low_s > 300


def test_without_a_record_the_width_is_the_first_guess() -> None:
    few = [Outcome(100, 1e6)] * (RECORD_MIN - 1)
    found = interval(90, few, first_half_width_log=math.log(2))
    assert (round(found.low_s), round(found.middle_s), round(found.high_s)) == (40, 90, 190)


def test_no_prediction_breaks_it() -> None:
    record = [Outcome(0.0, 0.0)] * 30 + [Outcome(1e-9, SECONDS_MAX)] * 5
    for predicted_s in (0.0, 1e-9, 1e12, math.inf):
        found = interval(predicted_s, record, first_half_width_log=1.0)
        assert 0 <= found.low_s <= found.middle_s <= found.high_s <= SECONDS_MAX
