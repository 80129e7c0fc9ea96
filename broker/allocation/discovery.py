"""Prices to start from, before any LP: last round's, or those of a smoothed market played out.

What must be known is not the price of every pool but what a GPU of each kind costs in each part of the
world: pools behind one market node clear at nearly one price. So the play is on *areas*, one per kind
and region (or site in no region): an area's supply is its pools' ask curves, smoothed; its demand comes
from every job's logit choice among its singles in each tier, spread over the areas of the tier by
price and size. Each pass moves every price by its excess demand; smoothing and step are annealed, and
the first passes play a part of the jobs. Any result is valid, since the proof prices every column.
Spans, site lists, budgets and floors are not played.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import Instance, Int, Real
from broker.allocation.oracle import Layout, scope_of

# In pass n every THINNING[n]-th job plays, with that many times its demand.
_THINNING: Final = (8,) * 16 + (4,) * 12 + (2,) * 8 + (1,) * 6
_THINNED_JOBS_MIN: Final = 2_000
# First and last of each annealed quantity: the heat of choices relative to a job's value, of areas
# and of asks relative to price, and the step of a price per unit of log(demand / supply).
_CHOICE_HEAT: Final = (0.05, 0.002)
_PRICE_HEAT: Final = (0.06, 0.003)
_STEP: Final = (0.3, 0.015)
_MOMENTUM: Final = 0.5
_EXCESS_MAX: Final = 0.7


def start_prices(instance: Instance, layout: Layout, last: Real | None) -> Real:
    """Return prices [rows] near the LP's: `last` where given; none below a pool's first ask."""
    rows = instance.rows
    has_steps = rows.step_start[:-1] < rows.step_start[1:]
    floor = np.zeros(instance.row_count)
    floor[has_steps] = rows.step_cost[rows.step_start[:-1][has_steps]]
    floor[instance.links.first_row :] = 0.0
    if last is not None:
        return np.maximum(last.astype(np.float64), floor)
    if not len(instance.singles.good) or not instance.pool_count:
        return floor
    area = _areas(instance)
    price = _play_out(instance, layout, area)
    y = np.maximum(np.tile(price[area], instance.slots), floor[: instance.pool_count * instance.slots])
    return np.concatenate([y, np.zeros(instance.row_count - len(y))])


def _play_out(instance: Instance, layout: Layout, area: Int) -> Real:
    """Return the price of each area after all passes."""
    rows, goods, pool_count = instance.rows, instance.goods, instance.pool_count
    count = int(area.max()) + 1
    step_area = area[np.repeat(np.arange(pool_count), np.diff(rows.step_start[: pool_count + 1]))]
    units = rows.step_units[: len(step_area)].astype(np.float64)
    cost = np.maximum(rows.step_cost[: len(step_area)].astype(np.float64), 1.0)
    least = np.full(count, np.inf)
    np.minimum.at(least, step_area, cost)
    least[np.isinf(least)] = 1.0
    free = np.bincount(area, np.maximum(rows.base[:pool_count], 0), minlength=count)
    size = np.bincount(step_area, units, minlength=count) + free
    kind = np.zeros(count, np.int64)
    kind[area] = instance.pools.kind
    cells = len(layout.start) - 1
    cell = np.repeat(np.arange(cells), np.diff(layout.start))
    inside = np.zeros((cells, count))
    inside[cell, area[goods.offer_pool[layout.offer]]] = 1.0
    # Cells that nothing offers, or nobody can ask for, are left out of the sums.
    live = np.flatnonzero(inside.any(axis=1))
    inside = inside[live]
    largest = np.zeros(instance.job_count)
    np.maximum.at(
        largest, np.repeat(np.arange(instance.job_count), np.diff(instance.singles.start)), instance.singles.value
    )
    slots = (goods.end - goods.first).astype(np.float64)
    price, speed = least * 1.2, np.zeros(count)
    cell_price, demand = np.zeros(cells), np.zeros(cells)
    passes = len(_THINNING)
    for number, thinning in enumerate(_THINNING):
        along = number / (passes - 1)
        price_heat = _between(_PRICE_HEAT, along)
        if instance.job_count < _THINNED_JOBS_MIN:
            thinning = 1
        weight = size * _cheapness(price, kind, price_heat)
        mass = inside @ weight
        cell_price[live] = (inside @ (weight * price)) / np.maximum(mass, 1e-300)
        demand[:] = 0.0
        _choose(
            instance,
            layout,
            cell_price,
            slots,
            largest,
            demand,
            number % thinning,
            thinning,
            _between(_CHOICE_HEAT, along),
        )
        wanted = weight * (inside.T @ (demand[live] / np.maximum(mass, 1e-300)))
        offered = free + np.bincount(
            step_area,
            units / (1.0 + np.exp(np.clip((cost - price[step_area]) / (price_heat * cost), -40.0, 40.0))),
            minlength=count,
        )
        excess = np.clip(
            np.log((wanted + 0.02 * size + 1e-9) / (offered + 0.02 * size + 1e-9)), -_EXCESS_MAX, _EXCESS_MAX
        )
        speed = _MOMENTUM * speed + _between(_STEP, along) * excess
        price = np.maximum(price * np.exp(speed), least * 0.97)
    return np.maximum(price, least)


def _cheapness(price: Real, kind: NDArray[np.int64], heat: float) -> Real:
    """Return exp(-log price / heat) relative to the cheapest area of the same kind; kinds share no cell."""
    cheapest = np.full(int(kind.max()) + 1, np.inf)
    np.minimum.at(cheapest, kind, price)
    return np.exp(-np.minimum(np.log(price / cheapest[kind]) / heat, 300.0))


def _between(ends: tuple[float, float], along: float) -> float:
    return float(ends[0] * (ends[1] / ends[0]) ** along)


def _areas(instance: Instance) -> NDArray[np.int64]:
    """Return each pool's area: its kind and its region, or its site where that lies in no region."""
    sites = instance.sites
    place = np.where(sites.region >= 0, sites.region, sites.region.max(initial=-1) + 1 + np.arange(len(sites.region)))
    name = place[instance.pools.site].astype(np.int64) * (int(instance.pools.kind.max()) + 1) + instance.pools.kind
    return np.unique(name, return_inverse=True)[1].astype(np.int64)


