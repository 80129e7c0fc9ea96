"""The tier between sites: what a sync round adds to a step.

A round moves the compressed contribution over a link of some bandwidth, delay and loss on several
streams, once in H steps. Training may go on for tau steps while it is under way, and a round with a
quorum waits for its K-th site only. What remains is the exposed part, spread over H steps:

    rate    = min(0.9 bandwidth (1 - loss), streams x 1.22 segment / (rtt sqrt(loss)))
    sync    = the K-th smallest over sites of  bytes up / rate + bytes down / rate + 2 rtt
    step    = slowest site's step + max(0, sync - tau step) / H

The rate of a stream under loss is that of TCP (Mathis et al. 1997, eq. 3); with few losses the
bandwidth binds, on long links with loss only more streams help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from training.steptimes.model import StepPrediction
from training.throughput import LINK_EFFICIENCY, ROUND_TRIPS_PER_SYNC

SEGMENT_BITS: Final = 1448 * 8
MATHIS: Final = 1.22
# How far a probed bandwidth is from what a transfer then gets, either way, nine times of ten.
LINK_HALF_WIDTH_LOG: Final = 0.2


@dataclass(frozen=True, slots=True)
class WideLink:
    """A site's link to the hub and back; `round_trip_s` both ways together."""

    bandwidth_bits_per_s: float
    round_trip_s: float = 0.0
    loss: float = 0.0
    streams: int = 1

    def rate_bits_per_s(self) -> float:
        """Return what the link carries of one transfer."""
        filled = self.bandwidth_bits_per_s * LINK_EFFICIENCY * (1 - self.loss)
        if self.loss <= 0 or self.round_trip_s <= 0:
            return filled
        return min(filled, self.streams * MATHIS * SEGMENT_BITS / (self.round_trip_s * math.sqrt(self.loss)))


@dataclass(frozen=True, slots=True)
class Schedule:
    """When sites agree: every `period_steps`, `overlap_steps` of them in the background, `quorum` sites at least.

    `contribution_bytes` is what one site sends; `quorum` None waits for all.
    """

    contribution_bytes: float
    period_steps: int
    overlap_steps: int = 0
    quorum: int | None = None


def sync_s(schedule: Schedule, links: Sequence[WideLink]) -> float:
    """Return the seconds of one sync round; `links` are of every site but the hub's own."""
    if not links:
        return 0.0
    rounds = sorted(
        schedule.contribution_bytes * 8 * (1 + len(links)) / link.rate_bits_per_s()
        + ROUND_TRIPS_PER_SYNC * link.round_trip_s
        for link in links
    )
    # The hub's own site is always there first.
    waited = len(links) if schedule.quorum is None else min(max(schedule.quorum - 1, 0), len(links))
    return rounds[waited - 1] if waited else 0.0


def across_sites(parts: Sequence[StepPrediction], schedule: Schedule, links: Sequence[WideLink]) -> StepPrediction:
    """Return the step of a job on several sites from each site's own prediction; bounds from bounds.

    The slowest site paces all. Samples per second are of all sites together.
    """
    if len(links) != len(parts) - 1:
        message = f"{len(parts)} sites meet over {len(parts) - 1} links to the hub's, not {len(links)}"
        raise ValueError(message)
    samples = sum(part.samples_per_s * part.step_s for part in parts)
    steps = []
    for alone_s, wider in (
        (max(part.step_s for part in parts), 0.0),
        (max(part.low_s for part in parts), -LINK_HALF_WIDTH_LOG),
        (max(part.high_s for part in parts), LINK_HALF_WIDTH_LOG),
    ):
        syncing = sync_s(schedule, links) * math.exp(wider)
        steps.append(alone_s + max(0.0, syncing - schedule.overlap_steps * alone_s) / schedule.period_steps)
    step, low, high = steps
    return StepPrediction(step, low, high, samples / step, samples / high, samples / low)
