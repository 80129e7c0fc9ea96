"""Which links to probe now; pure. The least sure first, and seldom.

A site takes part in one probe at a time, within the bytes that its owner and the market allow in a day, and not while a
job that spans sites synchronises there, unless its owner lets it. A pair rests after each try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# A pair that is surer than this has nothing to gain from a probe.
CONFIDENCE_ENOUGH: Final = 0.6
# As many bytes as the faster direction would carry in this time, if it is what its site says.
PROBE_S: Final = 2.0
PROBE_BYTES_MIN: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class ProbeSite:
    """A live site that can be probed. `bytes_left` is of today; `is_busy` with a probe, or with others' training."""

    site_id: str
    listens: bool
    bytes_left: int
    is_busy: bool


@dataclass(frozen=True, slots=True)
class ProbePair:
    """Two sites with links both ways. `tried_ms` is when they were last tried, or when the younger of them joined."""

    sites: tuple[str, str]
    bandwidth_bits_per_s: float
    confidence: float
    tried_ms: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """A probe to begin: `bytes_max` in each direction."""

    dialler: str
    listener: str
    bytes_max: int


def choose(
    sites: Mapping[str, ProbeSite],
    pairs: Sequence[ProbePair],
    now_ms: int,
    *,
    interval_s: float,
    bytes_max: int,
) -> list[Chosen]:
    """Return the probes to begin now: the least sure pair first, of equals the one that was left alone longest."""
    chosen: list[Chosen] = []
    engaged = {name for name, site in sites.items() if site.is_busy}
    for pair in sorted(pairs, key=lambda pair: (pair.confidence, pair.tried_ms, pair.sites)):
        ends = [sites[name] for name in sorted(pair.sites) if name in sites and name not in engaged]
        listeners = [site for site in ends if site.listens]
        rested = now_ms - pair.tried_ms >= interval_s * 1000
        if len(ends) < len(pair.sites) or not listeners or not rested or pair.confidence >= CONFIDENCE_ENOUGH:
            continue
        size = min(bytes_max, max(PROBE_BYTES_MIN, math.ceil(pair.bandwidth_bits_per_s * PROBE_S / 8)))
        if any(2 * size > site.bytes_left for site in ends):
            continue
        listener = listeners[0]
        (dialler,) = (site for site in ends if site is not listener)
        chosen.append(Chosen(dialler.site_id, listener.site_id, size))
        engaged |= {site.site_id for site in ends}
    return chosen
