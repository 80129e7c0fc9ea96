"""What a job's progress is worth to its tenant, from the bid alone.

A bid is a value per million samples, so a configuration that does s samples a second is worth

    value = bid x s x 3600 / 1,000,000        micro-credits per hour,

linear in progress, and never more than the hold can pay over the term. Rates round down, so a
buyer who pays at most the value pays at most the bid; the bid needed for a value rounds up.
"""

from __future__ import annotations

from typing import Final

from pricing.errors import QuantityError
from pricing.money import SECONDS_PER_HOUR, Micros, divide_up

SAMPLES_PER_BID: Final = 1_000_000


def value_micros_per_hour(bid_micros_per_million_samples: int, samples_per_s: float) -> Micros:
    """Return what an hour at `samples_per_s` is worth at a bid, rounded down.

    The float is taken at its exact binary value, so that no platform rounds otherwise.
    """
    numerator, denominator = _exact(samples_per_s)
    return Micros(bid_micros_per_million_samples * numerator * SECONDS_PER_HOUR // (denominator * SAMPLES_PER_BID))


def bid_for_value(value_micros_per_hour: int, samples_per_s: float) -> int:
    """Return the least bid per million samples whose hourly value reaches `value_micros_per_hour`."""
    numerator, denominator = _exact(samples_per_s)
    return max(1, divide_up(value_micros_per_hour * denominator * SAMPLES_PER_BID, numerator * SECONDS_PER_HOUR))


def _exact(samples_per_s: float) -> tuple[int, int]:
    if not 0 < samples_per_s < float("inf"):
        message = f"{samples_per_s} samples/s is no speed; a prediction is positive and finite"
        raise QuantityError(message)
    return samples_per_s.as_integer_ratio()
