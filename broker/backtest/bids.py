"""What jobs bid, since a trace of jobs has no bids: three stated distributions, drawn from a seed.

A bid is what an hour of one GPU at the job's home site is worth to its tenant, in micro-credits. It is
drawn around MARKUP times the home site's ask: a tenant there lives with such a price. Progress made
elsewhere is worth the same per step, however fast.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.trace import Trace

Int = NDArray[np.int64]
Real = NDArray[np.float64]

# The median of a bid over the home site's ask. An assumption: at 1 half of all work would not be worth its ask.
MARKUP: Final = 2.0
# Spread of the logarithm of bids: the middle half of them lies within a factor of 1.5 to either side.
SIGMA: Final = 0.6
# Without a user column, jobs of a cluster submitted in one burst are taken to be one user's.
BURST_S: Final = 900.0


class BidRule(StrEnum):
    """How bids are drawn."""

    LOGNORMAL = "lognormal"
    PER_USER = "per-user"
    FLAT = "flat"


ASSUMPTIONS: Final = {
    BidRule.LOGNORMAL: f"each job's bid is log-normal: median {MARKUP:g} times its home site's ask, sigma {SIGMA:g}",
    BidRule.PER_USER: (
        f"one log-normal draw (median {MARKUP:g} times the ask, sigma {SIGMA:g}) for all jobs of a user; where the trace "
        f"names no users, jobs of one cluster that follow each other within {BURST_S / 60:g} minutes count as one user's"
    ),
    BidRule.FLAT: f"every job bids {MARKUP:g} times its home site's ask",
}


def draw_bids(trace: Trace, home_ask_micros: Int, rule: BidRule, seed: int) -> Int:
    """Return each job's bid in micro-credits per GPU-hour at home, at least 1."""
    base = home_ask_micros.astype(np.float64) * MARKUP
    if rule is BidRule.FLAT:
        return _whole(base)
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    if rule is BidRule.LOGNORMAL:
        spread = generator.standard_normal(len(trace))
    else:
        users = _users(trace)
        spread = generator.standard_normal(int(users.max()) + 1)[users]
    return _whole(base * np.exp(SIGMA * spread))


def _whole(amount: Real) -> Int:
    whole: Int = np.maximum(1, np.floor(amount)).astype(np.int64)
    return whole


def _users(trace: Trace) -> Int:
    """Return a user's number for each job."""
    numbers: dict[tuple[str, str], int] = {}
    last: dict[str, tuple[float, int]] = {}
    users = np.empty(len(trace), dtype=np.int64)
    for job, (arrival, cluster, user) in enumerate(
        zip(trace.arrival_s.tolist(), trace.cluster, trace.user, strict=True)
    ):
        if user:
            users[job] = numbers.setdefault((cluster, user), len(numbers))
            continue
        before, burst = last.get(cluster, (-np.inf, -1))
        if arrival - before > BURST_S:
            burst = numbers.setdefault((cluster, f"\0{job}"), len(numbers))
        users[job] = burst
        last[cluster] = (arrival, burst)
    return users