@compiled_loop
def _choose(
    instance: Instance,
    layout: Layout,
    cell_price: np.ndarray,
    slots: np.ndarray,
    largest: np.ndarray,
    demand: np.ndarray,
    first: int,
    thinning: int,
    heat: float,
) -> None:
    """Add each chosen cell's expected GPUs: every thinning-th job from `first`, by a logit."""
    jobs, singles, goods = instance.jobs, instance.singles, instance.goods
    for job in range(first, len(largest), thinning):
        if largest[job] <= 0:
            continue
        home = jobs.home[job]
        warmth = heat * largest[job]
        # Utilities twice: the best first, then the shares relative to it. Staying out is worth 0.
        top, total = 0.0, 1.0
        for lap in range(3):
            if lap == 1:
                total = math.exp(-top / warmth)
            for single in range(singles.start[job], singles.start[job + 1]):
                good, gpus = singles.good[single], singles.gpus[single]
                for tier in range(4):
                    price = jobs.tier_price[job, tier]
                    if price < 0:
                        continue
                    scope = scope_of(instance, layout, home, tier)
                    if scope < 0:
                        continue
                    cell = scope * len(goods.kind) + good
                    if layout.limit_max[cell] < gpus:
                        continue
                    egress = (
                        float(singles.data_bytes_per_s[single]) * 3.6e-6 * float(price)
                    )  # bytes/s x price per GB, per hour
                    utility = singles.value[single] - slots[good] * (egress + gpus * cell_price[cell])
                    if lap == 0:
                        top = max(top, utility)
                    elif utility > top - 12.0 * warmth:
                        share = math.exp((utility - top) / warmth)
                        if lap == 1:
                            total += share
                        else:
                            demand[cell] += thinning * gpus * share / total
