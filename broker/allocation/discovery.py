"""Prices to start from, before any LP: those of a smoothed market played out.

What must be known is not the price of every pool but what a GPU of each kind costs in each part of the
world: pools behind one market node clear at nearly one price. So the play is on *areas*, one per kind
and region (or site in no region): an area's supply is its pools' ask curves, smoothed; its demand comes
from every job's logit choice among its singles in each tier, spread over the areas of the tier by
price and size. Each pass moves every price by its excess demand; smoothing and step are annealed, and
the first passes play a part of the jobs. Any result is valid, since the proof prices every column.

Spans want particular pools: the well joined ones. The first play leaves them out; the second has those that
are good at its prices beside the singles, and a *markup* on each pool that spans alone would fill. Without it the
prices are 0.9 % of the dual function above the LP's in markets with many spans, with it 0.2 %. Site lists, budgets
and floors are not played.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.columns import Columns
from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import SPAN, Instance, Int, Real
from broker.allocation.layout import Layout, scope_of

_THINNED_JOBS_MIN: Final = 2_000
_MOMENTUM: Final = 0.5
_EXCESS_MAX: Final = 0.7
# Of the step of prices, that of markups: jobs' spans are few, so one pool's demand for them jumps.
_MARKUP_STEP: Final = 0.4


class Plan(NamedTuple):
    """Passes of a play. In pass n every thinning[n]-th job plays, with that many times its demand.

    Then first and last of each annealed quantity: the heat of choices relative to a job's value, of areas
    and of asks relative to price, and the step of a price per unit of log(demand / supply).
    """

    thinning: tuple[int, ...]
    choice_heat: tuple[float, float]
    price_heat: tuple[float, float]
    step: tuple[float, float]


FIRST: Final = Plan((8,) * 16 + (4,) * 12 + (2,) * 8 + (1,) * 6, (0.05, 0.002), (0.06, 0.003), (0.3, 0.015))
# From prices at which singles alone clear, with the spans that are good there.
SECOND: Final = Plan((4,) * 8 + (2,) * 6 + (1,) * 6, (0.01, 0.002), (0.012, 0.003), (0.15, 0.015))


class Spread(NamedTuple):
    """Spans to play: those of job j are start[j] up to start[j + 1], each with its GPUs by pool."""

    start: Int
    value: Int
    entry_start: Int
    entry_pool: Int
    entry_use: Int


class Play:
    """The smoothed market of one instance: prices of areas, played from the asks or from where they are."""

    def __init__(self, instance: Instance, layout: Layout) -> None:
        """Sum up what every area supplies, and which areas every cell of the layout draws on."""
        rows, goods, pool_count = instance.rows, instance.goods, instance.pool_count
        self._instance, self._layout = instance, layout
        has_steps = rows.step_start[:-1] < rows.step_start[1:]
        self._floor = np.zeros(instance.row_count)
        self._floor[has_steps] = rows.step_cost[rows.step_start[:-1][has_steps]]
        self._floor[instance.links.first_row :] = 0.0
        self._area = _areas(instance)
        self._markup = np.zeros(pool_count)
        count = int(self._area.max(initial=-1)) + 1
        self._step_area = self._area[np.repeat(np.arange(pool_count), np.diff(rows.step_start[: pool_count + 1]))]
        self._units = rows.step_units[: len(self._step_area)].astype(np.float64)
        self._cost = np.maximum(rows.step_cost[: len(self._step_area)].astype(np.float64), 1.0)
        least = np.full(count, np.inf)
        np.minimum.at(least, self._step_area, self._cost)
        least[np.isinf(least)] = 1.0
        self._least = least
        self._free = np.bincount(self._area, np.maximum(rows.base[:pool_count], 0), minlength=count)
        self._size = np.bincount(self._step_area, self._units, minlength=count) + self._free
        self._kind = np.zeros(count, np.int64)
        self._kind[self._area] = instance.pools.kind
        self._cells = len(layout.start) - 1
        # Cells that nothing offers are left out of the sums.
        self._live = np.flatnonzero(np.diff(layout.start))
        self._head = layout.start[self._live]
        self._member = self._area[goods.offer_pool[layout.offer]]
        self._cell = np.repeat(np.arange(len(self._live)), np.diff(layout.start)[self._live])
        self._largest = np.zeros(instance.job_count)
        owner = np.repeat(np.arange(instance.job_count), np.diff(instance.singles.start))
        np.maximum.at(self._largest, owner, instance.singles.value)
        self._slots = (goods.end - goods.first).astype(np.float64)
        self._price = least * 1.2
        self._momentum = np.zeros(count)

    def prices(self) -> Real:
        """Return the price of every row as the play stands, none below its first ask."""
        instance = self._instance
        price = np.maximum(self._price, self._least)
        of_pools = np.maximum(price[self._area], self._floor[: instance.pool_count]) * np.exp(self._markup)
        y = np.tile(of_pools, instance.slots)
        return np.concatenate([y, np.zeros(instance.row_count - len(y))])

    def go_on(self, plan: Plan, spans: Spread | None = None) -> None:
        """Play the passes of a plan, with `spans` beside every job's singles."""
        if not len(self._instance.singles.good) or not self._instance.pool_count:
            return
        spans = _nowhere(self._instance.job_count) if spans is None else spans
        cell_price, demand = np.zeros(self._cells), np.zeros(self._cells)
        pool_count = self._instance.pool_count
        direct = np.zeros(pool_count)
        first_ask = np.maximum(self._floor[:pool_count], 1.0)
        step_pool = np.repeat(np.arange(pool_count), np.diff(self._instance.rows.step_start[: pool_count + 1]))
        passes = len(plan.thinning)
        for number, thinning in enumerate(plan.thinning):
            along = number / max(1, passes - 1)
            price_heat = _between(plan.price_heat, along)
            if self._instance.job_count < _THINNED_JOBS_MIN:
                thinning = 1
            weight = self._size * _cheapness(self._price, self._kind, price_heat)
            mass = np.maximum(np.add.reduceat(weight[self._member], self._head), 1e-300)
            paid = np.add.reduceat((weight * self._price)[self._member], self._head)
            cell_price[self._live] = paid / mass
            pool_price = np.maximum(self._price[self._area], first_ask) * np.exp(self._markup)
            demand[:] = 0.0
            direct[:] = 0.0
            _choose(
                self._instance,
                self._layout,
                cell_price,
                self._slots,
                self._largest,
                spans,
                pool_price,
                demand,
                direct,
                number % thinning,
                thinning,
                _between(plan.choice_heat, along),
            )
            per_weight = (demand[self._live] / mass)[self._cell]
            wanted = np.bincount(self._area, direct, minlength=len(weight)) + weight * np.bincount(
                self._member, per_weight, minlength=len(weight)
            )
            tilt = (self._cost - self._price[self._step_area]) / (price_heat * self._cost)
            offered = self._free + np.bincount(
                self._step_area, self._units / (1.0 + np.exp(np.clip(tilt, -40.0, 40.0))), minlength=len(self._price)
            )
            excess = np.log((wanted + 0.02 * self._size + 1e-9) / (offered + 0.02 * self._size + 1e-9))
            excess = np.clip(excess, -_EXCESS_MAX, _EXCESS_MAX)
            if len(spans.value):
                tilt = (self._cost - pool_price[step_pool]) / (price_heat * self._cost)
                held = np.maximum(self._instance.rows.base[:pool_count], 0) + np.bincount(
                    step_pool, self._units / (1.0 + np.exp(np.clip(tilt, -40.0, 40.0))), minlength=pool_count
                )
                room = 0.02 * np.bincount(step_pool, self._units, minlength=pool_count) + 1e-9
                over = np.clip(np.log((direct + room) / (held + room)), -_EXCESS_MAX, _EXCESS_MAX)
                self._markup = np.clip(self._markup + _between(plan.step, along) * _MARKUP_STEP * over, 0.0, 1.0)
            self._momentum = _MOMENTUM * self._momentum + _between(plan.step, along) * excess
            self._price = np.maximum(self._price * np.exp(self._momentum), self._least * 0.97)

    def spread(self, columns: Columns) -> Spread:
        """Return the spans among columns, ordered by job, as uses of pools."""
        instance = self._instance
        chosen = columns.take(np.flatnonzero(columns.form == SPAN))
        of_pools = chosen.row < instance.pool_count * instance.slots
        owner = np.repeat(np.arange(len(chosen.job)), np.diff(chosen.start))[of_pools]
        return Spread(
            start=np.searchsorted(chosen.job, np.arange(instance.job_count + 1)).astype(np.int64),
            value=chosen.value,
            entry_start=np.searchsorted(owner, np.arange(len(chosen.job) + 1)).astype(np.int64),
            entry_pool=(chosen.row[of_pools] % instance.pool_count).astype(np.int64),
            entry_use=chosen.use[of_pools],
        )


def _nowhere(job_count: int) -> Spread:
    none = np.zeros(0, np.int64)
    return Spread(np.zeros(job_count + 1, np.int64), none, np.zeros(1, np.int64), none, none)


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
    spans: Spread,
    pool_price: np.ndarray,
    demand: np.ndarray,
    direct: np.ndarray,
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
            for span in range(spans.start[job], spans.start[job + 1]):
                utility = float(spans.value[span])
                for entry in range(spans.entry_start[span], spans.entry_start[span + 1]):
                    utility -= spans.entry_use[entry] * pool_price[spans.entry_pool[entry]]
                if lap == 0:
                    top = max(top, utility)
                elif utility > top - 12.0 * warmth:
                    share = math.exp((utility - top) / warmth)
                    if lap == 1:
                        total += share
                    else:
                        for entry in range(spans.entry_start[span], spans.entry_start[span + 1]):
                            direct[spans.entry_pool[entry]] += thinning * spans.entry_use[entry] * share / total
