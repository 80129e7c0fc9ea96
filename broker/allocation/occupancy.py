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

from typing import NamedTuple

import numpy as np

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import (
    BUNDLE,
    NONE,
    SINGLE,
    SPAN_SITES_MAX,
    Choice,
    Flag,
    Index,
    Instance,
    Int,
    Real,
    Rows,
)
from broker.allocation.kernel import (
    CHARGE_MAX,
    EGRESS,
    PART_FIELDS,
    PARTS,
    SPAN_OUT,
    VALUE,
    budget_shares,
    single_column,
    span_column,
)


class Occupancy(NamedTuple):
    """A state of the search. `supply` and `soft` (floors) are fixed, the others change in place.

    `price` is the published price of every row, as float64. `surplus` is each job's at those
    prices, 0 where it has no column.
    """

    price: Real
    supply: Int
    soft: Flag
    use: Int
    form: Index
    item: Index
    place: Index
    value: Int
    surplus: Real


class Scratch(NamedTuple):
    """Room for one column: the kernel's `out`, the rows it uses, and how much of each."""

    out: Int
    row: Index
    use: Int


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
        form=np.full(count, NONE, dtype=np.int32),
        item=np.full(count, NONE, dtype=np.int32),
        place=np.full(count, NONE, dtype=np.int32),
        value=np.zeros(count, dtype=np.int64),
        surplus=np.zeros(count, dtype=np.float64),
    )


def copy_into(target: Occupancy, source: Occupancy) -> None:
    """Make `target` the same state as `source`, of the same instance."""
    for mine, theirs in zip(target, source, strict=True):
        np.copyto(np.asarray(mine), np.asarray(theirs))


def new_scratch(instance: Instance) -> Scratch:
    """Return room for the largest column of an instance."""
    widest = instance.slots * SPAN_SITES_MAX + 2 * SPAN_SITES_MAX + 2
    if len(instance.bundles.value):
        widest = max(widest, int(np.diff(instance.bundles.entry_start).max()))
    return Scratch(np.zeros(SPAN_OUT, np.int64), np.zeros(widest, np.int32), np.zeros(widest, np.int64))


def choice_of(state: Occupancy) -> Choice:
    """Return the columns that the jobs hold."""
    return Choice(state.form.astype(np.int8), state.item.copy(), state.place.copy())


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
def column_uses(instance: Instance, job: int, form: int, item: int, place: int, scratch: Scratch) -> int:
    """Fill `scratch` with a column's value and uses; return how many rows it uses, -1 if it may not be."""
    jobs, pools = instance.jobs, len(instance.pools.site)
    count = 0
    if form == BUNDLE:
        bundles = instance.bundles
        for entry in range(bundles.entry_start[item], bundles.entry_start[item + 1]):
            scratch.row[count] = bundles.entry_row[entry]
            scratch.use[count] = bundles.entry_use[entry]
            count += 1
        scratch.out[VALUE] = bundles.value[item]
        scratch.out[CHARGE_MAX] = bundles.charge_max[item]
        return count
    if form == SINGLE:
        if not single_column(instance, job, item, place, scratch.out):
            return -1
        good = instance.singles.good[item]
        gpus = instance.singles.gpus[item]
        first, end = instance.goods.first[good], instance.goods.end[good]
        for slot in range(first, end):
            scratch.row[count] = slot * pools + place
            scratch.use[count] = gpus
            count += 1
        slots = np.int64(end - first)
    else:
        if span_column(instance, job, item, place, scratch.out) <= 0.0:
            return -1
        gpus = instance.spans.gpus[item]
        slots = np.int64(instance.spans.slots[item])
        patterns = instance.patterns
        for part in range(patterns.parts[place]):
            field = PARTS + part * PART_FIELDS
            for slot in range(slots):
                scratch.row[count] = slot * pools + patterns.pool[place, part]
                scratch.use[count] = scratch.out[field]
                count += 1
            for direction in range(2):
                link = patterns.up[place, part] if direction == 0 else patterns.down[place, part]
                shares = scratch.out[field + 2 + 2 * direction]
                if link >= 0 and shares > 0:
                    scratch.row[count] = instance.links.first_row + link
                    scratch.use[count] = shares
                    count += 1
    budget = budget_shares(jobs, job, max(np.int64(0), scratch.out[CHARGE_MAX] + scratch.out[EGRESS] // slots))
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
def release(instance: Instance, state: Occupancy, job: int, scratch: Scratch, weight: float) -> float:
    """Take a job's column away from it; return what its standing gains by that (mostly below 0)."""
    if state.form[job] == NONE:
        return 0.0
    count = column_uses(instance, job, state.form[job], state.item[job], state.place[job], scratch)
    gained = -float(state.value[job]) - shift(instance.rows, state, count, scratch, -1, weight)
    state.form[job] = NONE
    state.item[job] = NONE
    state.place[job] = NONE
    state.value[job] = 0
    state.surplus[job] = 0.0
    return gained


@compiled_loop
def take(
    instance: Instance, state: Occupancy, job: int, form: int, item: int, place: int, scratch: Scratch, weight: float
) -> float:
    """Give a column to a job that has none, fits or not; return what the standing gains by that."""
    if form == NONE:
        return 0.0
    count = column_uses(instance, job, form, item, place, scratch)
    state.form[job] = form
    state.item[job] = item
    state.place[job] = place
    state.value[job] = scratch.out[VALUE]
    state.surplus[job] = surplus_of(state, count, scratch)
    return float(scratch.out[VALUE]) - shift(instance.rows, state, count, scratch, 1, weight)


@compiled_loop
def can_take(
    instance: Instance, state: Occupancy, job: int, form: int, item: int, place: int, scratch: Scratch
) -> bool:
    """Return whether a job that has none may hold this column as things stand."""
    count = column_uses(instance, job, form, item, place, scratch)
    return count >= 0 and fits(state, count, scratch)


@compiled_loop
def seat(instance: Instance, state: Occupancy, choice: Choice, scratch: Scratch) -> int:
    """Give every job without a column its column of `choice` where it fits; return how many it gave.

    Incumbents inside their term sit in their own place, fits or not.
    """
    seated = 0
    for job in range(len(choice.form)):
        form, item, place = np.int64(choice.form[job]), choice.item[job], choice.place[job]
        if form == NONE or state.form[job] != NONE:
            continue
        own = instance.jobs.must[job] and form == BUNDLE and item == instance.jobs.own[job]
        if own or can_take(instance, state, job, form, item, place, scratch):
            take(instance, state, job, form, item, place, scratch, 1.0)
            seated += 1
    return seated
