"""What the market holds a link for: a weighted median of its measurements, whose weight halves with time; pure.

A median, because one probe beside a backup or a broken route is no news about the link. Confidence says how much the
estimate rests on: it grows with fresh measurements, and falls with their age and with how far they lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# A measurement alone, just made: 1 / (1 + 0.5) = two thirds sure.
WEIGHT_OF_DOUBT: Final = 0.5
# Below it the declared figures count: one measurement reaches it after 1.6 half-lives.
CONFIDENCE_COUNTED: Final = 0.4


@dataclass(frozen=True, slots=True)
class Measurement:
    """One direction of a link in one probe; None is what could not be told."""

    measured_ms: int
    bandwidth_bits_per_s: float
    delay_s: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What measurements say of one direction of a link. `confidence` is from 0 to 1."""

    bandwidth_bits_per_s: float
    delay_s: float | None
    loss: float | None
    confidence: float
    measured_ms: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Bandwidth, delay (one way) and loss of one direction of a link."""

    bandwidth_bits_per_s: float
    delay_s: float
    loss: float


def estimate(measurements: Sequence[Measurement], now_ms: int, half_life_s: float) -> Estimate | None:
    """Return what measurements of one direction say at `now_ms`, None where there are none."""
    if not measurements:
        return None
    ages_s = [max(0, now_ms - each.measured_ms) / 1000 for each in measurements]
    weights = [0.5 ** (age_s / half_life_s) for age_s in ages_s]
    bandwidth = _median([each.bandwidth_bits_per_s for each in measurements], weights)
    delays = [
        (each.delay_s, weight) for each, weight in zip(measurements, weights, strict=True) if each.delay_s is not None
    ]
    losses = [(each.loss, weight) for each, weight in zip(measurements, weights, strict=True) if each.loss is not None]
    total = sum(weights)
    apart = [abs(math.log(each.bandwidth_bits_per_s / bandwidth)) for each in measurements]
    spread = sum(weight * far for weight, far in zip(weights, apart, strict=True)) / total if total else 0.0
    return Estimate(
        bandwidth_bits_per_s=bandwidth,
        delay_s=_median(*zip(*delays, strict=True)) if delays else None,
        loss=_median(*zip(*losses, strict=True)) if losses else None,
        confidence=total / (total + WEIGHT_OF_DOUBT) / (1 + spread),
        measured_ms=max(each.measured_ms for each in measurements),
    )


def counted(declared: Figures, found: Estimate | None, *, withheld: bool = False) -> Figures:
    """Return what the market counts with: no more than is declared, nor than was measured with confidence.

    `withheld`: probes failed since the last that worked. Then what was measured stands however old it is, so that a
    site gains nothing by keeping the next probe from its link.
    """
    if found is None or (found.confidence < CONFIDENCE_COUNTED and not withheld):
        return declared
    return Figures(
        bandwidth_bits_per_s=min(declared.bandwidth_bits_per_s, found.bandwidth_bits_per_s),
        delay_s=declared.delay_s if found.delay_s is None else found.delay_s,
        loss=max(declared.loss, found.loss or 0.0),
    )


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the least value that at least half of the weight does not exceed."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    half, below = sum(weights) / 2, 0.0
    for place in order:
        below += weights[place]
        if below >= half:
            return values[place]
    return values[order[-1]]
