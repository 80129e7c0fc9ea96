"""What a round's contributions say about the training: how far sites moved apart, and how noisy their steps are.

For people and for the broker, not for the merge: sums are numpy's own, in whatever order. Every rank measures the
fragments that it owns; the sums over ranks are the site's, and since all sites decode the same bytes they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from training.exchange import Entry
from training.outer_fragment import Received
from training.ranks import Ranks
from training.spec import SITES_PER_JOB_MAX

# Rows: <D_i, D_j> for all pairs, as one square.
Products = npt.NDArray[np.float64]


def measured(received: Sequence[Received]) -> Products:
    """Return the inner products of the sites' parts of one fragment, sites by sites."""
    count = len(received)
    products = np.zeros((SITES_PER_JOB_MAX, SITES_PER_JOB_MAX))
    with np.errstate(over="ignore", invalid="ignore"):  # of a diverged run: people shall see inf, not a warning
        for a in range(count):
            for b in range(a, count):
                products[a, b] = products[b, a] = float(np.dot(received[a].values, received[b].values))
    return products


@dataclass(frozen=True, slots=True)
class RoundStatistics:
    """One round's contributions among themselves. Norms are of the whole model's (or the round's fragments')."""

    sites: tuple[str, ...]
    weights: tuple[int, ...]
    norms: tuple[float, ...]
    mean_norm: float
    cosine: float | None
    noise_scale_samples: float | None

    @classmethod
    def gathered(cls, ranks: Ranks, merged: Sequence[Entry], rows: Sequence[Products]) -> Self | None:
        """Return the statistics of a round, of each rank's products. A collective; None where nothing was merged."""
        own = np.sum(rows, axis=0) if rows else np.zeros((SITES_PER_JOB_MAX, SITES_PER_JOB_MAX))
        if not merged:
            return None
        total: npt.NDArray[Any] = np.sum(ranks.gather(own), axis=0)
        count = len(merged)
        products = total[:count, :count]
        weights = np.array([entry.weight for entry in merged], dtype=np.float64)
        shares = weights / weights.sum()
        squares = np.diag(products)
        mean_square = float(shares @ products @ shares)
        return cls(
            sites=tuple(entry.site_id for entry in merged),
            weights=tuple(entry.weight for entry in merged),
            norms=tuple(float(each) for each in np.sqrt(squares)),
            mean_norm=float(np.sqrt(max(mean_square, 0.0))),
            cosine=_mean_cosine(products),
            noise_scale_samples=noise_scale(weights, squares, mean_square),
        )


def _mean_cosine(products: Products) -> float | None:
    count = len(products)
    lengths = np.sqrt(np.diag(products))
    if count < 2 or not bool((lengths > 0).all()):  # noqa: PLR2004 - a pair
        return None
    with np.errstate(invalid="ignore"):
        cosines = products / np.outer(lengths, lengths)
    return float((cosines.sum() - count) / (count * (count - 1)))


def noise_scale(weights: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], mean_square: float) -> float | None:
    """Return the simple gradient noise scale in samples (arXiv 1812.06162, appendix A.1), None where it has no sign yet.

    Two batch sizes come from the round itself: each site's samples, and all of them. Of gradients this is tr(cov) / |G|^2;
    of what H steps moved it is the same quantity for the direction of H steps. One round is noisy: average over many.
    """
    if len(weights) < 2:  # noqa: PLR2004 - one batch size says nothing
        return None
    small, big = 1 / float(np.mean(1 / weights)), float(weights.sum())
    small_square = float(np.mean(squares))
    signal = (big * mean_square - small * small_square) / (big - small)
    noise = (small_square - mean_square) / (1 / small - 1 / big)
    return noise / signal if signal > 0 and noise >= 0 else None
