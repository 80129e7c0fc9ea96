"""Whether it pays to lie: single rounds cleared again with one agent's bid, ask or capacity misreported.

For each agent the best of a grid of misreports against the truth, everyone else truthful: a lower bound of
what a best response gains. Utility is measured at the true value or cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from broker.allocation.instance import Goods, Instance, Rows
from broker.backtest.allocate import Allocator, Cleared
from broker.backtest.coalition import outcome_of, published_payoffs

BID_FACTORS: Final = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.2, 1.5)
ASK_FACTORS: Final = (0.7, 0.9, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
CAPACITY_FACTORS: Final = (0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True, slots=True)
class Temptation:
    """What an agent's best misreport of a round gained, in credits per hour.

    `payoff` is its utility when truthful; `stake` what is at play for it: a buyer's best value, a
    site's sales at the published price plus its own tenants' value.
    """

    kind: str
    agent: int
    gain: float
    payoff: float
    stake: float
    factor: float

    @property
    def of_payoff(self) -> float:
        """The gain as a share of the truthful payoff, or of a hundredth of the stake where that is more.

        A seller whose price is its ask earns nothing when truthful, so this can be large where
        little is at stake.
        """
        base = max(self.payoff, self.stake / 100)
        return self.gain / base if base > 0 else 0.0

    @property
    def of_stake(self) -> float:
        """The gain as a share of what is at play for the agent."""
        return self.gain / self.stake if self.stake > 0 else 0.0


def buyers(instance: Instance, truth: Cleared, allocate: Allocator, jobs: Sequence[int]) -> Iterator[Temptation]:
    """Yield what each of `jobs` could have gained by scaling all of its bid."""
    start, value = instance.singles.start, instance.singles.value
    for job in jobs:
        mine = slice(int(start[job]), int(start[job + 1]))
        if mine.stop == mine.start:
            continue
        honest = _buyer_payoff(instance, truth, job)
        best, best_factor = honest, 1.0
        for factor in BID_FACTORS:
            reported = value.copy()
            reported[mine] = np.floor(value[mine] * factor).astype(np.int64)
            other = instance._replace(singles=instance.singles._replace(value=reported))
            payoff = _buyer_payoff(instance, allocate(other, truth.prices), job)
            if payoff > best:
                best, best_factor = payoff, factor
        yield Temptation("bid", job, (best - honest) / 1e6, honest / 1e6, float(value[mine].max()) / 1e6, best_factor)


def sites(instance: Instance, truth: Cleared, allocate: Allocator, *, tenants: bool) -> Iterator[Temptation]:
    """Yield what each site could have gained by another ask, then by withholding capacity.

    With `tenants` its payoff includes its own tenants' surplus, as a member's does; without, it is a
    seller and counts its rent alone.
    """
    rows = instance.rows
    for site in range(instance.pool_count):
        honest, stake = _site_payoff(instance, truth, site, tenants=tenants)
        for kind, factors in (("ask", ASK_FACTORS), ("capacity", CAPACITY_FACTORS)):
            best, best_factor = honest, 1.0
            for factor in factors:
                changed = _with(rows, site, ask=factor) if kind == "ask" else _with(rows, site, capacity=factor)
                other = instance._replace(rows=changed, goods=_limited(instance, changed))
                payoff, _ = _site_payoff(instance, allocate(other, truth.prices), site, tenants=tenants)
                if payoff > best:
                    best, best_factor = payoff, factor
            yield Temptation(kind, site, (best - honest) / 1e6, honest / 1e6, stake / 1e6, best_factor)


def _buyer_payoff(instance: Instance, cleared: Cleared, job: int) -> float:
    held, place = outcome_of(instance, cleared)
    if job not in place:
        return 0.0
    _, pool, gpus, value = held[place[job]]
    return float(value - int(cleared.prices[pool]) * gpus)


def _site_payoff(instance: Instance, cleared: Cleared, site: int, *, tenants: bool) -> tuple[float, float]:
    """Return a site's true payoff and its stake. Rent is over the true ask: `instance` is the truthful one."""
    payoff = float(published_payoffs(instance, cleared)[site]) if tenants else 0.0
    stake = 0.0
    held, _ = outcome_of(instance, cleared)
    for job, pool, gpus, value in held:
        price = int(cleared.prices[pool])
        if pool == site:
            stake += price * gpus
            if not tenants:
                payoff += (price - int(instance.rows.step_cost[pool])) * gpus
        if tenants and instance.jobs.home[job] == site:
            stake += value
    return payoff, stake


def _with(rows: Rows, site: int, *, ask: float = 1.0, capacity: float = 1.0) -> Rows:
    cost, units = rows.step_cost.copy(), rows.step_units.copy()
    cost[site] = max(1, int(cost[site] * ask))
    units[site] = int(units[site] * capacity)
    return rows._replace(step_cost=cost, step_units=units)


def _limited(instance: Instance, rows: Rows) -> Goods:
    goods = instance.goods
    return goods._replace(offer_limit=np.minimum(goods.offer_limit, rows.step_units[goods.offer_pool]))


def quantiles(shares: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile, nan where there is nothing."""
    return (float(np.median(shares)), float(np.quantile(shares, 0.95))) if shares else (float("nan"), float("nan"))
