"""What market equity cannot uphold is dropped before a round is committed.

A placement may hold capacity worth more at the prices than its buyer can be charged: a knapsack or a
late filler put it where GPUs were left. The difference is its *uplift*, paid out of market equity
over its term. Where all uplifts together exceed the equity, the placements that give the least
welfare for theirs go first, and what they leave is filled with columns that need none.
"""

from __future__ import annotations

import numpy as np

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import BUNDLE, NONE, SINGLE, Choice, Instance, Int
from broker.allocation.kernel import CHARGE_MAX, TERM_S, term_seconds
from broker.allocation.occupancy import (
    Occupancy,
    Scratch,
    can_take,
    column_uses,
    new_scratch,
    release,
    take,
)
from broker.allocation.responses import Offers, Shortlist, best_of, no_shortlist, priced_offers


def uplift_micros(instance: Instance, prices: Int, choice: Choice) -> Int:
    """Return what each job's column costs market equity over its term [jobs], in micro-credits, rounded up."""
    costs = np.zeros(instance.job_count, np.int64)
    scratch = new_scratch(instance)
    for job in np.flatnonzero(choice.form != NONE):
        costs[job] = column_uplift(
            instance, prices, job, int(choice.form[job]), int(choice.item[job]), int(choice.place[job]), scratch
        )
    return costs


def drop_unfunded(instance: Instance, prices: Int, state: Occupancy, equity_micros: int) -> int:
    """Drop placements from `state` until `equity_micros` cover all uplifts; return how many went.

    An incumbent inside its term goes back to its own place where that is still free, and stays where
    it is otherwise: it cannot be out.
    """
    scratch = new_scratch(instance)
    costs = uplift_micros(instance, prices, Choice(state.form.astype(np.int8), state.item, state.place))
    total = int(costs.sum())
    if total <= equity_micros:
        return 0
    needy = np.flatnonzero(costs)
    # Least welfare per micro-credit of uplift first; ties to the later job.
    worth = (state.value[needy] / costs[needy])[::-1]
    dropped = 0
    for job in needy[::-1][np.argsort(worth, kind="stable")]:
        if total <= equity_micros:
            break
        held = state.form[job], state.item[job], state.place[job]
        release(instance, state, job, scratch, 1.0)
        if instance.jobs.must[job]:
            own = int(instance.jobs.own[job])
            if not can_take(instance, state, job, BUNDLE, own, 0, scratch):
                take(instance, state, job, *held, scratch, 1.0)
                continue
            take(instance, state, job, BUNDLE, own, 0, scratch, 1.0)
        total -= int(costs[job])
        dropped += 1
    if dropped:
        offers = priced_offers(instance, state.price)
        order = np.flatnonzero(state.form == NONE)
        _refill(instance, prices, state, order, offers, no_shortlist(instance), scratch)
    return dropped


@compiled_loop
def column_uplift(instance: Instance, prices: Int, job: int, form: int, item: int, place: int, scratch: Scratch) -> int:
    """Return what equity pays for a column over its term: ceil(uplift per hour x term / 3600).

    Gross is what its GPUs and its bandwidth cost now, at `prices`; a place inside a running term
    keeps its locked prices and needs nothing.
    """
    if form == BUNDLE and instance.jobs.must[job] and item == instance.jobs.own[job]:
        return np.int64(0)
    count = column_uses(instance, job, form, item, place, scratch)
    pools, first_link = len(instance.pools.site), instance.links.first_row
    end_link = first_link + len(instance.links.from_site)
    gross = np.int64(0)
    for entry in range(count):
        row = scratch.row[entry]
        if row < pools or first_link <= row < end_link:
            gross += prices[row] * scratch.use[entry]
    uplift = gross - max(np.int64(0), scratch.out[CHARGE_MAX])
    if uplift <= 0:
        return np.int64(0)
    term_s = np.int64(instance.term_s)
    if form == SINGLE:
        term_s = np.int64(term_seconds(instance, job, instance.singles.speed[item]))
    elif form != BUNDLE:
        term_s = scratch.out[TERM_S]
    return -((-uplift * term_s) // np.int64(3600))


@compiled_loop
def _refill(
    instance: Instance,
    prices: Int,
    state: Occupancy,
    order: Int,
    offers: Offers,
    shortlist: Shortlist,
    scratch: Scratch,
) -> None:
    for job in order:
        _, form, item, place = best_of(instance, state, offers, shortlist, state.price, job, -1, True, 0.0, scratch)
        if form == NONE or column_uplift(instance, prices, job, form, item, place, scratch) > 0:
            continue
        take(instance, state, job, form, item, place, scratch, 1.0)
