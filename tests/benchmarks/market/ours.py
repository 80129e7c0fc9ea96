"""Our side of the comparison: the LP relaxation of a market and whole rounds, measured in CPU time.

`relaxed` times the product's own `relaxation.relax`; `pulp_cost` splits off what PuLP costs in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import highspy
import pulp

from broker.allocation.engine import HighsEngine
from broker.allocation.following import follow
from broker.allocation.instance import Instance, Int
from broker.allocation.relaxation import Relaxation, relax
from broker.allocation.solver import Outcome, solve


class Relaxed(NamedTuple):
    """The best of several runs: what was found, CPU seconds, and those of the first, which may compile."""

    found: Relaxation
    seconds: float
    first_s: float


def relaxed(instance: Instance, repeats: int) -> Relaxed:
    """Solve a market's LP some times over, each from nothing, and keep the fastest."""
    runs: list[tuple[float, Relaxation]] = []
    for _ in range(repeats):
        started = time.process_time()
        found = relax(instance, tick=time.process_time)
        runs.append((time.process_time() - started, found))
    seconds, found = min(runs, key=lambda run: run[0])
    return Relaxed(found, seconds, runs[0][0])


def solved(instance: Instance, repeats: int) -> tuple[Outcome, float]:
    """Solve a whole round some times over; return it and the least CPU seconds."""
    runs: list[tuple[float, Outcome]] = []
    for _ in range(repeats):
        started = time.process_time()
        outcome = solve(instance)
        runs.append((time.process_time() - started, outcome))
    seconds, outcome = min(runs, key=lambda run: run[0])
    return outcome, seconds


def followed(instance: Instance, last_prices: Int, repeats: int) -> tuple[Outcome, float]:
    """Follow the last round's prices some times over; return the round and the least CPU seconds."""
    runs: list[tuple[float, Outcome]] = []
    for _ in range(repeats):
        started = time.process_time()
        outcome = follow(instance, last_prices, gap_max=1.0, tick=time.process_time)
        assert outcome is not None, "no gap is wider than the bound itself"
        runs.append((time.process_time() - started, outcome))
    seconds, outcome = min(runs, key=lambda run: run[0])
    return outcome, seconds


def pulp_cost(instance: Instance, repeats: int) -> tuple[float, float]:
    """Return (CPU seconds that PuLP adds, those of all else) in one LP, the least of some runs.

    PuLP's part runs from the end of the window until its skeleton stands in HiGHS, less what it
    takes to pass the same skeleton to HiGHS as arrays.
    """
    splits = []
    for _ in range(repeats):
        engine = _TimedEngine()
        started = time.process_time()
        relax(instance, engine=engine, tick=engine.tick)
        whole = time.process_time() - started
        added = engine.loaded - engine.last_tick_before_load - engine.direct_s
        splits.append((added, whole - engine.direct_s - added))
    return min(split[0] for split in splits), min(split[1] for split in splits)


class _TimedEngine(HighsEngine):
    """HiGHS through PuLP, noting when the skeleton was handed over and what arrays alone would have taken."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = self.last_tick_before_load = self.direct_s = 0.0

    def tick(self) -> float:
        now = time.process_time()
        if not self.loaded:
            self.last_tick_before_load = now
        return now

    def load(self, problem: pulp.LpProblem, variables: Sequence[pulp.LpVariable]) -> None:
        super().load(problem, variables)
        self.loaded = time.process_time()
        model = self._highs.getLp()
        started = time.process_time()
        direct = highspy.Highs()
        direct.setOptionValue("output_flag", False)
        direct.passModel(model)
        self.direct_s = time.process_time() - started
