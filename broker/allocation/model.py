"""The configuration LP in PuLP, printed like mathematics, solved by HiGHS.

    minimise    - sum_c worth_c x_c
    job_<id>    sum over the job's columns of x_c      <= 1   (= 1 inside its term)
    pool_<id>   sum_c gpus_cp x_c                      <= capacity_p
    link_<a>_<b>  sum_c shares_cl x_c                  <= capacity_l
    uplift      sum_c uplift_c x_c                     <= market equity     (repair only)
    0 <= x_c <= 1, whole in repair

It is a minimisation because the sign of a dual is then the solver's own: a row's dual is what the
objective gains per unit of its right-hand side, so -dual >= 0 is the rent of a GPU or a share.
What PuLP says of a solve is not trusted: the status is HiGHS's, and every point is checked
against the rows again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import highspy
import pulp

from broker.allocation.candidates import Column
from broker.allocation.errors import SolverError
from broker.allocation.market import Market, Pair

# Money is scaled so that the largest coefficient is this: HiGHS's tolerances are absolute.
LARGEST_COEFFICIENT: Final = 1000.0
FEASIBILITY_TOLERANCE: Final = 1e-6
# Limits are counts, never seconds, so that a replay stops where the first run did.
SIMPLEX_ITERATIONS_MAX: Final = 2_000_000
NODES_MAX: Final = 2_000
STALL_NODES_MAX: Final = 200
GAP_RELATIVE: Final = 1e-4
# All models of a process must ask for the same number of threads: HiGHS shares one scheduler.
THREADS: Final = 1


class HighsSolver(pulp.HiGHS):  # type: ignore[misc]  # pulp ships no types
    """PuLP's HiGHS adapter with a start point, and without its table of statuses.

    PuLP's own maps a time limit to "optimal" and fails on a node limit; we read HiGHS directly.
    """

    def __init__(self, start: Sequence[float] | None = None, **options: object) -> None:
        """Keep the start point, one value per column in the problem's order of variables."""
        super().__init__(msg=False, threads=THREADS, random_seed=0, **options)
        self._start = start

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802 - PuLP's name
        """Run HiGHS, from the start point where there is one."""
        if self._start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = list(self._start)
            lp.solverModel.setSolution(solution)
        lp.solverModel.run()

    def findSolutionValues(self, lp: pulp.LpProblem) -> tuple[int, int]:  # noqa: N802 - PuLP's name
        """Leave the values in HiGHS, where `Program` reads them as vectors."""
        optimal = lp.solverModel.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return (pulp.LpStatusOptimal, pulp.LpSolutionOptimal) if optimal else (pulp.LpStatusNotSolved, 0)


@dataclass(frozen=True, slots=True)
class Program:
    """A built model: the PuLP problem, its variables in column order, and what a unit of money is."""

    problem: Any
    variables: tuple[Any, ...]
    unit_micros: float


@dataclass(frozen=True, slots=True)
class Solution:
    """A checked point. `objective` is welfare in micro-credits per hour; rents are duals of rows >= 0."""

    optimal: bool
    objective_micros_per_hour: float
    x: tuple[float, ...]
    pool_rents: dict[str, float]
    link_rents: dict[Pair, float]
    nodes: int


def build(
    market: Market,
    columns: Sequence[Column],
    *,
    whole: bool = False,
    uplift_costs: Sequence[int] | None = None,
    pool_capacity: Mapping[str, int] | None = None,
) -> Program:
    """Return the LP over `columns`, or with `whole` the integer programme.

    `uplift_costs` are per column in micro-credits over its term, held under the market's equity;
    `pool_capacity` replaces the snapshot's (for sensitivity tests).
    """
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    largest = max((abs(column.worth) for column in columns), default=1)
    unit = max(1.0, largest / LARGEST_COEFFICIENT)
    names = _row_names(market)
    category = pulp.LpInteger if whole else pulp.LpContinuous
    x = tuple(
        problem.add_variable(f"x_{index:07d}", lowBound=0, upBound=1 if whole else None, cat=category)
        for index in range(len(columns))
    )
    problem += _sum((variable, -column.worth / unit) for variable, column in zip(x, columns, strict=True))
    capacity = pool_capacity or {pool_id: pool.capacity_gpus for pool_id, pool in market.pools.items()}
    jobs, pools, links = _entries(columns, x)
    for job_id, entries in jobs.items():
        row = _sum((variable, 1) for variable in entries)
        problem += (row == 1 if job_id in market.kept else row <= 1), names["job", job_id]
    for pool_id, uses in sorted(pools.items()):
        problem += _sum(uses) <= capacity[pool_id], names["pool", pool_id]
    for pair, uses in sorted(links.items()):
        problem += _sum(uses) <= market.link_capacity[pair], names["link", pair]
    if uplift_costs is not None and any(uplift_costs):
        equity = market.snapshot.market_equity_micros
        problem += _sum((v, cost / equity) for v, cost in zip(x, uplift_costs, strict=True) if cost) <= 1, "uplift"
    return Program(problem, x, unit)


