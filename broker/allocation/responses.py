"""Best responses: every job in turn takes the best column at prices that still fits.

`best_of` is exact and stops early: the pools of a good are tried by rising price, and no further one
can help once even free data could not make it better. `rounding` first lets the jobs without a place
choose, then lets those move that could do better (both `improve`).
`knapsack` asks here where a job would go if it lost its place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import SINGLE, TIERS, Index, Instance, Int, Jobs, Real, Rows, Sites
from broker.allocation.kernel import budget_shares, ceil_rate, column_key, is_barred
from broker.allocation.occupancy import Occupancy, Others, Scratch, release, row_cost, take

# A gain in micro-credits per hour below which a move is not one: floats sum whole numbers here.
LEAST_GAIN = 0.5


class Offers(NamedTuple):
    """Pools of every good by rising price, listed once per *scope*: the world, a continent, a region, a site.

    Those of good g in scope s are start[g x scopes + s] up to the next start; `unit` is the price
    of one GPU in all the good's slots.
    """

    scopes: int
    continents: int
    regions: int
    start: Int
    pool: Index
    limit: Int
    unit: Real
    limit_max: Int


def priced_offers(instance: Instance, prices: Real) -> Offers:
    """Return the offers of every good and scope sorted by the price of one GPU in all the good's slots."""
    goods, sites, pools = instance.goods, instance.sites, instance.pool_count
    good = np.repeat(np.arange(len(goods.kind)), np.diff(goods.offer_start))
    by_slot = prices[: instance.slots * pools].reshape(instance.slots, pools)
    summed = np.concatenate([np.zeros((1, pools)), np.cumsum(by_slot, axis=0)])
    unit = summed[goods.end[good], goods.offer_pool] - summed[goods.first[good], goods.offer_pool]
    continents = int(sites.continent.max(initial=-1)) + 1
    regions = int(sites.region.max(initial=-1)) + 1
    scopes = 1 + continents + regions + len(sites.region)
    site = instance.pools.site[goods.offer_pool].astype(np.int64)
    continent, region = sites.continent[site], sites.region[site]
    of_scope = [
        np.zeros(len(site), np.int64),
        np.where(continent >= 0, 1 + continent, -1),
        np.where(region >= 0, 1 + continents + region, -1),
        1 + continents + regions + site,
    ]
    cell = np.concatenate([np.where(scope >= 0, good * scopes + scope, -1) for scope in of_scope])
    offer = np.tile(np.arange(len(site)), len(of_scope))[cell >= 0]
    cell = cell[cell >= 0]
    order = np.lexsort((goods.offer_pool[offer], unit[offer], cell))
    offer_of_cell, offer = offer, offer[order]
    start = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(goods.kind) * scopes))])
    limit_max = np.zeros(len(start) - 1, np.int64)
    np.maximum.at(limit_max, cell, goods.offer_limit[offer_of_cell])
    return Offers(
        scopes, continents, regions, start, goods.offer_pool[offer], goods.offer_limit[offer], unit[offer], limit_max
    )


@compiled_loop
def scope_of(sites: Sites, offers: Offers, home: int, tier: int) -> int:
    """Return the scope that holds all sites of a tier around a home (and nearer ones), -1 where there are none."""
    if home < 0:
        return 0 if tier == 0 else -1
    if tier == 0:
        return 1 + offers.continents + offers.regions + home
    if tier == 1:
        return 1 + offers.continents + sites.region[home] if sites.region[home] >= 0 else -1
    if tier == 2:
        return 1 + sites.continent[home] if sites.continent[home] >= 0 else -1
    return 0


@compiled_loop
def is_nearer(sites: Sites, home: int, site: int, tier: int) -> bool:
    """Return whether a site of a tier's scope is of a nearer tier than that one."""
    if home < 0 or tier == 0:
        return False
    if site == home:
        return True
    if tier == 1:
        return False
    if sites.region[home] >= 0 and sites.region[site] == sites.region[home]:
        return True
    return tier == 3 and sites.continent[home] >= 0 and sites.continent[site] == sites.continent[home]


@compiled_loop
def free_in(state: Occupancy, pools: int, first: int, end: int, pool: int) -> int:
    """Return the GPUs that a pool has free in every slot from `first` up to `end`."""
    row = first * pools + pool
    free = state.supply[row] - state.use[row]
    for slot in range(first + 1, end):
        row = slot * pools + pool
        free = min(free, state.supply[row] - state.use[row])
    return free


@compiled_loop
def may_sit(instance: Instance, job: int, item: int, pool: int) -> bool:
    """Return whether a job's site list and the sites' vetoes allow a single at a pool of an allowed tier."""
    jobs = instance.jobs
    chosen = jobs.site_set[job]
    if chosen >= 0:
        site = instance.pools.site[pool]
        if (instance.site_sets[chosen, site >> 6] >> np.uint64(site & 63)) & np.uint64(1) == 0:
            return False
    return not is_barred(jobs, job, column_key(SINGLE, item, pool))


@compiled_loop
def single_shares(jobs: Jobs, job: int, value: int, slots: int) -> int:
    """Return the shares of its tenant's budget that a single of this value before egress uses."""
    rate = value // slots - (jobs.locked[job] if jobs.must[job] else 0)
    return budget_shares(jobs, job, max(np.int64(0), rate))


