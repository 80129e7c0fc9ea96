"""Who holds what while whole placements are sought, and what every row can still give.

`responses` and `knapsack` move jobs about with `take` and `release`; `crossing` and `finish` read
what is free. A row supplies, at the published price, its base and the steps that cost no more than
that price: nobody is placed on capacity whose owner asked for more. Floors bind nobody: what is
missing from one is paid for in welfare. An incumbent inside its term may stay even where its own
place is no longer supplied.

Every move is judged by one number, the *standing*

    sum_j VALUE_j - sum_r (weight C_r(use_r) + (1 - weight) y_r use_r)

with C_r the cost of the steps used. With weight 1 that is welfare. With weight 0 it is the sum of
surpluses at prices y, which counts a free unit as good as sold. Weights between lean on others to
come and fill what a move leaves free.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from broker.allocation.columns import Columns
from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import (
    BUNDLE,
    NONE,
    SINGLE,
    SPAN,
    Choice,
    Flag,
    Goods,
    Index,
    Instance,
    Int,
    Real,
    Rows,
    Singles,
    Sites,
)
from broker.allocation.kernel import CHARGE_MAX, EGRESS, SPAN_OUT, VALUE, budget_shares, single_column


class Others(NamedTuple):
    """Spans and bundles that may be held, written out: those of job j are start[j] up to start[j + 1].

    `form`, `item` and `place` name the column; it uses use[e] of row[e] for e in entry_start[c] up to
    entry_start[c + 1].
    """

    start: Int
    form: Index
    item: Index
    place: Index
    value: Int
    entry_start: Int
    row: Index
    use: Int


class Occupancy(NamedTuple):
    """A state of the search. `supply` and `soft` (floors) are fixed, the others change in place.

    A job in a single holds (`item`, `pool`), one in a span or bundle holds column `item` of Others
    and pool -1, one without a place (-1, -1). `price` is the published price of every row, as
    float64. `surplus` is each job's at those prices, 0 where it has no column.
    """

    price: Real
    supply: Int
    soft: Flag
    use: Int
    item: Index
    pool: Index
    value: Int
    surplus: Real


class Scratch(NamedTuple):
    """Room for one column: the kernel's `out`, the rows it uses, and how much of each."""

    out: Int
    row: Index
    use: Int


class _Jobs(NamedTuple):
    must: Flag
    locked: Int
    home: Index
    tier_price: Int
    site_set: Index
    budget_row: Index
    budget: Int
    floor_row: Index
    barred_start: Int
    barred: Int


class _Pools(NamedTuple):
    site: Index
    kind: Index


class _Placing(NamedTuple):
    rows: Rows
    sites: Sites
    pools: _Pools
    goods: Goods
    jobs: _Jobs
    site_sets: NDArray[np.uint64]
    singles: Singles


def placing(instance: Instance) -> Instance:
    """Return the parts of an instance that the search's loops read, which is all that is passed to them.

    Every array that a compiled call passes costs time to compile: half of them are for spans' speeds.
    """
    jobs, pools = instance.jobs, instance.pools
    parts = _Placing(
        rows=instance.rows,
        sites=instance.sites,
        pools=_Pools(pools.site, pools.kind),
        goods=instance.goods,
        jobs=_Jobs(*(getattr(jobs, name) for name in _Jobs._fields)),
        site_sets=instance.site_sets,
        singles=instance.singles,
    )
    return cast("Instance", parts)


def empty_occupancy(instance: Instance, prices: Int) -> Occupancy:
    """Return a state where nobody has a place."""
    rows = instance.rows
    owner = np.repeat(np.arange(len(rows.base)), np.diff(rows.step_start))
    sold = rows.step_cost <= prices[owner]
    supply = rows.base.copy()
    np.add.at(supply, owner[sold], rows.step_units[sold])
    soft = rows.base < 0
    soft[instance.jobs.floor_row[instance.jobs.floor_row >= 0]] = True
    count = instance.job_count
    return Occupancy(
        price=prices.astype(np.float64),
        supply=supply,
        soft=soft,
        use=np.zeros(len(rows.base), dtype=np.int64),
        item=np.full(count, NONE, dtype=np.int32),
        pool=np.full(count, NONE, dtype=np.int32),
        value=np.zeros(count, dtype=np.int64),
        surplus=np.zeros(count, dtype=np.float64),
    )