def solve(market: Market, program: Program, *, start: Sequence[float] | None = None) -> Solution:
    """Solve a built model and check the point. Raises SolverError where there is none that stands up."""
    if not program.variables:
        return Solution(True, 0.0, (), {}, {}, 0)
    whole = program.variables[0].cat == pulp.LpInteger
    options: dict[str, object] = {"simplex_iteration_limit": SIMPLEX_ITERATIONS_MAX}
    if whole:
        options = {"mip_max_nodes": NODES_MAX, "mip_max_stall_nodes": STALL_NODES_MAX, "mip_rel_gap": GAP_RELATIVE}
    ordered = program.problem.variables()
    places = {variable.name: place for place, variable in enumerate(ordered)}
    if start is not None:
        start = [start[int(variable.name[2:])] for variable in ordered]
    program.problem.solve(HighsSolver(start, **options))
    highs = program.problem.solverModel
    status = highs.getModelStatus()
    optimal = status == highspy.HighsModelStatus.kOptimal
    stopped = status in {highspy.HighsModelStatus.kSolutionLimit, highspy.HighsModelStatus.kIterationLimit}
    if not (optimal or (whole and stopped)):
        message = f"HiGHS stopped with {highs.modelStatusToString(status)}; keep the snapshot and report it"
        raise SolverError(message)
    solution = highs.getSolution()
    values = solution.col_value
    x = tuple(values[places[variable.name]] for variable in program.variables)
    _check(program, x)
    rents: dict[str, float] = {}
    if not whole:
        rows = program.problem.constraints()
        rents = {
            row.name: max(0.0, -dual * program.unit_micros) for row, dual in zip(rows, solution.row_dual, strict=True)
        }
    names = _row_names(market)
    return Solution(
        optimal=optimal,
        objective_micros_per_hour=-highs.getObjectiveValue() * program.unit_micros,
        x=x,
        pool_rents={pool_id: rents.get(names["pool", pool_id], 0.0) for pool_id in market.pools},
        link_rents={pair: rents.get(names["link", pair], 0.0) for pair in market.links},
        nodes=int(highs.getInfo().mip_node_count) if whole else 0,
    )


Name = tuple[str, str | Pair]


def _row_names(market: Market) -> dict[Name, str]:
    """Return a printable, unique name for every row: PuLP allows no `-` and no `/`."""
    names: dict[Name, str] = {}
    taken: set[str] = set()
    wanted: list[tuple[Name, str]] = [(("job", job.job_id), f"job_{job.job_id}") for job in market.jobs]
    wanted += [(("pool", pool_id), f"pool_{pool_id}") for pool_id in market.pools]
    wanted += [(("link", pair), f"link_{pair[0]}_{pair[1]}") for pair in market.links]
    for key, name in wanted:
        printable = name.replace("-", ".").translate(_PRINTABLE)
        names[key] = printable if printable not in taken else f"{printable}.{len(taken)}"
        taken.add(names[key])
    return names


_PRINTABLE: Final = str.maketrans("/+[]> ", "______")


def _entries(
    columns: Sequence[Column], x: Sequence[Any]
) -> tuple[dict[str, list[Any]], dict[str, list[tuple[Any, int]]], dict[Pair, list[tuple[Any, int]]]]:
    """Return the entries of the job, pool and link rows, each in column order."""
    jobs: dict[str, list[Any]] = {}
    pools: dict[str, list[tuple[Any, int]]] = {}
    links: dict[Pair, list[tuple[Any, int]]] = {}
    for column, variable in zip(columns, x, strict=True):
        jobs.setdefault(column.job.job_id, []).append(variable)
        for part in column.configuration.parts:
            pools.setdefault(part.pool_id, []).append((variable, part.gpus))
        for pair, shares in column.shares:
            links.setdefault(pair, []).append((variable, shares))
    return jobs, pools, links


def _sum(terms: Iterable[tuple[Any, float]]) -> Any:  # noqa: ANN401 - pulp ships no types
    return pulp.LpAffineExpression(list(terms))


def _check(program: Program, x: Sequence[float]) -> None:
    """Refuse a point that breaks a row or a bound by more than the tolerance."""
    for variable, value in zip(program.variables, x, strict=True):
        variable.varValue = value
        if not -FEASIBILITY_TOLERANCE <= value <= 1 + FEASIBILITY_TOLERANCE:
            message = f"HiGHS returned {variable.name} = {value}; keep the snapshot and report it"
            raise SolverError(message)
    for row in program.problem.constraints():
        # A row's value is its left side less its right side.
        excess = row.value()
        broken = abs(excess) if row.sense == pulp.LpConstraintEQ else excess
        if broken > FEASIBILITY_TOLERANCE * max(1.0, abs(row.constant)):
            message = f"HiGHS broke row {row.name} by {broken}; keep the snapshot and report it"
            raise SolverError(message)
