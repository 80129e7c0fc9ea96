"""One price vector out of all that the LP's duals allow.

Optimal duals are seldom unique: between the last job served and the first one turned away lies a
range. Published is, among the optimal duals, the one with the least make-whole for the placements
at hand, then the smallest rent (so buyers keep what competition leaves them), then the lowest
rents one after the other, pools first, in order of name: one point, whatever the solver's path.
(A strictly convex last step was tried: HiGHS's QP solver fails on faces as thin as these.)

By complementary slackness with any optimal primal point, a dual is optimal if and only if it is
feasible, zero on slack rows, and tight on columns in use: that describes the face without a
tolerance on the objective. Prices then become whole micro-credits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import highspy
import numpy as np
from numpy.typing import NDArray

from broker.allocation.candidates import Column
from broker.allocation.errors import SolverError
from broker.allocation.market import Market, Pair
from broker.allocation.model import LARGEST_COEFFICIENT, SIMPLEX_ITERATIONS_MAX, THREADS, Solution

IN_USE: Final = 1e-7
# A row counts as slack when at least this share of it is free.
SLACK: Final = 1e-7
# Rounding down keeps every supported buyer at or under its value; a solver's noise just below a
# whole micro-credit is not a fraction of one.
SNAP_MICROS: Final = 1e-3
# What noise may do to a price, of a job's value: beyond it a loss is economic, not numerical.
NOISE: Final = 1e-6
CUT_ROUNDS_MAX: Final = 50
# In scaled money. A row enters the model when violated by more than VIOLATION; what a step has
# settled may give way by SLIP, which is more, so that later rows cannot contradict it.
VIOLATION: Final = 1e-8
SLIP: Final = 1e-7

# highspy's bindings carry no usable types.
_Highs = Any


@dataclass(frozen=True, slots=True)
class Prices:
    """Whole micro-credits per GPU-hour by pool (never below the ask) and per share-hour by link."""

    pools: dict[str, int]
    links: dict[Pair, int]
    rounds: int = 0
    settled: bool = True

    def gross(self, column: Column) -> int:
        """Return what a column's GPUs and link shares cost per hour."""
        gpus = sum(self.pools[part.pool_id] * part.gpus for part in column.configuration.parts)
        return gpus + sum(self.links[pair] * shares for pair, shares in column.shares)

    def surplus(self, column: Column) -> int:
        """Return what a column leaves its job per hour: value less egress, GPUs and link shares."""
        return column.value - column.egress - self.gross(column)

    def uplift(self, column: Column) -> int:
        """Return what the market would add per hour so that the job pays no more than it may."""
        return 0 if column.action == "keep" else max(0, self.gross(column) - max(0, column.charge_max))


def canonical_prices(market: Market, columns: Sequence[Column], solution: Solution, placed: Sequence[Column]) -> Prices:
    """Return the published prices for an LP's solution and the placements made from it."""
    face = _Face(market, columns, solution, placed)
    pool_rents, link_rents, rounds = face.point()
    prices = Prices(
        {
            pool_id: pool.ask_micros_per_gpu_hour + _whole(pool_rents.get(pool_id, 0.0))
            for pool_id, pool in market.pools.items()
        },
        {pair: _whole(link_rents.get(pair, 0.0)) for pair in market.links},
        rounds,
        face.settled,
    )
    in_use = [column for column, x in zip(columns, solution.x, strict=True) if x > IN_USE]
    return _without_noise(market, prices, [*placed, *in_use])


def _whole(rent_micros: float) -> int:
    return max(0, int(np.floor(rent_micros + SNAP_MICROS)))