def copy_into(target: Occupancy, source: Occupancy) -> None:
    """Make `target` the same state as `source`, of the same instance."""
    for mine, theirs in zip(target, source, strict=True):
        np.copyto(np.asarray(mine), np.asarray(theirs))


def written_out(job_count: int, columns: Columns) -> Others:
    """Return the spans and bundles among columns, each once, those of a job in their order there."""
    wanted = np.flatnonzero((columns.form == SPAN) | (columns.form == BUNDLE))
    names = np.stack(
        [part[wanted].astype(np.int64) for part in (columns.job, columns.form, columns.item, columns.place)]
    )
    _, first = np.unique(names, axis=1, return_index=True)
    first.sort()
    by_job = first[np.argsort(names[0, first], kind="stable")]
    chosen = columns.take(wanted[by_job])
    start = np.concatenate([[0], np.cumsum(np.bincount(chosen.job, minlength=job_count))])
    return Others(
        start.astype(np.int64),
        chosen.form.astype(np.int32),
        chosen.item.astype(np.int32),
        chosen.place.astype(np.int32),
        chosen.value,
        chosen.start,
        chosen.row.astype(np.int32),
        chosen.use,
    )


def no_others(job_count: int) -> Others:
    """Return none for every job."""
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return Others(np.zeros(job_count + 1, np.int64), none, none, none, nothing, np.zeros(1, np.int64), none, nothing)


def held_as(others: Others, choice: Choice) -> tuple[Index, Index]:
    """Return a choice as a state holds it: item and pool of each job, -1 where it holds nothing known."""
    single = choice.form == SINGLE
    item = np.where(single, choice.item, NONE).astype(np.int32)
    pool = np.where(single, choice.place, NONE).astype(np.int32)
    job = np.repeat(np.arange(len(others.start) - 1), np.diff(others.start))
    same = (choice.form[job] == others.form) & (choice.item[job] == others.item) & (choice.place[job] == others.place)
    item[job[same]] = np.flatnonzero(same)
    return item, pool


def new_scratch(instance: Instance, others: Others) -> Scratch:
    """Return room for the largest column."""
    widest = max(instance.slots + 2, int(np.diff(others.entry_start).max(initial=0)))
    return Scratch(np.zeros(SPAN_OUT, np.int64), np.zeros(widest, np.int32), np.zeros(widest, np.int64))


def choice_of(state: Occupancy, others: Others) -> Choice:
    """Return the columns that the jobs hold."""
    single = state.pool >= 0
    other = np.flatnonzero((state.item >= 0) & ~single)
    form = np.where(single, SINGLE, NONE).astype(np.int8)
    item, place = np.where(single, state.item, NONE).astype(np.int32), state.pool.copy()
    form[other] = others.form[state.item[other]]
    item[other] = others.item[state.item[other]]
    place[other] = others.place[state.item[other]]
    return Choice(form, item, place)


def welfare_of(instance: Instance, state: Occupancy) -> int:
    """Return the sum of the values held less the cost of the steps used."""
    return int(state.value.sum()) - int(steps_cost(instance.rows, state.use))


@compiled_loop
def steps_cost(rows: Rows, use: Int) -> int:
    """Return what the steps that `use` needs cost, over all rows."""
    total = np.int64(0)
    for row in range(len(use)):
        total += row_cost(rows, row, use[row])
    return total


@compiled_loop
def row_cost(rows: Rows, row: int, use: int) -> int:
    """Return what the steps of a row cost that `use` units need, cheapest first."""
    left = use - rows.base[row]
    cost = np.int64(0)
    step = rows.step_start[row]
    while left > 0 and step < rows.step_start[row + 1]:
        units = min(left, rows.step_units[step])
        cost += units * rows.step_cost[step]
        left -= units
        step += 1
    return cost


