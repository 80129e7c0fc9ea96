"""What market equity cannot uphold is dropped before a round is committed.

A placement may hold capacity worth more at the prices than its buyer can be charged: a knapsack or a
late filler put it where GPUs were left. The difference is its *uplift*, paid out of market equity
over its term. Where all uplifts together exceed the equity, the placements that give the least
welfare for theirs go first, and what they leave is filled with columns that need none.
"""

from __future__ import annotations

import numpy as np

from broker.allocation.columns import Columns
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
    kept = instance.jobs.must & (choice.form == BUNDLE) & (choice.item == instance.jobs.own)
    held = np.flatnonzero((choice.form != NONE) & ~kept)
    found = described(instance, _names(choice, held))
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

    An incumbent inside its term cannot be out: it goes back to its own place, and whoever took that
    meanwhile leaves it. All own places fit beside each other, so this ends.
    """
    choice = choice_of(state, others)
    costs = uplift_micros(instance, prices, choice)
    total = int(costs.sum())
    if total <= equity_micros:
        return 0
    scratch, parts = new_scratch(instance, others), placing(instance)
    own = held_as(others, Choice(np.full(len(costs), BUNDLE, np.int8), instance.jobs.own, np.zeros_like(state.pool)))[0]
    users = _held(instance, choice)
    user = np.repeat(users.job, np.diff(users.start))
    needy = np.flatnonzero(costs)
    # Least welfare per micro-credit of uplift first; ties to the later job.
    worth = (state.value[needy] / costs[needy])[::-1]
    dropped = 0
    for first in needy[::-1][np.argsort(worth, kind="stable")]:
        if total <= equity_micros:
            break
        leaving = [first] if state.item[first] >= 0 else []
        while leaving:
            job = leaving.pop()
            release(parts, others, state, job, scratch, 1.0)
            total -= int(costs[job])
            costs[job] = 0
            dropped += 1
            if not instance.jobs.must[job]:
                continue
            entries = slice(others.entry_start[own[job]], others.entry_start[own[job] + 1])
            row, use = others.row[entries], others.use[entries]
            lacking = row[(use > 0) & ~state.soft[row] & (state.use[row] + use > state.supply[row])]
            take(parts, others, state, job, np.int64(own[job]), np.int64(NONE), scratch, 1.0, False)
            taker = np.unique(user[np.isin(users.row, lacking) & (users.use > 0)])
            home = instance.jobs.must & (state.pool < 0) & (state.item == own)
            leaving += [other for other in taker if state.item[other] >= 0 and not home[other] and other not in leaving]
    if dropped:
        _refill(instance, prices, others, state)
    return dropped


def _names(choice: Choice, held: Int) -> Names:
    return Names(held.astype(np.int32), *(part[held].astype(np.int32) for part in choice))


def _held(instance: Instance, choice: Choice) -> Columns:
    return described(instance, _names(choice, np.flatnonzero(choice.form != NONE))).columns


def _refill(instance: Instance, prices: Int, others: Others, state: Occupancy) -> None:
    """Let those without a place choose, and keep those choices that need no uplift."""
    out = np.flatnonzero(state.item < 0)
    scratch, parts = new_scratch(instance, others), placing(instance)
    improve(parts, others, state, out, priced_offers(instance, state.price), state.price, 1.0, True, scratch)
    costs = uplift_micros(instance, prices, choice_of(state, others))
    for job in out[costs[out] > 0]:
        release(parts, others, state, job, scratch, 1.0)