@compiled_loop
def best_of(
    instance: Instance,
    others: Others,
    state: Occupancy,
    offers: Offers,
    prices: Real,
    job: int,
    skip: int,
    bounded: bool,
    least: float,
) -> tuple[float, int, int]:
    """Return surplus, item and pool of a job's best column above `least`; item -1 where there is none.

    `bounded` leaves out what does not fit as things stand; `skip` is a pool to leave out, or -1.
    The arithmetic is `kernel.single_column`'s, taken apart so that most pools cost one comparison.
    """
    jobs, singles, goods, sites = instance.jobs, instance.singles, instance.goods, instance.sites
    pool_site = instance.pools.site
    pools = len(pool_site)
    home = jobs.home[job]
    best, best_item, best_pool = least, np.int64(-1), np.int64(-1)
    floor_price = prices[jobs.floor_row[job]] if jobs.floor_row[job] >= 0 else 0.0
    budget = jobs.budget_row[job]
    choosy = jobs.site_set[job] >= 0 or jobs.barred_start[job] < jobs.barred_start[job + 1]
    for tier in range(TIERS):
        tier_price = jobs.tier_price[job, tier]
        scope = scope_of(sites, offers, home, tier) if tier_price >= 0 else -1
        if scope < 0:
            continue
        for item in range(singles.start[job], singles.start[job + 1]):
            good, gpus = singles.good[item], singles.gpus[item]
            index = good * offers.scopes + scope
            entry, last = offers.start[index], offers.start[index + 1]
            if entry == last or gpus > offers.limit_max[index]:
                continue
            first, end = goods.first[good], goods.end[good]
            ceiling = singles.value[item] + gpus * floor_price
            if ceiling - gpus * offers.unit[entry] <= best:
                continue
            # The egress of this tier, as `kernel.data_egress_rate` has it.
            data = ceil_rate(float(singles.data_bytes_per_s[item]) * 3600.0 * float(tier_price) / 1e9)
            ceiling -= data * np.int64(end - first)
            while entry < last:
                unit = offers.unit[entry]
                if ceiling - gpus * unit <= best:
                    break
                pool = np.int64(offers.pool[entry])
                entry += 1
                if gpus > offers.limit[entry - 1] or pool == skip:
                    continue
                if bounded and free_in(state, pools, first, end, pool) < gpus:
                    continue
                if is_nearer(sites, home, pool_site[pool], tier):
                    continue
                if choosy and not may_sit(instance, job, item, pool):
                    continue
                surplus = ceiling - gpus * unit
                if budget >= 0:
                    shares = single_shares(jobs, job, singles.value[item], np.int64(end - first))
                    if bounded and shares > 0 and state.use[budget] + shares > state.supply[budget]:
                        break
                    surplus -= shares * prices[budget]
                if surplus > best:
                    best, best_item, best_pool = surplus, np.int64(item), pool
    for column in range(others.start[job], others.start[job + 1]):
        surplus = float(others.value[column])
        fitting = True
        for entry in range(others.entry_start[column], others.entry_start[column + 1]):
            row, use = others.row[entry], others.use[entry]
            surplus -= prices[row] * use
            if bounded and use > 0 and not state.soft[row] and state.use[row] + use > state.supply[row]:
                fitting = False
        if fitting and surplus > best:
            best, best_item, best_pool = surplus, np.int64(column), np.int64(-1)
    return best, best_item, best_pool


@compiled_loop
def best_singles(
    instance: Instance, nothing: Others, state: Occupancy, offers: Offers, chosen: Int, surplus: Real
) -> None:
    """Fill the surplus of the best single of every chosen job were all capacity free, at least 0."""
    for index in range(len(chosen)):
        surplus[index] = best_of(instance, nothing, state, offers, state.price, chosen[index], -1, False, 0.0)[0]


@compiled_loop
def improve(
    instance: Instance,
    others: Others,
    state: Occupancy,
    order: Int,
    offers: Offers,
    prices: Real,
    weight: float,
    vacant: bool,
    scratch: Scratch,
) -> int:
    """Move jobs of `order` one by one where their standing gains; return how many moved.

    Columns are looked for at `prices` and judged by what they really gain. With `vacant`, only jobs
    without a place choose, and take what is worth its price, whatever the standing gains.
    """
    moved = 0
    for job in order:
        item, pool = np.int64(state.item[job]), np.int64(state.pool[job])
        if vacant and item >= 0:
            continue
        gain = release(instance, others, state, job, scratch, weight)
        least = 0.0 if vacant else -np.inf
        _, new_item, new_pool = best_of(instance, others, state, offers, prices, job, -1, True, least)
        if new_item >= 0 and (new_item != item or new_pool != pool):
            gain += take(instance, others, state, job, new_item, new_pool, scratch, weight, False)
            if vacant or gain > LEAST_GAIN:
                moved += 1
                continue
            release(instance, others, state, job, scratch, weight)
        take(instance, others, state, job, item, pool, scratch, weight, False)
    return moved


def marginal_prices(rows: Rows, state: Occupancy, weight: float) -> Real:
    """Return what one more unit of every row takes from the standing."""
    prices = np.empty(len(state.use))
    _fill_marginal_prices(rows, state, weight, prices)
    return prices


@compiled_loop
def _fill_marginal_prices(rows: Rows, state: Occupancy, weight: float, prices: Real) -> None:
    for row in range(len(state.use)):
        use = state.use[row]
        if state.soft[row]:
            # A floor's units are given, not taken.
            cost = row_cost(rows, row, use) - row_cost(rows, row, use - 1)
        else:
            cost = row_cost(rows, row, use + 1) - row_cost(rows, row, use)
        prices[row] = weight * cost + (1.0 - weight) * state.price[row]
