"""The LP relaxation of a round, to a proved gap: prices, a bound, and what they cost to find.

    start prices -> window -> LP -> price every job exactly -> add what is missing -> ... -> whole prices

Any prices >= 0 give a valid bound, so whatever stops the loop, the answer is honest: `optimal` says
whether the gap was proved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation import oracle
from broker.allocation.columns import Columns, scale, window
from broker.allocation.discovery import FIRST, SECOND, Play
from broker.allocation.engine import Engine, HighsEngine
from broker.allocation.instance import NONE, Instance, Int, Real
from broker.allocation.layout import Layout
from broker.allocation.master import PERTURBATION, LpPoint, Master
from broker.allocation.memory import Memory
from broker.allocation.nodes import Nodes, market_nodes
from broker.allocation.posted import first_asks, post

# The window at discovered prices, and after that, as shares of a job's largest value.
WIDTH: Final = 0.015
WIDTH_SPANS: Final = 0.004
WIDTH_LATER: Final = 0.002
GAP: Final = 1e-6
# What the proof may leave: far below the perturbation, which else would not decide between prices.
_GAP_PRICED: Final = 1e-10
# Fewer jobs begin at the first asks: the LP finds their prices in a moment, and the play would take longer than all else.
_PLAYED_JOBS_MIN: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts, never seconds: a replay stops where the first run did."""

    iterations: int = 60


@dataclass(frozen=True, slots=True)
class Relaxation:
    """What the LP found. `prices` [rows] are whole; `bound` is the dual function there, exact.

    `lp_objective` is the welfare of a feasible point of the LP; `y` and `nodes_y` the prices in
    floats; `seconds` by phase, as the caller's `tick` counts them.
    """

    prices: Int
    lp_objective: float
    y: Real
    bound: int
    optimal: bool
    iterations: int
    columns: int
    solver_iterations: int
    best: oracle.Best
    seconds: dict[str, float]

    @property
    def gap(self) -> float:
        """The proved relative gap between the bound and the LP's point."""
        return (self.bound - self.lp_objective) / max(1.0, abs(float(self.bound)))


def relax(
    instance: Instance,
    *,
    last_prices: Real | None = None,
    limits: Limits | None = None,
    engine: Engine | None = None,
    methods: tuple[str, str] = ("dual", "dual"),
    tick: Callable[[], float] = lambda: 0.0,
) -> Relaxation:
    """Solve the LP relaxation to a proved relative gap of GAP, or as far as `limits` allow."""
    limits = limits or Limits()
    seconds: dict[str, float] = {}
    mark = tick()

    def lap(phase: str) -> None:
        nonlocal mark
        now = tick()
        seconds[phase] = seconds.get(phase, 0.0) + now - mark
        mark = now

    layout = oracle.prepare(instance)
    nodes = market_nodes(instance, layout)
    scales = scale(instance)
    lap("prepare")
    found, memory, asks = _nothing(instance), Memory(instance), first_asks(instance)
    y = (
        _start(instance, layout, nodes, scales, found=found, memory=memory)
        if last_prices is None
        else np.maximum(last_prices, asks)
    )
    lap("discovery")
    columns = window(
        instance,
        layout,
        nodes,
        y,
        WIDTH * scales,
        found=found,
        hint=found,
        memory=memory,
        width_spans=WIDTH_SPANS * scales,
    )
    lap("window")
    master = Master(instance, nodes, engine or HighsEngine(), columns)
    lap("build")
    solver_iterations, iteration, proved = 0, 0, False
    best_y, best_bound, objective = y, oracle.dual(instance, y, found), -np.inf
    for iteration in range(1, limits.iterations + 1):
        point = master.solve(methods[0] if iteration == 1 else methods[1])
        solver_iterations += point.run.iterations
        lap("lp")
        y = np.maximum(point.y[: instance.row_count], asks)
        missing = window(instance, layout, nodes, y, WIDTH_LATER * scales, found=found, hint=found, memory=memory)
        bound = oracle.dual(instance, y, found)
        if bound < best_bound:
            best_y, best_bound = y, bound
        if point.violation <= PERTURBATION:
            objective = max(objective, _feasible(instance, point))
        lap("pricing")
        short = np.maximum(0.0, found.surplus - point.surplus)
        proved = point.run.optimal and point.violation <= PERTURBATION and float(short.sum()) <= GAP / 3 * abs(bound)
        if proved:
            best_y, best_bound = y, bound
        if proved and short.sum() <= _GAP_PRICED * abs(bound):
            break
        wanted = _not_yet(master.columns, missing, np.flatnonzero(short > 1e-12 * scales))
        if not len(wanted):
            break
        master.add(missing.take(wanted))
        lap("build")
    prices = post(instance, best_y)
    exact = oracle.best(instance, prices, layout=layout, hint=found, memory=memory)
    whole_bound = oracle.dual_exact(instance, prices, exact)
    lap("prices")
    return Relaxation(
        prices=prices,
        lp_objective=objective,
        y=best_y,
        bound=whole_bound,
        optimal=proved,
        iterations=iteration,
        columns=len(master.columns.job),
        solver_iterations=solver_iterations,
        best=exact,
        seconds=seconds,
    )


def _start(
    instance: Instance, layout: Layout, nodes: Nodes, scales: Real, *, found: oracle.Best, memory: Memory
) -> Real:
    """Return prices near the LP's, and fill `found` with columns that are good there; first asks where jobs are few."""
    if instance.job_count < _PLAYED_JOBS_MIN:
        return first_asks(instance).astype(np.float64)
    play = Play(instance, layout)
    play.go_on(FIRST)
    if len(instance.spans.gpus):
        width = WIDTH_SPANS * scales
        good = window(instance, layout, nodes, play.prices(), width, found=found, memory=memory)
        play.go_on(SECOND, play.spread(good))
    return play.prices()


def _feasible(instance: Instance, point: LpPoint) -> float:
    """Return the welfare of the LP's point drawn back inside the true capacities."""
    # Jobs inside a term keep their own bundles, which fit: the point is mixed with those.
    own = float(instance.bundles.value[instance.jobs.own[instance.jobs.must]].sum())
    return (point.objective + PERTURBATION * min(own, 0.0)) / (1 + PERTURBATION)


def _nothing(instance: Instance) -> oracle.Best:
    count = instance.job_count
    return oracle.Best(
        np.full(count, NONE, np.int8), np.full(count, NONE, np.int32), np.full(count, NONE, np.int32), np.zeros(count)
    )


def _not_yet(held: Columns, offered: Columns, jobs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which offered columns of `jobs` are not held."""
    candidates = np.flatnonzero(np.isin(offered.job, jobs))
    return candidates[~np.isin(_keys(offered)[candidates], _keys(held))]


def _keys(columns: Columns) -> NDArray[np.int64]:
    """Return one number per column; the item alone names the job, but for staying out."""
    item = np.where(columns.form < 0, columns.job, columns.item).astype(np.int64)
    return ((columns.form.astype(np.int64) + 1) << 60) | (item << 30) | np.maximum(columns.place, 0)
