"""Repair: whole placements from the LP's prices.

A greedy pass at the prices gives a first answer; the integer programme over every column that
could still beat it gives the best one, within a limit of nodes. A column whose job loses more by
taking it than the whole gap between bound and answer can be in no better answer, so it is left
out: the cut is exact. Ties go to the job that came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker.allocation.candidates import Column
from broker.allocation.errors import SolverError
from broker.allocation.market import Market, Pair
from broker.allocation.model import build, solve
from broker.allocation.prices import Prices
from pricing.money import SECONDS_PER_HOUR, divide_up


@dataclass(frozen=True, slots=True)
class Repaired:
    """Placed columns in job order; `optimal` says that none better exists within the solver's gap."""

    placed: tuple[Column, ...]
    optimal: bool
    columns: int
    nodes: int

    @property
    def welfare(self) -> int:
        """What the placements are worth per hour to all."""
        return sum(column.worth for column in self.placed)


def uplift_cost(prices: Prices, column: Column) -> int:
    """Return what market equity must set aside for a column's whole term, in micro-credits."""
    return divide_up(prices.uplift(column) * column.term_s, SECONDS_PER_HOUR)


def repair(market: Market, columns: Sequence[Column], prices: Prices, *, uplift_limited: bool) -> Repaired:
    """Return whole placements; with `uplift_limited`, none whose uplift exceeds market equity in sum."""
    equity = market.snapshot.market_equity_micros
    costs = [uplift_cost(prices, column) if uplift_limited else 0 for column in columns]
    open_to = [index for index in range(len(columns)) if costs[index] <= equity]
    chosen = _greedy(market, columns, costs, open_to, prices)
    floor = sum(columns[index].worth for index in chosen)
    gap = bound(market, columns, prices) - floor
    best = best_surplus(market, columns, prices)
    taken = set(chosen)
    kept_in = [
        index
        for index in open_to
        if index in taken or best[columns[index].job.job_id] - prices.surplus(columns[index]) < gap
    ]
    if gap <= 0:
        return Repaired(_in_job_order(market, [columns[index] for index in chosen]), True, len(chosen), 0)
    subset = [columns[index] for index in kept_in]
    program = build(market, subset, whole=True, uplift_costs=[costs[index] for index in kept_in])
    solution = solve(market, program, start=[1.0 if index in taken else 0.0 for index in kept_in])
    found = [index for index, x in zip(kept_in, solution.x, strict=True) if x > 1 / 2]
    if sum(columns[index].worth for index in found) >= floor:
        chosen = found
    placed = _earlier_first(market, [columns[index] for index in chosen], subset)
    if not fits(market, placed):
        message = "the integer programme oversold a pool or a link; keep the snapshot and report it"
        raise SolverError(message)
    return Repaired(_in_job_order(market, placed), solution.optimal, len(subset), solution.nodes)


def bound(market: Market, columns: Sequence[Column], prices: Prices) -> int:
    """Return the dual function at `prices`: no placements are worth more per hour."""
    jobs = sum(best_surplus(market, columns, prices).values())
    pools = sum(
        (prices.pools[pool_id] - pool.ask_micros_per_gpu_hour) * pool.capacity_gpus
        for pool_id, pool in market.pools.items()
    )
    return jobs + pools + sum(prices.links[pair] * most for pair, most in market.link_capacity.items())


def fits(market: Market, placed: Sequence[Column]) -> bool:
    """Return whether the placements fit all pools and links, one per job, every kept job among them."""
    room = _Room(market)
    jobs = {column.job.job_id for column in placed}
    return len(jobs) == len(placed) and market.kept <= jobs and all(room.take(column) for column in placed)


class _Room:
    """What pools and links have left."""

    def __init__(self, market: Market) -> None:
        self._left: dict[str | Pair, int] = {pool_id: pool.capacity_gpus for pool_id, pool in market.pools.items()}
        self._left |= dict(market.link_capacity.items())

    def take(self, column: Column) -> bool:
        """Take what a column uses if all of it is there."""
        uses: list[tuple[str | Pair, int]] = [(part.pool_id, part.gpus) for part in column.configuration.parts]
        uses += column.shares
        if any(self._left[row] < use for row, use in uses):
            return False
        for row, use in uses:
            self._left[row] -= use
        return True


def best_surplus(market: Market, columns: Sequence[Column], prices: Prices) -> dict[str, int]:
    """Return what each job gains at most at `prices`; being left out is 0, but not for a kept job."""
    best: dict[str, int] = {job.job_id: 0 for job in market.jobs if job.job_id not in market.kept}
    for column in columns:
        surplus = prices.surplus(column)
        job_id = column.job.job_id
        if job_id not in best or surplus > best[job_id]:
            best[job_id] = surplus
    return best


def _greedy(
    market: Market, columns: Sequence[Column], costs: Sequence[int], open_to: Sequence[int], prices: Prices
) -> list[int]:
    """Place kept jobs where they are, then the best columns at the prices while they fit."""
    room = _Room(market)
    placed: dict[str, int] = {}
    for index in open_to:
        if columns[index].action == "keep" and room.take(columns[index]):
            placed[columns[index].job.job_id] = index
    rank = {job.job_id: place for place, job in enumerate(market.jobs)}
    equity = market.snapshot.market_equity_micros
    by_surplus = sorted(open_to, key=lambda i: (-prices.surplus(columns[i]), rank[columns[i].job.job_id], i))
    for index in by_surplus:
        column = columns[index]
        if column.job.job_id in placed or costs[index] > equity or column.worth <= 0:
            continue
        if room.take(column):
            placed[column.job.job_id] = index
            equity -= costs[index]
    return sorted(placed.values())


def _earlier_first(market: Market, placed: Sequence[Column], columns: Sequence[Column]) -> list[Column]:
    """Give a place to an earlier job without one where it is worth exactly as much there."""
    rank = {job.job_id: place for place, job in enumerate(market.jobs)}
    holders = {column.job.job_id for column in placed}
    waiting: dict[tuple[object, ...], list[Column]] = {}
    for column in columns:
        if column.job.job_id not in holders:
            waiting.setdefault(_likeness(column), []).append(column)
    result = []
    for column in sorted(placed, key=lambda column: rank[column.job.job_id]):
        rivals = [rival for rival in waiting.get(_likeness(column), []) if rival.job.job_id not in holders]
        first = min(rivals, key=lambda rival: rank[rival.job.job_id], default=column)
        if column.action == "start" and rank[first.job.job_id] < rank[column.job.job_id]:
            holders.add(first.job.job_id)
            result.append(first)
        else:
            result.append(column)
    return result


def _likeness(column: Column) -> tuple[object, ...]:
    return (column.configuration.key, column.shares, column.worth, column.charge_max, column.action, column.term_s)


def _in_job_order(market: Market, placed: Sequence[Column]) -> tuple[Column, ...]:
    rank = {job.job_id: place for place, job in enumerate(market.jobs)}
    return tuple(sorted(placed, key=lambda column: rank[column.job.job_id]))
