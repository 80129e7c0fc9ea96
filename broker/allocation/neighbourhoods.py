"""Parts of the market to their own optimum: jobs that regret where they are, and whoever is in their way.

A whole choice far from the bound is mostly right: what is wrong is that some job sits beside the pool
that it should be in, because jobs there that could as well be elsewhere came first. Moving it takes
several moves at once, each of which alone costs welfare. So all jobs in the pools that it wants most are
freed together with it, everyone else stays, and a small mixed-integer programme places the freed ones anew
among their columns that are close to best at the prices.

`finish` does the same for all jobs of a small round, with a proof.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.columns import Columns, joined
from broker.allocation.finish import placed_anew, problem_of, staying
from broker.allocation.instance import Choice, Flag, Instance, Int, Real
from broker.allocation.listing import near_singles
from broker.allocation.occupancy import Occupancy, Others
from broker.allocation.selection import select

# The pools of so many of a job's best columns are opened for it.
WISHES: Final = 3
# Further jobs are looked after in the same programme until so many are freed.
FREED: Final = 60
# So many of those who regret most are looked at for one programme.
TARGETS_MAX: Final = 8
# Columns take part that regret at most this share of the mean best surplus.
WIDTH: Final = 0.001
# Relative to what a neighbourhood is worth.
GAP: Final = 1e-4
# Programmes with more columns are not begun: the search has other places to gain.
COLUMNS_MAX: Final = 2_000


class Whole(NamedTuple):
    """What neighbourhoods are cut out of: a state with its choice, the spans and bundles that take part, and best surpluses."""

    instance: Instance
    others: Others
    state: Occupancy
    holds: Choice
    crossing: Columns
    best: Real


class Neighbourhood(NamedTuple):
    """Jobs that are placed anew (`freed` [jobs]), the columns they choose among, and for whose sake."""

    freed: Flag
    columns: Columns
    targets: Int


def around(whole: Whole, targets: Int) -> Neighbourhood:
    """Return a neighbourhood of the first of `targets`, and of further ones while it is small."""
    instance, state = whole.instance, whole.state
    targets = targets[:TARGETS_MAX]
    freed = np.zeros(instance.job_count, np.bool_)
    wanted = _near(whole, targets)
    surplus = wanted.surplus(state.price)
    order = np.lexsort((wanted.place, wanted.item, wanted.form, -surplus, wanted.job))
    first = np.searchsorted(wanted.job[order], targets)
    last = np.searchsorted(wanted.job[order], targets, side="right")
    taken = 0
    for target, begin, end in zip(targets, first, last, strict=True):
        if taken and np.count_nonzero(freed) >= FREED:
            break
        taken += 1
        freed[target] = True
        rows = np.zeros(instance.row_count, np.bool_)
        for column in order[begin : min(end, begin + WISHES)]:
            rows[wanted.row[wanted.start[column] : wanted.start[column + 1]]] = True
        rows[instance.links.first_row :] = False
        if state.pool[target] >= 0:
            rows[state.pool[target]] = True
        freed |= _inside(whole, rows)
    freed &= ~staying(instance, state, whole.holds)
    return Neighbourhood(freed, _near(whole, np.flatnonzero(freed)), targets[:taken])


def choose_anew(whole: Whole, held: Columns, area: Neighbourhood, *, nodes_max: int) -> tuple[Choice | None, int]:
    """Return the best choice when all but the freed jobs stay, None where it is no other, and the nodes it took.

    `held` are the columns that the freed jobs hold.
    """
    columns = joined(held, area.columns)
    columns = columns.take(_distinct(columns))
    start = np.isin(_keys(columns), _keys(held))
    if not 0 < len(columns.job) <= COLUMNS_MAX:
        return None, 0
    use = whole.state.use.copy()
    np.subtract.at(use, held.row, held.use)
    problem = problem_of(whole.instance, whole.state, columns, use)
    found = select(problem, nodes_max=nodes_max, gap=GAP, start=start, heuristics=False)
    if found.chosen is None or np.array_equal(found.chosen, start):
        return None, found.nodes
    return placed_anew(whole.holds, area.freed, columns.take(np.flatnonzero(found.chosen))), found.nodes


def _near(whole: Whole, jobs: Int) -> Columns:
    """Return columns of `jobs` that are close to their best."""
    prices, best = whole.state.price, whole.best
    width = WIDTH * float(best.mean()) + 1.0
    inside = np.zeros(len(best), np.bool_)
    inside[jobs] = True
    spans = whole.crossing.take(np.flatnonzero(inside[whole.crossing.job]))
    close = np.flatnonzero(spans.surplus(prices) >= (best - width)[spans.job])
    return joined(near_singles(whole.instance, prices, best, width, jobs), spans.take(close))


def _inside(whole: Whole, rows: Flag) -> Flag:
    """Return the jobs that use any of the pools' `rows`."""
    instance, others, state = whole.instance, whole.others, whole.state
    pools: Flag = np.any(rows[: instance.pool_count * instance.slots].reshape(instance.slots, -1), axis=0)
    inside = (state.pool >= 0) & pools[state.pool]
    column = np.repeat(np.arange(len(others.value)), np.diff(others.entry_start))
    touches = np.bincount(column, rows[others.row], minlength=len(others.value)) > 0
    other = (state.item >= 0) & (state.pool < 0)
    inside[other] = touches[state.item[other]]
    return inside


def _keys(columns: Columns) -> Int:
    """Return one number per column: the item alone names the job."""
    return (columns.form.astype(np.int64) << 60) | (columns.item.astype(np.int64) << 30) | columns.place


def _distinct(columns: Columns) -> Int:
    _, first = np.unique(_keys(columns), return_index=True)
    return np.sort(first)
