"""Samples that count: how far a sample brings a job depends on the batch and on the strategy.

The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162) phi = tr(S) / |G|^2 says at which
batch the noise of the gradient equals the gradient. A batch of B samples then brings a job as far as

    B (phi + B0) / (phi + B)

samples would with the batch B0 that its target was stated for (Pollux, OSDI'21): `efficiency` is that
share. Sites that train H steps apart before they merge lose a little more: their parameters drift.
To first order the loss grows with the steps apart and with the share of gradients that a site does
not see; `drift` is measured per job family (`drift_of`), and zero where every step is merged.

Goodput is samples per second times efficiency; a target is a number of samples at the batch B0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Squared gradient norms scatter by their own size from batch to batch; so many batches are averaged.
MEMORY_BATCHES: Final = 50.0
# A share lost per step apart. Published DiLoCo runs with H = 500 and 8 sites need some 10 to 20 % more
# samples than synchronous ones (arXiv 2311.08105); a prior that a job's own measurements replace.
DRIFT_PRIOR: Final = 3e-4


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """Running estimates of tr(S) and |G|^2; `seen` counts the batches in them.

    Both are averaged before they are divided: a mean of ratios would be biased.
    """

    trace: float = 0.0
    norm_squared: float = 0.0
    seen: int = 0

    def observed(self, small: int, small_squared: float, big: int, big_squared: float) -> NoiseScale:
        """Return the estimate after one step that saw the squared norms of gradients over two batch sizes.

        The small one is a rank's own gradient (averaged over ranks), the big one the gradient after
        the all-reduce. Raises ValueError unless small < big and both norms are finite.
        """
        if not 1 <= small < big:
            message = f"two batch sizes are needed, the small below the big one, not {small} and {big}"
            raise ValueError(message)
        if not (math.isfinite(small_squared) and math.isfinite(big_squared)):
            message = "a gradient's squared norm is not finite: leave the step out"
            raise ValueError(message)
        norm_squared = (big * big_squared - small * small_squared) / (big - small)
        trace = (small_squared - big_squared) / (1 / small - 1 / big)
        share = 1 / min(self.seen + 1, MEMORY_BATCHES)
        return NoiseScale(
            self.trace + share * (trace - self.trace),
            self.norm_squared + share * (norm_squared - self.norm_squared),
            self.seen + 1,
        )

    @property
    def batch(self) -> float | None:
        """The noise scale phi in samples; None while the estimates are noise themselves."""
        if self.seen == 0 or self.norm_squared <= 0 or self.trace <= 0:
            return None
        return self.trace / self.norm_squared


def efficiency(noise_batch: float, batch: float, reference_batch: float) -> float:
    """Return what a sample in a batch counts, in samples of the reference batch: 1 at `reference_batch`.

    Smaller batches count for more, at most (phi + B0) / phi.
    """
    if noise_batch < 0 or batch <= 0 or reference_batch <= 0:
        message = "batches must be above 0 and the noise scale 0 or more"
        raise ValueError(message)
    return (noise_batch + reference_batch) / (noise_batch + batch)


def strategy_efficiency(sites: int, period_steps: int, drift: float = DRIFT_PRIOR) -> float:
    """Return the share of samples that count when `sites` merge every `period_steps`; 1 on one site."""
    apart = (period_steps - 1) * (sites - 1) / sites
    return 1 / (1 + drift * apart)


def drift_of(sites: int, period_steps: int, samples: float, samples_synchronous: float) -> float:
    """Return the drift that two runs to the same loss show; 0 where the runs do not differ."""
    apart = (period_steps - 1) * (sites - 1) / sites
    return max(0.0, samples / samples_synchronous - 1) / apart if apart > 0 else 0.0


def goodput(
    samples_per_s: float,
    *,
    noise_batch: float,
    batch: float,
    reference_batch: float,
    sites: int = 1,
    period_steps: int = 1,
    drift: float = DRIFT_PRIOR,
) -> float:
    """Return the samples per second that count; `batch` is global, of all sites together.

    Between merges a step's gradient is averaged over one site only, and the merge averages the sites.
    To first order in the learning rate this counts like the global batch, less the drift.
    """
    share = efficiency(noise_batch, batch, reference_batch)
    return samples_per_s * share * strategy_efficiency(sites, period_steps, drift)


def seconds_to_target(reference_samples: float, goodput_samples_per_s: float) -> float:
    """Return how long a target takes that is stated in samples at the reference batch."""
    if goodput_samples_per_s <= 0:
        return math.inf
    return max(reference_samples, 0.0) / goodput_samples_per_s
