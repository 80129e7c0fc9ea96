"""Solve a round in numbers: prices from the LP's proof, whole placements from the prices.

    relax      prices, bound, status            broker.allocation.relaxation
    whole      whole placements at the prices   broker.allocation.rounding
    drop       what market equity cannot uphold

Placements depend on the instance and the published prices alone, and the prices do not depend on
the path that the LP took to them: so last round's prices and a live model change the time that a
round takes, never its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from broker.allocation import rounding
from broker.allocation.clearing import Status
from broker.allocation.columns import Columns, describe
from broker.allocation.engine import Engine, HighsEngine
from broker.allocation.instance import NONE, Choice, Instance, Int, Real, capacity
from broker.allocation.master import PERTURBATION
from broker.allocation.nodes import market_nodes
from broker.allocation.oracle import Best, best, prepare
from broker.allocation.relaxation import Limits as RelaxationLimits
from broker.allocation.relaxation import Relaxation, relax
from broker.allocation.rounding import Limits as RoundingLimits

# Placements within this share of the bound need no search to be called optimal.
OPTIMAL_GAP: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved round. `prices` [rows] and `welfare` are whole micro-credits; `seconds` by phase."""

    prices: Int
    choice: Choice
    welfare: int
    bound: int
    lp_objective: float
    status: Status
    columns: int
    lp_rounds: int
    repair_columns: int
    repair_nodes: int
    prices_settled: bool
    seconds: dict[str, float]

    @property
    def gap(self) -> float:
        """How much better the best placements could be at most, relative to the bound."""
        return (self.bound - self.welfare) / max(1.0, abs(float(self.bound)))


def solve(
    instance: Instance,
    *,
    equity_micros: int = 0,
    last_prices: Real | None = None,
    limits: RelaxationLimits | None = None,
    rounding_limits: RoundingLimits | None = None,
    engine: Callable[[], Engine] = HighsEngine,
    tick: Callable[[], float] = lambda: 0.0,
) -> Outcome:
    """Return prices and whole placements of a market, the LP solved by what `engine` makes.

    `last_prices` [rows] are where the search for prices begins; `equity_micros` bounds what the
    market may add over all placements' terms; `tick` counts seconds for the phases' times only.
    """
    if instance.row_count == 0:
        return _nothing(instance)
    relaxed = relax(instance, last_prices=last_prices, limits=limits, engine=engine(), tick=tick)
    started = tick()
    whole = rounding.whole(
        instance, relaxed.prices, best=relaxed.best, limits=rounding_limits or RoundingLimits(), tick=tick
    )
    funded = rounding.drop_uplift(instance, relaxed.prices, whole, equity_micros)
    seconds = {**relaxed.seconds, "rounding": tick() - started}
    near = relaxed.bound - funded.welfare <= OPTIMAL_GAP * abs(relaxed.bound)
    status: Status = "optimal" if funded.optimal or near else "feasible"
    if not relaxed.optimal:
        status = "stopped"
    elif not _anything(instance):
        status = "empty"
    return Outcome(
        prices=relaxed.prices,
        choice=funded.choice,
        welfare=funded.welfare,
        bound=relaxed.bound,
        lp_objective=_without_perturbation(instance, relaxed),
        status=status,
        columns=relaxed.columns,
        lp_rounds=relaxed.iterations,
        repair_columns=funded.effort.columns,
        repair_nodes=funded.effort.nodes,
        prices_settled=relaxed.optimal,
        seconds=seconds,
    )


def _without_perturbation(instance: Instance, relaxed: Relaxation) -> float:
    """Return the LP's optimum without what its hair more supply can have added.

    A point further above the bound than that is left there: it would prove the bound wrong, and the
    certificate's check must see it.
    """
    supply = np.maximum(1, np.abs(capacity(instance.rows)))
    added = PERTURBATION * (float(relaxed.prices @ supply.astype(np.float64)) + abs(float(relaxed.bound))) + 1
    above = relaxed.lp_objective - relaxed.bound
    return float(relaxed.bound) if 0 < above <= added else relaxed.lp_objective


def held_columns(instance: Instance, choice: Choice) -> Columns:
    """Return the columns that jobs hold, by job, with their values and uses."""
    jobs = np.flatnonzero(choice.form != NONE).astype(np.int32)
    layout = prepare(instance)
    nodes = market_nodes(instance, layout)
    return describe(instance, layout, nodes, jobs, choice.form[jobs], choice.item[jobs], choice.place[jobs])


def used_rows(instance: Instance, choice: Choice) -> Int:
    """Return how much of every row a choice uses."""
    used = np.zeros(instance.row_count, np.int64)
    if not instance.row_count:
        return used
    columns = held_columns(instance, choice)
    np.add.at(used, columns.row, columns.use)
    return used


def best_columns(instance: Instance, prices: Int) -> Best:
    """Return the best column of each job at whole prices, also where nothing is on offer."""
    if instance.row_count:
        return best(instance, prices)
    jobs = instance.job_count
    none = np.full(jobs, NONE, np.int32)
    return Best(none.astype(np.int8), none, none, np.zeros(jobs, np.int64))


def _nothing(instance: Instance) -> Outcome:
    """Return the outcome of a market in which nothing is on offer."""
    none = np.full(instance.job_count, NONE, np.int32)
    return Outcome(
        prices=np.zeros(0, np.int64),
        choice=Choice(none.astype(np.int8), none, none),
        welfare=0,
        bound=0,
        lp_objective=0.0,
        status="empty",
        columns=0,
        lp_rounds=0,
        repair_columns=0,
        repair_nodes=0,
        prices_settled=True,
        seconds={},
    )


def _anything(instance: Instance) -> bool:
    return bool(len(instance.singles.gpus) or len(instance.spans.gpus) or len(instance.bundles.value))
