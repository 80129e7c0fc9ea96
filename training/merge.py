"""The weighted merge of the sites' contributions, with the same bits on every machine.

Only elementwise numpy operations with one IEEE 754 rounding each are used (+ - * /): no fused
multiply-add, no matrix product, no library reduction, whose order of addition depends on the CPU.
Contributions are added in site order. Where a sum over elements is needed, it runs over fixed
blocks that are halved explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from training.codecs import Values

BLOCK: Final = 4096


def weighted_mean(contributions: Iterable[tuple[int, Values]]) -> Values:
    """Return the sum of w * D over the sum of w, for (w, D) in site order; each w is at least 1.

    Accumulated in float64, rounded to float32 once at the end: a weight below 2**29 times a
    float32 value is exact.
    """
    total: npt.NDArray[np.float64] | None = None
    weights = 0
    for weight, values in contributions:
        assert weight > 0, "an entry without weight is left out before the merge"
        weighted = values.astype(np.float64)
        weighted *= np.float64(weight)
        weights += weight
        if total is None:
            total = weighted
        else:
            total += weighted
    assert total is not None, "a merge needs at least one contribution"
    total /= np.float64(weights)
    return total.astype(np.float32)


def sum_of_squares(values: Values) -> float:
    """Return the sum of the squares of `values`, added in the one order that this module fixes."""
    return fixed_sum(values.astype(np.float64) ** 2)


def fixed_sum(values: npt.NDArray[np.float64]) -> float:
    """Return the sum of flat float64 `values`: blocks of 4,096, each and then all halved explicitly."""
    blocks = max(1, -(-values.size // BLOCK))
    grid = np.zeros((blocks, BLOCK), dtype=np.float64)
    grid.reshape(-1)[: values.size] = values
    while grid.shape[1] > 1:
        half = grid.shape[1] // 2
        grid = grid[:, :half] + grid[:, half:]
    sums = grid[:, 0]
    while sums.size > 1:
        if sums.size % 2:
            sums = np.append(sums, 0.0)
        half = sums.size // 2
        sums = sums[:half] + sums[half:]
    return float(sums[0])