@compiled_loop
def column_uses(instance: Instance, others: Others, job: int, item: int, pool: int, scratch: Scratch) -> int:
    """Fill `scratch` with a column's value and uses; return how many rows it uses, -1 if it may not be."""
    jobs = instance.jobs
    count = 0
    if pool < 0:
        for entry in range(others.entry_start[item], others.entry_start[item + 1]):
            scratch.row[count] = others.row[entry]
            scratch.use[count] = others.use[entry]
            count += 1
        scratch.out[VALUE] = others.value[item]
        return count
    if not single_column(instance, job, item, pool, scratch.out):
        return -1
    good = instance.singles.good[item]
    gpus = instance.singles.gpus[item]
    first, end = instance.goods.first[good], instance.goods.end[good]
    for slot in range(first, end):
        scratch.row[count] = slot * len(instance.pools.site) + pool
        scratch.use[count] = gpus
        count += 1
    rate = scratch.out[CHARGE_MAX] + scratch.out[EGRESS] // np.int64(end - first)
    budget = budget_shares(jobs, job, max(np.int64(0), rate))
    if budget > 0:
        scratch.row[count] = jobs.budget_row[job]
        scratch.use[count] = budget
        count += 1
    if jobs.floor_row[job] >= 0:
        scratch.row[count] = jobs.floor_row[job]
        scratch.use[count] = -gpus
        count += 1
    return count


@compiled_loop
def fits(state: Occupancy, count: int, scratch: Scratch) -> bool:
    """Return whether the column in `scratch` can be taken as things stand."""
    for entry in range(count):
        row = scratch.row[entry]
        if scratch.use[entry] > 0 and not state.soft[row]:
            if state.use[row] + scratch.use[entry] > state.supply[row]:
                return False
    return True


@compiled_loop
def surplus_of(state: Occupancy, count: int, scratch: Scratch) -> float:
    """Return the surplus of the column in `scratch` at the published prices."""
    paid = 0.0
    for entry in range(count):
        paid += state.price[scratch.row[entry]] * scratch.use[entry]
    return scratch.out[VALUE] - paid


@compiled_loop
def shift(rows: Rows, state: Occupancy, count: int, scratch: Scratch, sign: int, weight: float) -> float:
    """Add `sign` times the uses in `scratch` to the rows; return what that takes from the standing."""
    taken = 0.0
    for entry in range(count):
        row = scratch.row[entry]
        units = sign * scratch.use[entry]
        before = state.use[row]
        state.use[row] = before + units
        if weight > 0.0:
            taken += weight * (row_cost(rows, row, before + units) - row_cost(rows, row, before))
        taken += (1.0 - weight) * state.price[row] * units
    return taken


@compiled_loop
def release(instance: Instance, others: Others, state: Occupancy, job: int, scratch: Scratch, weight: float) -> float:
    """Take a job's column away from it; return what its standing gains by that (mostly below 0)."""
    item, pool = np.int64(state.item[job]), np.int64(state.pool[job])
    if item < 0:
        return 0.0
    count = column_uses(instance, others, job, item, pool, scratch)
    gained = -float(state.value[job]) - shift(instance.rows, state, count, scratch, -1, weight)
    state.item[job] = NONE
    state.pool[job] = NONE
    state.value[job] = 0
    state.surplus[job] = 0.0
    return gained


@compiled_loop
def take(
    instance: Instance,
    others: Others,
    state: Occupancy,
    job: int,
    item: int,
    pool: int,
    scratch: Scratch,
    weight: float,
    must_fit: bool,
) -> float:
    """Give a column to a job that has none; return what the standing gains by that.

    With `must_fit` nothing happens where it does not fit, or may not be held.
    """
    if item < 0:
        return 0.0
    count = column_uses(instance, others, job, item, pool, scratch)
    if must_fit and (count < 0 or not fits(state, count, scratch)):
        return 0.0
    state.item[job] = item
    state.pool[job] = pool
    state.value[job] = scratch.out[VALUE]
    state.surplus[job] = surplus_of(state, count, scratch)
    return float(scratch.out[VALUE]) - shift(instance.rows, state, count, scratch, 1, weight)


@compiled_loop
def vacate(instance: Instance, others: Others, state: Occupancy, chosen: Int, scratch: Scratch) -> None:
    """Take the chosen jobs' columns away from them."""
    for job in chosen:
        release(instance, others, state, job, scratch, 1.0)


@compiled_loop
def seat(
    instance: Instance,
    others: Others,
    state: Occupancy,
    items: Index,
    pools: Index,
    forced: Flag,
    scratch: Scratch,
) -> int:
    """Give jobs without a column the one of `items` and `pools` where it fits; return how many it gave.

    `forced` are seated whether it fits or not: incumbents inside their term in their own place.
    """
    seated = 0
    for job in range(len(items)):
        item = np.int64(items[job])
        if item < 0 or state.item[job] >= 0:
            continue
        take(instance, others, state, job, item, np.int64(pools[job]), scratch, 1.0, not forced[job])
        if state.item[job] >= 0:
            seated += 1
    return seated