def _without_noise(market: Market, prices: Prices, columns: Sequence[Column]) -> Prices:
    """Lower prices by the few micro-credits by which noise would put a job above its value."""
    pools = dict(prices.pools)
    for column in columns:
        excess = Prices(pools, prices.links).uplift(column)
        if not 0 < excess <= NOISE * max(1, column.charge_max) + 1 + column.configuration.gpus:
            continue
        for part in sorted(column.configuration.parts, key=lambda part: (-part.gpus, part.pool_id)):
            ask = market.pools[part.pool_id].ask_micros_per_gpu_hour
            cut = min(pools[part.pool_id] - ask, -(-excess // part.gpus))
            pools[part.pool_id] -= cut
            excess -= cut * part.gpus
            if excess <= 0:
                break
    return Prices(pools, prices.links, prices.rounds, prices.settled)


class _Face:
    """The optimal dual face as a HiGHS model: rents of tight rows, surplus of served jobs.

    Variables: rents (pools, links), surpluses (jobs), make-wholes (placed jobs). A column's row,
    surplus + rents x use >= worth, enters when it is first found violated.
    """

    def __init__(self, market: Market, columns: Sequence[Column], solution: Solution, placed: Sequence[Column]) -> None:
        self._columns = columns
        self._solution = solution
        self.settled = False
        self._unit = max(1.0, max((abs(column.worth) for column in columns), default=1) / LARGEST_COEFFICIENT)
        used, job_share = _used(columns, solution.x)
        capacity: dict[str | Pair, int] = {pool.pool_id: pool.capacity_gpus for pool in market.pools.values()}
        capacity |= dict(market.link_capacity.items())
        self._rents = [
            row for row, most in capacity.items() if used.get(row, 0.0) > 0 and used[row] >= most * (1 - SLACK)
        ]
        self._jobs = [
            job.job_id
            for job in market.jobs
            if job.job_id in market.kept or job_share.get(job.job_id, 0.0) >= 1 - SLACK
        ]
        # A kept job must be placed, so its surplus may be negative.
        self._lower = [0.0] * len(self._rents) + [
            -highspy.kHighsInf if job_id in market.kept else 0.0 for job_id in self._jobs
        ]
        self._place: dict[tuple[str, str | Pair], int] = {("rent", row): i for i, row in enumerate(self._rents)}
        self._place.update({("job", job_id): len(self._rents) + i for i, job_id in enumerate(self._jobs)})
        self._capacity = np.array([capacity[row] for row in self._rents], dtype=float)
        self._in_use = [x > IN_USE for x in solution.x]
        self._uses = [self._entries(column) for column in columns]
        self._placed = [column for column in placed if column.action != "keep"]

    def point(self) -> tuple[dict[str, float], dict[Pair, float], int]:
        """Return the chosen rents in micro-credits, and how many rounds of rows it took."""
        if not self._rents:
            self.settled = True
            return {}, {}, 0
        highs = self._open()
        variables = highs.getNumCol()
        inside = {index for index, used in enumerate(self._in_use) if used}
        for index in sorted(inside):
            self._add_row(highs, index)
        make_whole = np.zeros(variables)
        make_whole[len(self._lower) :] = 1.0
        rent = np.zeros(variables)
        rent[: len(self._rents)] = self._capacity / self._capacity.max()
        steps = [step for step in (make_whole, rent) if step.any()]
        steps += [_unit_vector(place, variables) for place in range(len(self._rents))]
        values: Sequence[float] | None = None
        rounds = 0
        for step in steps:
            try:
                rounds += self._minimise(highs, step, inside)
            except SolverError:
                # The last step's point is as good a dual; how far the choice got is recorded.
                break
            values = list(highs.getSolution().col_value)
            self._settle(highs, step, values)
        else:
            self.settled = True
        if values is None:
            return dict(self._solution.pool_rents), dict(self._solution.link_rents), rounds
        rents = {row: values[i] * self._unit for i, row in enumerate(self._rents)}
        return (
            {row: rent for row, rent in rents.items() if isinstance(row, str)},
            {row: rent for row, rent in rents.items() if not isinstance(row, str)},
            rounds,
        )

    def _open(self) -> _Highs:
        highs: _Highs = highspy.Highs()  # type: ignore[no-untyped-call]  # highspy's own signature lacks types
        for option, value in (
            ("output_flag", False),
            ("threads", THREADS),
            ("random_seed", 0),
            ("simplex_iteration_limit", SIMPLEX_ITERATIONS_MAX),
            ("primal_feasibility_tolerance", VIOLATION / 10),
        ):
            highs.setOptionValue(option, value)
        lower = np.array(self._lower + [0.0] * len(self._placed))
        highs.addVars(len(lower), lower, np.full(len(lower), highspy.kHighsInf))
        for offset, column in enumerate(self._placed):
            # make-whole + charge_max >= asks + rents x use
            indices, use = self._entries(column)
            indices.append(len(self._lower) + offset)
            floor = (column.asks - max(0, column.charge_max)) / self._unit
            highs.addRow(
                floor,
                highspy.kHighsInf,
                len(indices),
                np.array(indices, dtype=np.int32),
                np.array([*(-u for u in use), 1.0]),
            )
        return highs

    def _entries(self, column: Column) -> tuple[list[int], list[float]]:
        uses: list[tuple[str | Pair, int]] = [(part.pool_id, part.gpus) for part in column.configuration.parts]
        uses += column.shares
        found = [(self._place["rent", row], float(use)) for row, use in uses if ("rent", row) in self._place]
        return [place for place, _ in found], [use for _, use in found]

    def _add_row(self, highs: _Highs, index: int) -> None:
        column = self._columns[index]
        indices, use = (list(entries) for entries in self._uses[index])
        surplus = self._place.get(("job", column.job.job_id))
        if surplus is not None:
            indices.append(surplus)
            use.append(1.0)
        if not indices:
            return
        worth = column.worth / self._unit
        most = worth + SLIP if self._in_use[index] else highspy.kHighsInf
        highs.addRow(worth, most, len(indices), np.array(indices, dtype=np.int32), np.array(use))

    def _minimise(self, highs: _Highs, step: NDArray[np.float64], inside: set[int]) -> int:
        """Minimise one step's objective over all columns' rows, adding the violated ones."""
        highs.changeColsCost(len(step), np.arange(len(step), dtype=np.int32), step)
        for rounds in range(1, CUT_ROUNDS_MAX + 1):
            highs.run()
            if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                status = highs.modelStatusToString(highs.getModelStatus())
                message = f"choosing prices stopped with {status}; keep the snapshot and report it"
                raise SolverError(message)
            violated = self._violated(highs.getSolution().col_value, inside)
            if not violated:
                return rounds
            for index in violated:
                self._add_row(highs, index)
            inside.update(violated)
        message = f"prices did not settle in {CUT_ROUNDS_MAX} rounds of rows; keep the snapshot and report it"
        raise SolverError(message)

    def _settle(self, highs: _Highs, step: NDArray[np.float64], values: Sequence[float]) -> None:
        """Hold what a step has reached, for the steps after it."""
        present = np.flatnonzero(step).astype(np.int32)
        if len(present) == 1:
            place = int(present[0])
            highs.changeColBounds(place, 0.0, max(0.0, values[place]) + SLIP)
            return
        best = float(step @ np.array(values))
        highs.addRow(-highspy.kHighsInf, best + SLIP * max(1.0, abs(best)), len(present), present, step[present])

    def _violated(self, values: Sequence[float], inside: set[int]) -> list[int]:
        """Return, of each job, the column outside the model that exceeds its surplus the most."""
        worst: dict[str, tuple[float, int]] = {}
        for index, column in enumerate(self._columns):
            if index in inside:
                continue
            paid = sum(values[place] * amount for place, amount in zip(*self._uses[index], strict=True))
            surplus = self._place.get(("job", column.job.job_id))
            excess = column.worth / self._unit - paid - (values[surplus] if surplus is not None else 0.0)
            if excess > worst.get(column.job.job_id, (VIOLATION, -1))[0]:
                worst[column.job.job_id] = (excess, index)
        return sorted(index for _, index in worst.values())


def _used(columns: Sequence[Column], x: Sequence[float]) -> tuple[dict[str | Pair, float], dict[str, float]]:
    """Return how much of every pool and link, and of every job, a primal point uses."""
    used: dict[str | Pair, float] = {}
    jobs: dict[str, float] = {}
    for column, value in zip(columns, x, strict=True):
        jobs[column.job.job_id] = jobs.get(column.job.job_id, 0.0) + value
        for part in column.configuration.parts:
            used[part.pool_id] = used.get(part.pool_id, 0.0) + part.gpus * value
        for pair, shares in column.shares:
            used[pair] = used.get(pair, 0.0) + shares * value
    return used, jobs


def _unit_vector(place: int, length: int) -> NDArray[np.float64]:
    vector = np.zeros(length)
    vector[place] = 1.0
    return vector
