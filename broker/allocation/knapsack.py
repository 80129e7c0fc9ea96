"""Who sits in a pool, chosen anew: a multiple-choice knapsack for one pool after the other.

A *cell* is a pool in one window of slots. Contestants for it are the jobs that sit there in one of
their singles, and *suitors*: jobs that would rather be there than where they are. Every contestant
has its options there (GPU counts) and an alternative: a suitor's is where it is now, that of one
who sits there is the best place that is free elsewhere, or none. Dynamic programming over the
cell's GPUs finds the best set exactly. Budgets, and losers that want the same free place, are
outside of it: so the change is carried out, what it really gains is summed, and it is taken back
where that is nothing.

All effort is bounded by counts. `responses` finds the alternatives, `occupancy` keeps the books.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import TIERS, Goods, Index, Instance, Int, Real, Rows
from broker.allocation.kernel import VALUE, ceil_rate, single_column
from broker.allocation.occupancy import Occupancy, Others, Scratch, release, take
from broker.allocation.responses import (
    LEAST_GAIN,
    Offers,
    best_of,
    free_in,
    is_nearer,
    may_sit,
    scope_of,
    single_shares,
)

# Contestants of one cell: those who sit there with least to lose, and suitors with most to gain.
SEATED_MAX: Final = 96
SUITORS_MAX: Final = 32
OPTIONS_MAX: Final = 8
# GPUs of a cell that are dealt anew at a time.
UNITS_MAX: Final = 2048
# Cells that one job may be a suitor of in one sweep.
CELLS_PER_SUITOR: Final = 24


class Cells(NamedTuple):
    """Windows of slots and their cells: cell window x pools + pool. `price` of a GPU in all its slots.

    `window` is that of each good; `credit` is what a GPU used in the cell takes from the standing.
    """

    window: Index
    price: Real


class Lists(NamedTuple):
    """Jobs by cell: those of cell c are job[start[c]] up to job[start[c + 1]]."""

    start: Int
    job: Index


def cells_of(instance: Instance, prices: Real) -> Cells:
    """Return the cells of an instance at published prices."""
    goods, pools = instance.goods, instance.pool_count
    names = np.stack([goods.first, goods.end], axis=1)
    windows, window = np.unique(names, axis=0, return_inverse=True)
    by_slot = prices[: instance.slots * pools].reshape(instance.slots, pools)
    summed = np.concatenate([np.zeros((1, pools)), np.cumsum(by_slot, axis=0)])
    price = summed[windows[:, 1]] - summed[windows[:, 0]] if len(windows) else np.zeros((0, pools))
    return Cells(window.reshape(-1).astype(np.int32), price.reshape(-1))


def seated_by_cell(instance: Instance, state: Occupancy, cells: Cells) -> Lists:
    """Return who sits where in a single."""
    jobs = np.flatnonzero(state.pool >= 0)
    window = cells.window[instance.singles.good[state.item[jobs]]]
    return _listed(cells, window.astype(np.int64) * instance.pool_count + state.pool[jobs], jobs)


def suitors_by_cell(
    instance: Instance, state: Occupancy, cells: Cells, offers: Offers, regret: Real, regret_min: float
) -> Lists:
    """Return by cell who regrets where it is by more than `regret_min` and would gain most in this cell."""
    regretful = np.flatnonzero(regret > regret_min)
    room = len(regretful) * CELLS_PER_SUITOR
    cell_of, jobs = np.empty(room, np.int64), np.empty(room, np.int64)
    gains, found = np.empty(CELLS_PER_SUITOR), np.empty(CELLS_PER_SUITOR, np.int64)
    used = _find_cells(instance, state, cells, offers, regretful, regret_min, gains, found, cell_of, jobs)
    return _listed(cells, cell_of[:used], jobs[:used])


def _listed(cells: Cells, cell_of: Int, jobs: Int) -> Lists:
    order = np.argsort(cell_of, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(cell_of, minlength=len(cells.price)))])
    return Lists(start.astype(np.int64), jobs[order].astype(np.int32))


@compiled_loop
def _find_cells(
    instance: Instance,
    state: Occupancy,
    cells: Cells,
    offers: Offers,
    regretful: Int,
    regret_min: float,
    gains: Real,
    found_cells: Int,
    pairs_cell: Int,
    pairs_job: Int,
) -> int:
    used = 0
    pools = len(instance.pools.site)
    jobs, singles, goods, sites = instance.jobs, instance.singles, instance.goods, instance.sites
    pool_site = instance.pools.site
    for job in regretful:
        count = 0
        least = max(state.surplus[job], 0.0) + regret_min
        floor = jobs.floor_row[job]
        bonus = state.price[floor] if floor >= 0 else 0.0
        home, budget = jobs.home[job], jobs.budget_row[job]
        choosy = jobs.site_set[job] >= 0 or jobs.barred_start[job] < jobs.barred_start[job + 1]
        for tier in range(TIERS):
            tier_price = jobs.tier_price[job, tier]
            scope = scope_of(sites, offers, home, tier) if tier_price >= 0 else -1
            if scope < 0:
                continue
            for item in range(singles.start[job], singles.start[job + 1]):
                good, gpus = singles.good[item], singles.gpus[item]
                index = good * offers.scopes + scope
                first, last = offers.start[index], offers.start[index + 1]
                if first == last or gpus > offers.limit_max[index]:
                    continue
                ceiling = singles.value[item] + gpus * bonus
                data = ceil_rate(float(singles.data_bytes_per_s[item]) * 3600.0 * float(tier_price) / 1e9)
                ceiling -= data * np.int64(goods.end[good] - goods.first[good])
                for offer in range(first, last):
                    unit = offers.unit[offer]
                    if ceiling - gpus * unit <= least:
                        break
                    pool = np.int64(offers.pool[offer])
                    if gpus > offers.limit[offer] or is_nearer(sites, home, pool_site[pool], tier):
                        continue
                    if choosy and not may_sit(instance, job, item, pool):
                        continue
                    surplus = ceiling - gpus * unit
                    if budget >= 0:
                        slots = goods.end[good] - goods.first[good]
                        surplus -= single_shares(jobs, job, singles.value[item], slots) * state.price[budget]
                    if surplus <= least:
                        continue
                    cell = cells.window[good] * pools + pool
                    # A cell once per job, with the best of its options; the list is kept best first.
                    place = -1
                    for other in range(count):
                        if found_cells[other] == cell:
                            place = other
                    if place >= 0 and gains[place] >= surplus:
                        continue
                    if place < 0:
                        if count < CELLS_PER_SUITOR:
                            count += 1
                        place = count - 1
                    while place > 0 and gains[place - 1] < surplus:
                        gains[place] = gains[place - 1]
                        found_cells[place] = found_cells[place - 1]
                        place -= 1
                    gains[place] = surplus
                    found_cells[place] = cell
                    if count == CELLS_PER_SUITOR:
                        least = max(least, gains[count - 1])
        for other in range(count):
            pairs_cell[used] = found_cells[other]
            pairs_job[used] = job
            used += 1
    return used


class Desk(NamedTuple):
    """Room for the contestants of one cell, their options, and the table of the dynamic programme."""

    who: Int
    old: Int
    fallback: Real
    option_item: Int
    option_gpus: Int
    option_worth: Real
    options: Int
    picked: Int
    chosen: NDArray[np.int8]
    table: Real


def new_desk() -> Desk:
    """Return room for the largest cell."""
    most = SEATED_MAX + SUITORS_MAX
    return Desk(
        who=np.empty(most, np.int64),
        old=np.empty((most, 2), np.int64),
        fallback=np.empty(most),
        option_item=np.empty((most, OPTIONS_MAX), np.int64),
        option_gpus=np.empty((most, OPTIONS_MAX), np.int64),
        option_worth=np.empty((most, OPTIONS_MAX)),
        options=np.empty(most, np.int64),
        picked=np.empty(most, np.int64),
        chosen=np.empty((most, UNITS_MAX + 1), np.int8),
        table=np.empty(UNITS_MAX + 1),
    )


@compiled_loop
def sweep(
    instance: Instance,
    others: Others,
    state: Occupancy,
    cells: Cells,
    seated: Lists,
    suitors: Lists,
    order: Int,
    offers: Offers,
    weight: float,
    scratch: Scratch,
    desk: Desk,
) -> int:
    """Choose anew who sits in each cell of `order`; return how many cells changed."""
    pools = len(instance.pools.site)
    jobs, singles, goods = instance.jobs, instance.singles, instance.goods
    who, old, fallback, options, picked = desk.who, desk.old, desk.fallback, desk.options, desk.picked
    option_item, option_gpus, option_worth = desk.option_item, desk.option_gpus, desk.option_worth
    chosen, table = desk.chosen, desk.table
    changed = 0
    for cell in order:
        window, pool = cell // pools, cell % pools
        courted = suitors.start[cell] < suitors.start[cell + 1]
        # Who sits here, and the window's good of each.
        count, units = 0, np.int64(0)
        good = -1
        for entry in range(seated.start[cell], seated.start[cell + 1]):
            job = np.int64(seated.job[entry])
            if state.pool[job] != pool:
                continue
            here = singles.good[state.item[job]]
            if cells.window[here] != window:
                continue
            good = here
            gpus = singles.gpus[state.item[job]]
            if count < SEATED_MAX and units + gpus <= UNITS_MAX:
                who[count] = job
                count += 1
                units += gpus
        sitting = count
        for entry in range(suitors.start[cell], suitors.start[cell + 1]):
            if count < sitting + SUITORS_MAX:
                job = np.int64(suitors.job[entry])
                if state.pool[job] == pool:
                    continue
                who[count] = job
                count += 1
        if count == 0:
            continue
        if good < 0:
            for item in range(singles.start[who[0]], singles.start[who[0] + 1]):
                here = singles.good[item]
                if cells.window[here] == window and instance.pools.kind[pool] == goods.kind[here]:
                    good = here
        if good < 0:
            continue
        free = free_in(state, pools, goods.first[good], goods.end[good], pool)
        if not courted and free <= 0:
            continue
        # What a GPU here takes from the standing: price and the dearest step sold, by weight.
        unit = 0.0
        for slot in range(goods.first[good], goods.end[good]):
            row = slot * pools + pool
            unit += (1.0 - weight) * state.price[row]
            if weight > 0.0:
                unit += weight * _top_cost(instance.rows, state, row)
        gain = 0.0
        for index in range(count):
            job = who[index]
            old[index, 0], old[index, 1] = state.item[job], state.pool[job]
            if index < sitting:
                gain += release(instance, others, state, job, scratch, weight)
        units = max(
            np.int64(0), min(free_in(state, pools, goods.first[good], goods.end[good], pool), np.int64(UNITS_MAX))
        )
        for index in range(count):
            job = who[index]
            if index < sitting:
                least = -np.inf if jobs.must[job] else 0.0
                _, item, place = best_of(instance, others, state, offers, state.price, job, pool, True, least)
                fallback[index] = least
                if item >= 0:
                    fallback[index] = take(instance, others, state, job, item, place, scratch, weight, False)
                    release(instance, others, state, job, scratch, weight)
            else:
                fallback[index] = -release(instance, others, state, job, scratch, weight)
                take(instance, others, state, job, old[index, 0], old[index, 1], scratch, weight, False)
            # Options here.
            here_count = 0
            floor = jobs.floor_row[job]
            bonus = state.price[floor] if floor >= 0 else 0.0
            for item in range(singles.start[job], singles.start[job + 1]):
                other = singles.good[item]
                if cells.window[other] != window or goods.kind[other] != goods.kind[good] or here_count == OPTIONS_MAX:
                    continue
                gpus = singles.gpus[item]
                if gpus > units or gpus > _limit_at(goods, other, pool):
                    continue
                if not single_column(instance, job, item, pool, scratch.out):
                    continue
                worth = scratch.out[VALUE] + gpus * (bonus - unit)
                if jobs.budget_row[job] >= 0:
                    slots = goods.end[other] - goods.first[other]
                    worth -= single_shares(jobs, job, singles.value[item], slots) * state.price[jobs.budget_row[job]]
                if worth <= fallback[index]:
                    continue
                option_item[index, here_count] = item
                option_gpus[index, here_count] = gpus
                option_worth[index, here_count] = worth
                here_count += 1
            options[index] = here_count
        # The knapsack: table[c] is the most that c GPUs yield over everyone's alternative.
        for used in range(units + 1):
            table[used] = 0.0
        for index in range(count):
            base = fallback[index] if fallback[index] > -np.inf else -1e18
            for used in range(units, -1, -1):
                top, pick = table[used], -1
                for option in range(options[index]):
                    gpus = option_gpus[index, option]
                    if gpus <= used:
                        value = table[used - gpus] + option_worth[index, option] - base
                        if value > top:
                            top, pick = value, option
                table[used] = top
                chosen[index, used] = pick
        left = units
        same = True
        for index in range(count - 1, -1, -1):
            picked[index] = chosen[index, left]
            if picked[index] >= 0:
                left -= option_gpus[index, picked[index]]
            if index < sitting:
                same = same and picked[index] >= 0 and option_item[index, picked[index]] == old[index, 0]
            else:
                same = same and picked[index] < 0
        if same:
            for index in range(sitting):
                take(instance, others, state, who[index], old[index, 0], old[index, 1], scratch, weight, False)
            continue
        # Carry it out: winners sit down, then the others look for what is left.
        for index in range(count):
            if picked[index] < 0:
                continue
            job, item = who[index], option_item[index, picked[index]]
            if index >= sitting:
                gain += release(instance, others, state, job, scratch, weight)
            gain += take(instance, others, state, job, item, pool, scratch, weight, True)
            if index >= sitting and state.item[job] < 0:
                gain += take(instance, others, state, job, old[index, 0], old[index, 1], scratch, weight, False)
        whole = True
        for index in range(sitting):
            job = who[index]
            if state.item[job] >= 0:
                continue
            least = -np.inf if jobs.must[job] else 0.0
            _, item, place = best_of(instance, others, state, offers, state.price, job, -1, True, least)
            gain += take(instance, others, state, job, item, place, scratch, weight, False)
            whole = whole and (item >= 0 or not jobs.must[job])
        if whole and gain > LEAST_GAIN:
            changed += 1
            continue
        for index in range(count):
            release(instance, others, state, who[index], scratch, weight)
        for index in range(count):
            take(instance, others, state, who[index], old[index, 0], old[index, 1], scratch, weight, False)
    return changed


@compiled_loop
def _top_cost(rows: Rows, state: Occupancy, row: int) -> float:
    """Return the cost of the dearest step of a row that is sold at the published price."""
    cost = 0.0
    for step in range(rows.step_start[row], rows.step_start[row + 1]):
        if rows.step_cost[step] <= state.price[row]:
            cost = float(rows.step_cost[step])
    return cost


@compiled_loop
def _limit_at(goods: Goods, good: int, pool: int) -> int:
    """Return the most GPUs of a good that one job may take in a pool, 0 where it is not offered."""
    low, high = goods.offer_start[good], goods.offer_start[good + 1]
    while low < high:
        middle = (low + high) // 2
        if goods.offer_pool[middle] < pool:
            low = middle + 1
        else:
            high = middle
    if low < goods.offer_start[good + 1] and goods.offer_pool[low] == pool:
        return goods.offer_limit[low]
    return np.int64(0)
