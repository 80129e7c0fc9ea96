"""Clears a round: the product's solver where it is, and a small LP with whole placements to check it against.

Both take an `Instance` of singles and bundles and return which column each job holds and a price for each row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import BUNDLE, NONE, SINGLE, Choice, Instance
from broker.backtest.linear import Matrix, maximise

Int = NDArray[np.int64]
Real = NDArray[np.float64]


# What the market may add over all terms of a round: more than any round needs. The report states the uplift.
EQUITY_MICROS: Final = 10**15


class Cleared(NamedTuple):
    """A cleared round: columns, whole micro-credits per row, and how far welfare is below its bound at most."""

    choice: Choice
    prices: Int
    welfare: int
    bound: int


Allocator = Callable[[Instance, Int | None], Cleared]


class Relaxed(NamedTuple):
    """The LP relaxation with pools of a kind joined: optimum and a GPU's price by kind, micro-credits per hour."""

    objective: float
    kind_price: Real


def relax(
    owner: Int, kind: Int, gpus: Int, value: Real, *, jobs: int, kind_of_pool: Int, units: Int, ask: Int
) -> Relaxed:
    """Return the optimum of a market of singles, [column] arrays, whatever its bundles.

    Rows: each job at most once; a kind's GPUs at most what its pools sell; a pool sells at most
    `units` at `ask`. Jobs may be split between pools of a kind: it is a relaxation.
    """
    kinds = int(kind_of_pool.max()) + 1
    count, pools = len(owner), len(kind_of_pool)
    start = np.concatenate([np.arange(0, 2 * count + 1, 2), 2 * count + np.arange(1, pools + 1)])
    row = np.concatenate([np.stack([owner, jobs + kind], axis=1).ravel(), jobs + kind_of_pool])
    use = np.concatenate([np.stack([np.ones(count), gpus.astype(float)], axis=1).ravel(), -np.ones(pools)])
    worth = np.concatenate([value.astype(float), -ask.astype(float)])
    upper = np.concatenate([np.ones(count), units.astype(float)])
    limit = np.concatenate([np.ones(jobs), np.zeros(kinds)])
    solution = maximise(worth, upper, Matrix(start, row, use), limit)
    return Relaxed(solution.objective, solution.duals[jobs:])


def plain(instance: Instance, last_prices: Int | None) -> Cleared:  # noqa: ARG001  the same interface as the solver's
    """Clear by the LP relaxation's prices and best responses in order of surplus per GPU.

    A reference without the solver's proofs: bundles enter the LP as singles of their kind.
    """
    singles, bundles, pools = instance.singles, instance.bundles, instance.pools
    jobs = instance.job_count
    ask, free = instance.rows.step_cost, instance.rows.step_units.copy()
    bundle_kind = pools.kind[bundles.entry_row]
    owner = np.concatenate([_owners(singles.start), _owners(bundles.start)])
    kind = np.concatenate([singles.good, bundle_kind]).astype(np.int64)
    gpus = np.concatenate([singles.gpus, bundles.entry_use])
    value = np.concatenate([singles.value, bundles.value]).astype(float)
    relaxed = relax(owner, kind, gpus, value, jobs=jobs, kind_of_pool=pools.kind.astype(np.int64), units=free, ask=ask)
    prices = np.maximum(ask, np.floor(relaxed.kind_price[pools.kind]).astype(np.int64))
    choice = Choice(np.full(jobs, NONE, dtype=np.int8), np.zeros(jobs, dtype=np.int32), np.zeros(jobs, dtype=np.int32))
    columns = _Columns(owner, kind, gpus, value)
    left = free.tolist()
    # Whole placements leave GPUs over that the prices turn nobody away from: the rest may have them at the asks.
    welfare = _respond(instance, columns, prices, left, choice)
    welfare += _respond(instance, columns, ask, left, choice)
    return Cleared(choice, _supported(instance, prices, choice), int(welfare), int(np.ceil(relaxed.objective)))


