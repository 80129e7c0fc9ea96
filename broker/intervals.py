"""From a plain prediction of a time to an interval that nine of ten outcomes fall into, by how former ones came out.

Pure. The interval is laid so that it would have held nine tenths of the former predictions of its family (split
conformal prediction, Vovk et al. 2005): whatever a prediction is worth, its interval is as wide as its own record
demands. Until a family has a record, the width is the family's first guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

COVERED: Final = 0.9
# With fewer, the fifth percentile of a record is no figure yet.
RECORD_MIN: Final = 20
# Added to both sides of a ratio: below it a factor of two is a matter of heartbeats, and says nothing.
GRAIN_S: Final = 10.0
SECONDS_MAX: Final = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class Interval:
    """Seconds from now: the least, the best guess, the most."""

    low_s: float
    middle_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was predicted, and what came."""

    predicted_s: float
    actual_s: float


def interval(predicted_s: float, record: Sequence[Outcome], *, first_half_width_log: float) -> Interval:
    """Lay an interval around `predicted_s` by the `record` of its family."""
    if len(record) < RECORD_MIN:
        ratios = (-first_half_width_log, 0.0, first_half_width_log)
    else:
        found = sorted(math.log((row.actual_s + GRAIN_S) / (row.predicted_s + GRAIN_S)) for row in record)
        # The quantiles of a record of n, as if the next one were among n + 1: this keeps the promised share.
        tail = (1 - COVERED) / 2 * (len(found) + 1)
        low = max(0, math.floor(tail) - 1)
        ratios = (found[low], found[len(found) // 2], found[len(found) - 1 - low])
    return Interval(
        *(_bounded((min(predicted_s, SECONDS_MAX) + GRAIN_S) * math.exp(ratio) - GRAIN_S) for ratio in ratios)
    )


def _bounded(seconds: float) -> float:
    return min(max(0.0, seconds), SECONDS_MAX)
