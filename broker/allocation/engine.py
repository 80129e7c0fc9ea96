"""The LP solver behind `master`: a live model whose columns and rows come and go as arrays.

`Engine` is what a solver must do; `HighsEngine` does it with HiGHS. PuLP owns the named skeleton (rows,
supply, flows between market nodes) and hands its live solver over as `problem.solverModel`; from then
on arrays are passed. What a solver says of its result is not trusted: `master` checks every point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import highspy
import numpy as np
import pulp
from numpy.typing import NDArray

from broker.allocation.instance import Index, Int, Real

# All models of a process must ask for the same number of threads: HiGHS shares one scheduler.
THREADS: Final = 1
# Below the perturbation of the rows, which would otherwise be lost in the tolerance.
FEASIBILITY_TOLERANCE: Final = 1e-9
# Limits are counts, never seconds, so that a replay stops where the first run did.
SIMPLEX_ITERATIONS_MAX: Final = 5_000_000


class Run(NamedTuple):
    """How a run ended: `optimal` is the solver's word; iterations of simplex, interior point and crossover."""

    optimal: bool
    iterations: int


class Basis(NamedTuple):
    """Which columns and rows are basic (1), at their lower (0) or upper bound (2), free at 0 (3)."""

    columns: NDArray[np.int8]
    rows: NDArray[np.int8]


class Engine(Protocol):
    """A live LP: minimise cost x, row_lower <= A x <= row_upper, bounds on x."""

    def load(self, problem: pulp.LpProblem, variables: Sequence[pulp.LpVariable]) -> None:
        """Take a PuLP problem as the first rows and columns, in the order of `variables`."""

    def add_rows(self, upper: Real, start: Int, column: Index, factor: Real) -> None:
        """Append rows `<= upper` over existing columns."""

    def add_columns(self, cost: Real, upper: Real, start: Int, row: Index, use: Real) -> None:
        """Append columns with bounds [0, upper]."""

    def set_column_upper(self, column: Index, upper: Real) -> None:
        """Change upper bounds of columns."""

    def set_column_cost(self, column: Index, cost: Real) -> None:
        """Change costs of columns."""

    def set_row_upper(self, row: Index, upper: Real) -> None:
        """Change right-hand sides."""

    def run(self, method: str) -> Run:
        """Solve by "ipm" (with crossover), "dual" or "primal" simplex, the latter from the last basis."""

    def point(self) -> tuple[Real, Real]:
        """Return x and the rows' duals, each at or below 0 in a minimisation with rows <=."""

    def basis(self) -> Basis:
        """Return the last basis."""


