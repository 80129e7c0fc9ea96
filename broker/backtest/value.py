"""What the federation was worth in a replay: welfare against standing alone, with an interval, and site by site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.engine import Run
from broker.backtest.workload import Workload

Real = NDArray[np.float64]
Int = NDArray[np.int64]

WEEK_S: Final = 7 * 86_400.0
RESAMPLES: Final = 2_000
CONFIDENCE: Final = 0.95
# With fewer blocks there is nothing to resample, and an interval would look surer than it is.
INTERVAL_BLOCKS_MIN: Final = 3
# A site that ends below this share of its stand-alone value counts as worse off; beyond it is rounding.
EVEN: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its bootstrap interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SiteGain:
    """What a site and its tenants have in the federation and alone, in credits over the run."""

    site: str
    surplus: float
    rent: float
    alone: float

    @property
    def federated(self) -> float:
        """Own tenants' surplus and the rent of its capacity."""
        return self.surplus + self.rent

    @property
    def worse_off(self) -> bool:
        """Whether the site would rather stand alone."""
        return self.federated < self.alone - EVEN * max(1.0, abs(self.alone))


def weekly_welfare(run: Run, workload: Workload) -> Real:
    """Return the welfare of the jobs that arrive in each week, in credits; the last week may be short."""
    week = ((workload.arrival_s - workload.arrival_s[0]) // WEEK_S).astype(np.int64)
    return np.bincount(week, weights=run.welfare).astype(np.float64)


def ratio_interval(federated: Sequence[Real], alone: Sequence[Real], *, block_weeks: int, seed: int) -> Interval:
    """Return total welfare over total welfare alone, with a moving-block bootstrap over weeks and bid seeds.

    `federated` and `alone` hold one series of weeks for each draw of bids, paired. A resample takes
    draws with replacement and, in each, blocks of `block_weeks` consecutive weeks, wrapping around. Too few weeks give no interval (nan).
    """
    ours: Real = np.array(federated)
    theirs: Real = np.array(alone)
    draws, weeks = ours.shape
    if draws * weeks < INTERVAL_BLOCKS_MIN * block_weeks:
        return Interval(_ratio(ours.sum(), theirs.sum()), float("nan"), float("nan"))
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    blocks = -(-weeks // block_weeks)
    ratios = np.empty(RESAMPLES)
    for sample in range(RESAMPLES):
        draw = generator.integers(0, draws, size=(draws,))
        starts = generator.integers(0, weeks, (draws, blocks))
        week = (starts[:, :, None] + np.arange(block_weeks)).reshape(draws, -1)[:, :weeks] % weeks
        ratios[sample] = _ratio(ours[draw[:, None], week].sum(), theirs[draw[:, None], week].sum())
    tail = (1 - CONFIDENCE) / 2
    return Interval(
        _ratio(ours.sum(), theirs.sum()), float(np.quantile(ratios, tail)), float(np.quantile(ratios, 1 - tail))
    )


def _ratio(ours: float, theirs: float) -> float:
    return float(ours / theirs) if theirs > 0 else float("nan")


def site_gains(federated: Run, alone: Run, workload: Workload, names: Sequence[str]) -> list[SiteGain]:
    """Return each site's realised position: what its tenants keep plus its rent, against its own welfare alone."""
    by_home = np.bincount(workload.home, weights=alone.welfare, minlength=len(names))
    return [
        SiteGain(name, float(federated.site_surplus[site]), float(federated.site_rent[site]), float(by_home[site]))
        for site, name in enumerate(names)
    ]
