"""The posted-price lane: one small job at the last round's prices, at once, on GPUs that nobody has.

A pure function like a round, of a snapshot with that job alone: pools with what is free of them, last prices as they
were published. The job gets the configuration that leaves it most at those prices; where an ask has risen above the
price, the ask counts. It pays no more than its value, no site gets less than its ask, and the market adds nothing: so
an invoice's line of such a term traces to the round whose prices it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from broker.allocation.clearing import Placement
from broker.allocation.compile import compile_market
from broker.allocation.instance import NONE, Choice
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.solver import best_columns
from broker.allocation.table_rows import from_snapshot
from broker.allocation.won import Market
from broker.allocation.writing import placement_at
from pricing.money import format_credits


@dataclass(frozen=True, slots=True)
class NotNow:
    """Why a job cannot start at once: a stable code, and a sentence with what would change it."""

    code: str
    sentence: str


def instant(snapshot: Snapshot) -> Placement | NotNow:
    """Return the placement of a snapshot's only job at its last prices, or why there is none.

    The caller has left out of the snapshot what is not for this lane: taken GPUs, pools without a price.
    """
    assert len(snapshot.jobs) == 1, "the lane places one job at a time"
    market = Market(tables := from_snapshot(snapshot), compile_market(tables))
    instance = market.instance
    prices = np.zeros(instance.row_count, np.int64)
    asks = {pool.pool_id: pool.ask_micros_per_gpu_hour for pool in snapshot.pools}
    for pool, pool_id in enumerate(market.names.pools):
        prices[pool] = max(snapshot.last_prices[pool_id], asks[pool_id])
    found = best_columns(instance, prices)
    if found.form[0] == NONE:
        return _why_not(snapshot)
    chosen = Choice(
        np.array([found.form[0]], np.int8), np.array([found.item[0]], np.int32), np.array([found.place[0]], np.int32)
    )
    placement = placement_at(market, prices, chosen)
    assert placement.uplift_micros_per_hour == 0, "what has a surplus at the prices pays them itself"
    return placement


def _why_not(snapshot: Snapshot) -> NotNow:
    """Explain by what a round with nobody else in it would say: only its price can then be in the way."""
    cleared = clear(snapshot)
    if cleared.unplaced:
        left_out = cleared.unplaced[0]
        return NotNow(left_out.code, left_out.sentence)
    row = cleared.placements[0]
    cost = sum(
        max(snapshot.last_prices[pool.pool_id], pool.price_micros_per_gpu_hour) * pool.gpus for pool in row.pools
    )
    return NotNow(
        "price",
        f"at the last prices {row.configuration.key} costs {format_credits(cost)} credits an hour, the bid is worth "
        f"{format_credits(max(0, row.value_micros_per_hour))} there",
    )