class _Columns(NamedTuple):
    owner: Int
    kind: Int
    gpus: Int
    value: Real


def _respond(instance: Instance, columns: _Columns, prices: Int, left: list[int], choice: Choice) -> float:
    """Give jobs without a column the one of most surplus that has room; return the welfare added."""
    owner, kind, gpus, value = columns
    singles, pools, ask = instance.singles, instance.pools, instance.rows.step_cost
    count = len(singles.gpus)
    cheapest = np.full(int(pools.kind.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(cheapest, pools.kind, prices)
    surplus = value - cheapest[kind] * gpus
    turn = _turns(owner, surplus, gpus, instance.job_count)
    by_kind: dict[int, list[int]] = {}
    for pool in np.lexsort((np.arange(len(pools.kind)), prices)).tolist():
        by_kind.setdefault(int(pools.kind[pool]), []).append(pool)
    home = instance.jobs.home.tolist()
    places, welfare = pools.site.tolist(), 0.0
    for at in np.lexsort((np.arange(len(owner)), -surplus, turn[owner])).tolist():
        job = int(owner[at])
        if surplus[at] < 0 or choice.form[job] != NONE:
            continue
        need = int(gpus[at])
        if at >= count:
            bundle = at - count
            pool = int(instance.bundles.entry_row[bundle])
            if left[pool] >= need:
                choice.form[job], choice.item[job], choice.place[job] = BUNDLE, bundle, 0
                left[pool] -= need
                welfare += float(value[at]) - ask[pool] * need
            continue
        offered = [pool for pool in by_kind[int(kind[at])] if left[pool] >= need and value[at] >= prices[pool] * need]
        if offered:
            pool = min(offered, key=lambda each: (prices[each], places[each] != home[job], left[each]))
            away = int(singles.data_bytes_per_s[at]) if places[pool] != home[job] else 0
            choice.form[job], choice.item[job], choice.place[job] = SINGLE, at, pool
            left[pool] -= need
            welfare += float(value[at]) - away - ask[pool] * need
    return welfare


def _supported(instance: Instance, prices: Int, choice: Choice) -> Int:
    """Return the prices lowered, pool by pool, to what the least willing of its buyers pays."""
    singles, bundles = instance.singles, instance.bundles
    supported = prices.copy()
    for job in np.flatnonzero(choice.form >= 0).tolist():
        item, place = int(choice.item[job]), int(choice.place[job])
        if choice.form[job] == BUNDLE:
            pool, gpus, value = int(bundles.entry_row[item]), int(bundles.entry_use[item]), int(bundles.value[item])
        else:
            away = int(singles.data_bytes_per_s[item]) if place != instance.jobs.home[job] else 0
            pool, gpus, value = place, int(singles.gpus[item]), int(singles.value[item]) - away
        supported[pool] = min(supported[pool], value // gpus)
    return np.maximum(instance.rows.step_cost, supported)


def _turns(owner: Int, surplus: Real, gpus: Int, jobs: int) -> Int:
    """Return each job's turn: first who gains most per GPU in its best column."""
    best = np.full(jobs, -np.inf)
    np.maximum.at(best, owner, surplus)
    density = np.full(jobs, -np.inf)
    at_best = surplus >= best[owner]
    np.maximum.at(density, owner[at_best], (surplus / gpus)[at_best])
    turn = np.empty(jobs, dtype=np.int64)
    turn[np.lexsort((np.arange(jobs), -density))] = np.arange(jobs)
    return turn


def _owners(start: Int) -> Int:
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def product() -> Allocator:
    """Return the product's own solver as an allocator. Raises ImportError where it is not there."""
    solve: Any = importlib.import_module("broker.allocation.solver").solve

    def allocate(instance: Instance, last_prices: Int | None) -> Cleared:
        start = None if last_prices is None else last_prices.astype(np.float64)
        outcome = solve(instance, last_prices=start, equity_micros=EQUITY_MICROS)
        return Cleared(outcome.choice, outcome.prices, outcome.welfare, outcome.bound)

    return allocate
