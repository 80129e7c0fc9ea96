"""The game between the sites at single moments of a replay: what coalitions could do alone, Owen and Shapley.

The value of a coalition S at a moment is the optimum of the LP of its own market: the jobs present whose home
is in S, all of S's capacity, nobody in the middle of anything. Pools of one GPU type are joined and staging
is left out, for the coalition as for the whole, so this is a linear production game and Owen's theorem holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import Instance
from broker.backtest.allocate import Cleared, relax
from pricing.fairness import core_slack, division_distance, sampled_shapley, shapley_values

Int = NDArray[np.int64]
Real = NDArray[np.float64]

# Up to this many sites every coalition is tried.
SITES_EXACT_MAX: Final = 12
ORDERS: Final = 60
COALITIONS_SAMPLED: Final = 200
# Of the grand coalition's value: what floats may take.
TOLERANCE: Final = 1e-7


@dataclass(frozen=True, slots=True)
class Game:
    """The game at one moment; money in credits per hour.

    alone        [site] value of each site by itself
    owen         [site] rent of its capacity and its own tenants' surplus at the LP's duals
    published    [site] the same by the published prices and whole placements, on GPUs sold
    shapley      [site] with `shapley_error` its standard error, 0 where exact
    core_slack   least over coalitions of what Owen pays above their value; published_slack with
                 the published outcome, which may fall short by `gap` at most: the dual function
                 at the published prices less the welfare of the placements
    """

    time_s: float
    jobs: int
    grand: float
    alone: tuple[float, ...]
    owen: tuple[float, ...]
    published: tuple[float, ...]
    shapley: tuple[float, ...]
    shapley_error: tuple[float, ...]
    core_slack: float
    published_slack: float
    gap: float
    coalitions: int
    distance: float

    def worse_off(self) -> list[int]:
        """Return the sites that Owen pays less than they would have alone."""
        floor = TOLERANCE * max(1.0, self.grand)
        return [
            site for site, (owen, alone) in enumerate(zip(self.owen, self.alone, strict=True)) if owen < alone - floor
        ]


class Coalitions:
    """Values of coalitions of one market of singles, each computed once."""

    def __init__(self, instance: Instance) -> None:
        """Take the columns of a market in which nobody holds anything."""
        singles, self._pools = instance.singles, instance.pools
        self._instance = instance
        self._owner = np.repeat(np.arange(instance.job_count), np.diff(singles.start))
        self._home = instance.jobs.home
        self._known: dict[int, float] = {0: 0.0}
        self.players = instance.pool_count

    def value(self, mask: int) -> float:
        """Return a coalition's value in micro-credits per hour."""
        if mask not in self._known:
            self._known[mask] = self.solve(mask)[0]
        return self._known[mask]

    def solve(self, mask: int) -> tuple[float, Real, Real]:
        """Return a coalition's value, its kinds' prices, and the surplus of every job at them."""
        singles, rows = self._instance.singles, self._instance.rows
        inside = np.array([bool(mask >> site & 1) for site in range(self.players)])
        jobs = inside[self._home]
        kind = self._pools.kind.astype(np.int64)
        offered = np.zeros(int(kind.max()) + 1, dtype=bool)
        offered[kind[inside]] = True
        keep = np.flatnonzero(jobs[self._owner] & offered[singles.good])
        price = np.zeros(len(offered))
        surplus = np.zeros(len(jobs))
        if not len(keep):
            return 0.0, price, surplus
        number = np.cumsum(jobs) - 1
        owner, good = self._owner[keep], singles.good[keep].astype(np.int64)
        relaxed = relax(
            number[owner],
            good,
            singles.gpus[keep],
            singles.value[keep].astype(float),
            jobs=int(jobs.sum()),
            kind_of_pool=kind,
            units=np.where(inside, rows.step_units, 0),
            ask=rows.step_cost,
        )
        np.maximum.at(surplus, owner, singles.value[keep] - relaxed.kind_price[good] * singles.gpus[keep])
        return relaxed.objective, relaxed.kind_price, surplus


