"""Parts of the market to their own optimum: jobs that regret where they are, and whoever is in their way.

A whole choice far from the bound is mostly right: what is wrong is that some job sits beside the pool
that it should be in, because jobs there that could as well be elsewhere came first. Moving it takes
several moves at once, each of which alone costs welfare. So all jobs in the pools that it wants most are
freed together with it, some hundred in all, and everyone else stays. The LP over the freed ones' columns close to best
tells who of them is in a good place: who has in it what it holds stays too (relaxation-induced neighbourhoods, Danna,
Rothberg and Le Pape 2005). A mixed-integer programme of one node places the others anew.

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
from broker.allocation.selection import Problem, relaxed, select

# The pools of so many of a job's best columns are opened for it.
WISHES: Final = 3
TARGETS_AT_ONCE: Final = 8
# Columns take part that regret at most this share of the mean best surplus; of the targets all better than what they have.
WIDTH: Final = 0.01
# Programmes with more columns than this are cut down by their LP first, and not begun where still more than
# the second are left: the search has other places to gain.
COLUMNS_UNCUT: Final = 2_000
COLUMNS_MAX: Final = 8_000
# The LP is not begun with more.
COLUMNS_LISTED_MAX: Final = 40_000
# Holding what is held is worth this share of the mean best surplus in the LP: it moves nobody for nothing.
HELD_BONUS: Final = 1e-4
# Columns are left out whose reduced cost in the LP is above this share of the mean best surplus.
REDUCED_COST_MAX: Final = 0.1
_WHOLE: Final = 1 - 1e-6
# Relative to what a neighbourhood is worth.
GAP: Final = 1e-4


class Size(NamedTuple):
    """How far a neighbourhood reaches: among so many of those who regret most, until so many jobs are freed.

    Where no more than `nothing` jobs hold nothing, they take part too: they fill what the others leave.
    """

    targets: int
    freed: int
    nothing: int


WIDE: Final = Size(160, 700, 10_000)
NARROW: Final = Size(8, 60, 0)


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


def around(whole: Whole, targets: Int, size: Size) -> Neighbourhood:
    """Return a neighbourhood of the first of `targets`, and of further ones while it is small."""
    instance, state = whole.instance, whole.state
    targets = targets[: size.targets]
    freed = np.zeros(instance.job_count, np.bool_)
    wanted = _near(whole, targets)
    surplus = wanted.surplus(state.price)
    order = np.lexsort((wanted.place, wanted.item, wanted.form, -surplus, wanted.job))
    first = np.searchsorted(wanted.job[order], targets)
    last = np.searchsorted(wanted.job[order], targets, side="right")
    taken = 0
    while taken < len(targets) and np.count_nonzero(freed) < size.freed:
        rows = np.zeros(instance.row_count, np.bool_)
        step = TARGETS_AT_ONCE if size.targets > TARGETS_AT_ONCE else 1
        for index in range(taken, min(len(targets), taken + step)):
            for column in order[first[index] : min(last[index], first[index] + WISHES)]:
                rows[wanted.row[wanted.start[column] : wanted.start[column + 1]]] = True
        rows[instance.links.first_row :] = False
        now = targets[taken : taken + step]
        rows[state.pool[now[state.pool[now] >= 0]]] = True
        freed[now] = True
        freed |= _inside(whole, rows)
        taken += len(now)
    nothing = whole.holds.form < 0
    if np.count_nonzero(nothing) <= size.nothing:
        freed |= nothing
    freed &= ~staying(instance, state, whole.holds)
    targets = targets[:taken]
    free = targets[freed[targets]]
    regret = (whole.best - state.surplus)[free]
    wide = near_singles(instance, state.price, whole.best, float(regret.max(initial=0.0)), free)
    better = wide.surplus(state.price) > state.surplus[wide.job]
    columns = joined(_near(whole, np.flatnonzero(freed)), wide.take(np.flatnonzero(better)))
    return Neighbourhood(freed, columns, targets)


def choose_anew(whole: Whole, held: Columns, area: Neighbourhood, *, nodes_max: int) -> tuple[Choice | None, int]:
    """Return the best choice when all but the freed jobs stay, None where it is no other, and the nodes it took.

    `held` are the columns that the freed jobs hold.
    """
    columns = joined(held, area.columns)
    columns = columns.take(_distinct(columns))
    if not 0 < len(columns.job) <= COLUMNS_LISTED_MAX:
        return None, 0
    start = np.isin(_keys(columns), _keys(held))
    use = whole.state.use.copy()
    np.subtract.at(use, held.row, held.use)
    problem = problem_of(whole.instance, whole.state, columns, use)
    good = np.zeros(len(whole.best), np.bool_)
    if len(columns.job) > COLUMNS_UNCUT:
        good, chosen = _cut(whole, problem, columns, start)
        stays = columns.take(np.flatnonzero(start & good[columns.job]))
        np.add.at(use, stays.row, stays.use)
        columns, start = columns.take(chosen), start[chosen]
        if not 0 < len(chosen) <= COLUMNS_MAX:
            return None, 0
        problem = problem_of(whole.instance, whole.state, columns, use)
    found = select(problem, nodes_max=nodes_max, gap=GAP, start=start, heuristics=False)
    if found.chosen is None or np.array_equal(found.chosen, start):
        return None, found.nodes
    return placed_anew(whole.holds, area.freed & ~good, columns.take(np.flatnonzero(found.chosen))), found.nodes


def _cut(whole: Whole, problem: Problem, columns: Columns, start: Flag) -> tuple[Flag, Int]:
    """Return who has in the LP what it holds, `start` among the columns, and the columns of the others worth a look."""
    mean, jobs = float(whole.best.mean()), len(whole.best)
    x, reduced_cost = relaxed(problem, np.where(start, HELD_BONUS * mean, 0.0))
    good: Flag = np.bincount(columns.job, (x > _WHOLE) & start, minlength=jobs) > 0
    good |= (whole.holds.form < 0) & (np.bincount(columns.job, x, minlength=jobs) < 1 - _WHOLE)
    return good, np.flatnonzero(~good[columns.job] & (start | (reduced_cost <= REDUCED_COST_MAX * mean)))


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