class HighsEngine:
    """HiGHS, through the model that PuLP built."""

    def __init__(self, *, iterations_max: int = SIMPLEX_ITERATIONS_MAX) -> None:
        """Prepare an engine without a model."""
        self._iterations_max = iterations_max
        self._highs: Any = None

    def load(self, problem: pulp.LpProblem, variables: Sequence[pulp.LpVariable]) -> None:
        """Take a PuLP problem as the first rows and columns, in the order of `variables`."""
        solver = _PulpHighs(variables)
        solver.buildSolverModel(problem)
        self._highs = problem.solverModel
        for option, value in (
            ("threads", THREADS),
            ("random_seed", 0),
            ("primal_feasibility_tolerance", FEASIBILITY_TOLERANCE),
            ("dual_feasibility_tolerance", FEASIBILITY_TOLERANCE),
            ("simplex_iteration_limit", self._iterations_max),
        ):
            self._highs.setOptionValue(option, value)

    def add_rows(self, upper: Real, start: Int, column: Index, factor: Real) -> None:
        """Append rows `<= upper` over existing columns."""
        lower = np.full(len(upper), -highspy.kHighsInf)
        self._highs.addRows(
            len(upper), lower, upper, len(column), start[:-1].astype(np.int32), column.astype(np.int32), factor
        )

    def add_columns(self, cost: Real, upper: Real, start: Int, row: Index, use: Real) -> None:
        """Append columns with bounds [0, upper]."""
        lower = np.zeros(len(cost))
        self._highs.addCols(
            len(cost), cost, lower, upper, len(row), start[:-1].astype(np.int32), row.astype(np.int32), use
        )

    def set_column_upper(self, column: Index, upper: Real) -> None:
        """Change upper bounds of columns."""
        self._highs.changeColsBounds(len(column), column.astype(np.int32), np.zeros(len(column)), upper)

    def set_column_cost(self, column: Index, cost: Real) -> None:
        """Change costs of columns."""
        self._highs.changeColsCost(len(column), column.astype(np.int32), cost)

    def set_row_upper(self, row: Index, upper: Real) -> None:
        """Change right-hand sides."""
        lower = np.full(len(row), -highspy.kHighsInf)
        self._highs.changeRowsBounds(len(row), row.astype(np.int32), lower, upper)

    def run(self, method: str) -> Run:
        """Solve by "ipm" (with crossover), "dual" or "primal" simplex, the latter from the last basis."""
        highs = self._highs
        highs.setOptionValue("solver", "ipx" if method == "ipm" else "simplex")
        highs.setOptionValue("presolve", "on" if method == "ipm" else "off")
        highs.setOptionValue("simplex_strategy", 4 if method == "primal" else 1)
        highs.run()
        info = highs.getInfo()
        optimal = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        counts = (info.simplex_iteration_count, info.ipm_iteration_count, info.crossover_iteration_count)
        return Run(optimal, sum(max(0, count) for count in counts))

    def point(self) -> tuple[Real, Real]:
        """Return x and the rows' duals, each at or below 0 in a minimisation with rows <=."""
        solution = self._highs.getSolution()
        return np.array(solution.col_value), np.array(solution.row_dual)

    def basis(self) -> Basis:
        """Return the last basis."""
        basis = self._highs.getBasis()
        return Basis(
            np.array([int(status) for status in basis.col_status], np.int8),
            np.array([int(status) for status in basis.row_status], np.int8),
        )


class Skeleton(NamedTuple):
    """A PuLP problem as arrays: bounds [0, column_upper], rows <= row_upper, entries row by row."""

    cost: Real
    column_upper: Real
    row_upper: Real
    start: Int
    column: Index
    value: Real


def skeleton(problem: pulp.LpProblem, variables: Sequence[pulp.LpVariable]) -> Skeleton:
    """Return the arrays of a minimisation whose rows are all `<=`; columns in the order of `variables`."""
    place = {id(variable): number for number, variable in enumerate(variables)}
    constraints = problem.constraints()
    start, column, value = [0], [], []
    for constraint in constraints:
        for variable, factor in constraint.items():
            column.append(place[id(variable)])
            value.append(factor)
        start.append(len(column))
    cost = np.zeros(len(variables))
    for variable, factor in problem.objective.items():
        cost[place[id(variable)]] = factor
    return Skeleton(
        cost=cost,
        column_upper=np.array([highspy.kHighsInf if each.upBound is None else each.upBound for each in variables]),
        row_upper=np.array([-float(constraint.constant) for constraint in constraints]),
        start=np.array(start, np.int64),
        column=np.array(column, np.int32),
        value=np.array(value, np.float64),
    )


class _PulpHighs(pulp.HiGHS):  # type: ignore[misc]  # pulp ships no types
    """PuLP's HiGHS adapter, handing its rows over as one array instead of one call each."""

    def __init__(self, variables: Sequence[pulp.LpVariable]) -> None:
        """Keep the order of columns: PuLP's own is by name."""
        super().__init__(msg=False)
        self._variables = variables

    def buildSolverModel(self, lp: pulp.LpProblem) -> None:  # noqa: N802 - PuLP's name
        """Leave a loaded HiGHS in lp.solverModel; columns in the order given."""
        first = skeleton(lp, self._variables)
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(first.cost), len(first.row_upper)
        model.col_cost_ = first.cost
        model.col_lower_ = np.zeros(len(first.cost))
        model.col_upper_ = first.column_upper
        model.row_lower_ = np.full(len(first.row_upper), -highspy.kHighsInf)
        model.row_upper_ = first.row_upper
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = first.start.astype(np.int32)
        model.a_matrix_.index_ = first.column
        model.a_matrix_.value_ = first.value
        highs: Any = highspy.Highs
        lp.solverModel = highs()
        lp.solverModel.setOptionValue("output_flag", False)
        lp.solverModel.passModel(model)
