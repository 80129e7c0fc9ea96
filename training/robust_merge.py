"""Merges that one site among several cannot lead astray, whatever it sends. See training/README.md, Robust merging.

Each rule looks at one fragment's decoded contributions alone, in site order, and uses the operations of
`training.merge`, so every site finds the same bits however its fragments are spread over ranks. The distances that the
rules promise hold while fewer than half of the contributions (trimmed mean: at most `trimmed(count)`) are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from training.codecs import Values
from training.merge import fixed_sum, weighted_mean
from training.spec import ROBUST_SITES_MIN, MergeRule

Contributions = Sequence[tuple[int, Values]]
_Wide = npt.NDArray[np.float64]


def merged(rule: MergeRule, contributions: Contributions) -> Values:
    """Return what `rule` makes of (weight, D) in site order; there is at least one, and each weight is at least 1.

    Of two, nobody can say which is wrong: there every rule but the mean caps the longer at the shorter's length.
    """
    if rule == "mean" or len(contributions) == 1:
        return weighted_mean(contributions)
    trusted = _trusted(contributions)
    if rule == "norm_cap" or len(contributions) < ROBUST_SITES_MIN:
        return _norm_cap(trusted)
    return _trimmed_mean(trusted) if rule == "trimmed_mean" else _centred_clipping(trusted)


def trimmed(count: int) -> int:
    """Return how many values the trimmed mean drops at either end: one of 3 to 7 sites, two of 8."""
    return max(1, count // 4)


def _trusted(contributions: Contributions) -> Contributions:
    """Limit each weight to the middle one: a weight is what a site says of itself, too."""
    middle = _lower_median([weight for weight, _ in contributions])
    return [(min(weight, int(middle)), values) for weight, values in contributions]


def _norm_cap(contributions: Contributions) -> Values:
    """Shorten whatever is longer than the middle length to it, and take the mean.

    With honest lengths from M to R and the wrong sites' share b: within 2 b R + R - M of the honest mean.
    """
    wide = [values.astype(np.float64) for _, values in contributions]
    radius = _lower_median([_length(each) for each in wide])
    return _mean([weight for weight, _ in contributions], [_clipped(each, radius) for each in wide])


def _trimmed_mean(contributions: Contributions) -> Values:
    """Drop the lowest and highest values of each element, and take the mean of the rest: inside the honest range."""
    dropped = trimmed(len(contributions))
    # Adding nought makes -0 into 0, so that equal values have equal bits; a stable order keeps ties in site order.
    stacked = np.stack([values for _, values in contributions]) + np.float32(0)
    order = np.argsort(stacked, axis=0, kind="stable")[dropped : len(contributions) - dropped]
    weights = np.array([weight for weight, _ in contributions], dtype=np.float64)
    total, weight_total = np.zeros(stacked.shape[1]), np.zeros(stacked.shape[1])
    for row in order:
        weight = weights[row]
        total += np.take_along_axis(stacked, row[None], axis=0)[0].astype(np.float64) * weight
        weight_total += weight
    total /= weight_total
    return total.astype(np.float32)


def _centred_clipping(contributions: Contributions) -> Values:
    """Go from the middle of each element along the mean of what contributions differ from it, each at most as far as the middle one.

    After arXiv 2012.10333 with one iteration, centred on the round's own median, since sites that join have no
    earlier one. Within twice the honest spread of the honest mean.
    """
    stacked = np.sort(np.stack([values for _, values in contributions]) + np.float32(0), axis=0).astype(np.float64)
    low, high = (len(contributions) - 1) // 2, len(contributions) // 2
    centre = (stacked[low] + stacked[high]) * np.float64(0.5)
    apart = [values.astype(np.float64) - centre for _, values in contributions]
    radius = _lower_median([_length(each) for each in apart])
    step = _mean([weight for weight, _ in contributions], [_clipped(each, radius) for each in apart])
    moved: Values = (centre + step).astype(np.float32)
    return moved


def _mean(weights: Sequence[int], rows: Sequence[_Wide]) -> Values:
    total = np.zeros(rows[0].size, dtype=np.float64)
    for weight, values in zip(weights, rows, strict=True):
        total += values * np.float64(weight)
    total /= np.float64(sum(weights))
    return total.astype(np.float32)


def _clipped(values: _Wide, radius: float) -> _Wide:
    length = _length(values)
    if length <= radius:
        return values
    clipped: _Wide = values * np.float64(radius / length)
    return clipped


def _length(values: _Wide) -> float:
    return float(np.sqrt(fixed_sum(values * values)))


def _lower_median(numbers: Sequence[float]) -> float:
    """Return the middle number, of an even count the lower: at most the honest ones' largest while they are half."""
    return sorted(numbers)[(len(numbers) - 1) // 2]
