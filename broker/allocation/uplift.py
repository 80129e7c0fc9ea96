"""What market equity cannot uphold is dropped before a round is committed.

A placement may hold capacity worth more at the prices than its buyer can be charged: a knapsack or a
late filler put it where GPUs were left. The difference is its *uplift*, paid out of market equity
over its term. Where all uplifts together exceed the equity, the placements that give the least
welfare for theirs go first, and what they leave is filled with columns that need none.
"""

from __future__ import annotations

import numpy as np

from broker.allocation.instance import BUNDLE, NONE, Choice, Instance, Int
from broker.allocation.listing import Names, described
from broker.allocation.occupancy import (
    Occupancy,
    Others,
    choice_of,
    held_as,
    new_scratch,
    placing,
    release,
    take,
)
from broker.allocation.responses import improve, priced_offers


def uplift_micros(instance: Instance, prices: Int, choice: Choice) -> Int:
    """Return what each job's column costs market equity over its term [jobs], in micro-credits, rounded up.

    Gross is what its GPUs and its bandwidth cost now, at `prices`; a place inside a running term
    keeps its locked prices and needs nothing. A past term's own place counts the longest term.
    """
    jobs = instance.jobs
    kept = jobs.must & (choice.form == BUNDLE) & (choice.item == jobs.own)
    held = np.flatnonzero((choice.form != NONE) & ~kept)
    names = Names(held.astype(np.int32), choice.form[held].astype(np.int32), choice.item[held], choice.place[held])
    found = described(instance, names)
    columns = found.columns
    first_link = instance.links.first_row
    paid = columns.row < instance.pool_count
    paid |= (columns.row >= first_link) & (columns.row < first_link + len(instance.links.from_site))
    summed = np.concatenate([[0], np.cumsum(np.where(paid, prices[columns.row] * columns.use, 0))])
    gross = summed[columns.start[1:]] - summed[columns.start[:-1]]
    hourly = np.maximum(0, gross - np.maximum(0, found.charge_max))
    costs = np.zeros(instance.job_count, np.int64)
    costs[columns.job] = -((-hourly * found.term_s) // 3600)
    return costs


def drop_unfunded(instance: Instance, prices: Int, others: Others, state: Occupancy, equity_micros: int) -> int:
    """Drop placements from `state` until `equity_micros` cover all uplifts; return how many went.

    An incumbent inside its term goes back to its own place where that is still free, and stays where
    it is otherwise: it cannot be out.
    """
    costs = uplift_micros(instance, prices, choice_of(state, others))
    total = int(costs.sum())
    if total <= equity_micros:
        return 0
    scratch, parts = new_scratch(instance, others), placing(instance)
    own = held_as(others, Choice(np.full(len(costs), BUNDLE, np.int8), instance.jobs.own, np.zeros_like(state.pool)))[0]
    needy = np.flatnonzero(costs)
    # Least welfare per micro-credit of uplift first; ties to the later job.
    worth = (state.value[needy] / costs[needy])[::-1]
    dropped = 0
    for job in needy[::-1][np.argsort(worth, kind="stable")]:
        if total <= equity_micros:
            break
        item, pool = np.int64(state.item[job]), np.int64(state.pool[job])
        release(parts, others, state, job, scratch, 1.0)
        if instance.jobs.must[job]:
            take(parts, others, state, job, np.int64(own[job]), np.int64(NONE), scratch, 1.0, True)
            if state.item[job] < 0:
                take(parts, others, state, job, item, pool, scratch, 1.0, False)
                continue
        total -= int(costs[job])
        dropped += 1
    if dropped:
        _refill(instance, prices, others, state)
    return dropped


def _refill(instance: Instance, prices: Int, others: Others, state: Occupancy) -> None:
    """Let those without a place choose, and keep those choices that need no uplift."""
    out = np.flatnonzero(state.item < 0)
    scratch, parts = new_scratch(instance, others), placing(instance)
    improve(parts, others, state, out, priced_offers(instance, state.price), state.price, 1.0, True, scratch)
    costs = uplift_micros(instance, prices, choice_of(state, others))
    for job in out[costs[out] > 0]:
        release(parts, others, state, job, scratch, 1.0)
