"""Ask curves: what the first and the last GPU of a pool cost, and what is paid for them."""

from __future__ import annotations

import pytest

from pricing.asks import Ask
from pricing.errors import QuantityError

CURVE = Ask("ada/A100", 100, flat_gpus=4, steps=((2, 150), (2, 300)))


def test_the_dearest_gpu_sold_sets_what_the_site_gets_at_least() -> None:
    assert [CURVE.marginal_micros_per_gpu_hour(gpus) for gpus in (0, 4, 5, 7, 8)] == [100, 100, 150, 300, 300]
    assert CURVE.payout_micros_per_gpu_hour(300, 1_000, gpus_sold=7) == 300
    assert CURVE.payout_micros_per_gpu_hour(300, 1_000, gpus_sold=5) == 270
    with pytest.raises(QuantityError, match="below its ask of 300"):
        CURVE.payout_micros_per_gpu_hour(299, 0, gpus_sold=7)


def test_a_curve_that_falls_or_has_no_end_of_its_flat_part_is_refused() -> None:
    with pytest.raises(QuantityError, match="must rise"):
        Ask("ada/A100", 100, flat_gpus=4, steps=((2, 90),))
    with pytest.raises(QuantityError, match="must rise"):
        Ask("ada/A100", 100, steps=((2, 150),))