def play(time_s: float, instance: Instance, cleared: Cleared, seed: int) -> Game:
    """Return the game of a market and of its published outcome."""
    coalitions = Coalitions(instance)
    players = coalitions.players
    everyone = (1 << players) - 1
    grand, price, surplus = coalitions.solve(everyone)
    rent = np.maximum(0.0, price[instance.pools.kind] - instance.rows.step_cost) * instance.rows.step_units
    owen = rent + np.bincount(instance.jobs.home, weights=surplus, minlength=players)
    published = published_payoffs(instance, cleared)
    generator = np.random.Generator(np.random.PCG64([seed, 3, int(time_s)]))
    if players <= SITES_EXACT_MAX:
        values = {mask: coalitions.value(mask) for mask in range(1 << players)}
        shapley = shapley_values([values[mask] for mask in range(1 << players)])
        error = (0.0,) * players
    else:
        masks = [everyone, *(1 << site for site in range(players)), *(everyone ^ 1 << site for site in range(players))]
        masks += [int(word) for word in generator.integers(1, everyone, COALITIONS_SAMPLED)]
        values = {mask: coalitions.value(mask) for mask in masks}
        orders = [generator.permutation(players).tolist() for _ in range(ORDERS)]
        shapley, error = sampled_shapley(coalitions.value, players, orders)
    scale = 1e6
    return Game(
        time_s=time_s,
        jobs=instance.job_count,
        grand=grand / scale,
        alone=_scaled([coalitions.value(1 << site) for site in range(players)]),
        owen=_scaled(owen.tolist()),
        published=_scaled(published.tolist()),
        shapley=_scaled(shapley),
        shapley_error=_scaled(error),
        core_slack=core_slack(values, owen.tolist()) / scale,
        published_slack=core_slack(values, published.tolist()) / scale,
        gap=(dual(instance, cleared.prices) - float(published.sum())) / scale,
        coalitions=len(values),
        distance=division_distance(owen.tolist(), shapley),
    )


def dual(instance: Instance, prices: Int) -> float:
    """Return the dual function of a market of singles at prices: what all would have if each had its best."""
    singles, pools, rows = instance.singles, instance.pools, instance.rows
    cheapest = np.full(int(pools.kind.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(cheapest, pools.kind, prices[: instance.pool_count])
    best = np.zeros(instance.job_count)
    owner = np.repeat(np.arange(instance.job_count), np.diff(singles.start))
    np.maximum.at(best, owner, (singles.value - cheapest[singles.good] * singles.gpus).astype(float))
    rent = np.maximum(0, prices[: instance.pool_count] - rows.step_cost) * rows.step_units
    return float(best.sum() + rent.sum())


def published_payoffs(instance: Instance, cleared: Cleared) -> Real:
    """Return what each site has by an outcome: (price - ask) x GPUs sold and its tenants' surplus, micro-credits/h."""
    payoff = np.zeros(instance.pool_count)
    held, _ = outcome_of(instance, cleared)
    for job, pool, gpus, value in held:
        price = int(cleared.prices[pool])
        payoff[pool] += (price - int(instance.rows.step_cost[pool])) * gpus
        payoff[instance.jobs.home[job]] += value - price * gpus
    return payoff


def outcome_of(instance: Instance, cleared: Cleared) -> tuple[list[tuple[int, int, int, int]], dict[int, int]]:
    """Return (job, pool, GPUs, value per hour) of every placed single, and each job's place in that list."""
    singles, choice = instance.singles, cleared.choice
    held: list[tuple[int, int, int, int]] = []
    place: dict[int, int] = {}
    for job in np.flatnonzero(choice.form >= 0).tolist():
        item, pool = int(choice.item[job]), int(choice.place[job])
        away = int(singles.data_bytes_per_s[item]) if pool != instance.jobs.home[job] else 0
        place[job] = len(held)
        held.append((job, pool, int(singles.gpus[item]), int(singles.value[item]) - away))
    return held, place


def _scaled(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) / 1e6 for value in values)
