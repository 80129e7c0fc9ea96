"""CLP behind `engine.Engine`: an optional second LP solver (the extra `clp`, package cylp), quicker on cold LPs.

cylp cannot append columns to a live model, so the arrays are kept here and a changed model is loaded anew, from the
basis that the last run ended with; to the caller it is as live as HiGHS. It has no interior point: "ipm" runs its
initial solve, with presolve.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import pulp

from broker.allocation.engine import FEASIBILITY_TOLERANCE, SIMPLEX_ITERATIONS_MAX, Basis, Run, skeleton
from broker.allocation.errors import EngineMissingError
from broker.allocation.instance import Index, Int, Real

INFINITY: Final = 1e308
_FREE, _BASIC, _AT_UPPER, _AT_LOWER = 0, 1, 2, 3
_OPTIMAL: Final = 0


class ClpEngine:
    """CLP's simplex over arrays that this object keeps."""

    def __init__(self, *, iterations_max: int = SIMPLEX_ITERATIONS_MAX) -> None:
        """Prepare an engine without a model. Raises EngineMissingError where cylp is not installed."""
        try:
            self._simplex: Any = import_module("cylp.cy.CyClpSimplex").CyClpSimplex
            self._matrix: Any = import_module("cylp.cy.CyCoinPackedMatrix").CyCoinPackedMatrix
        except ImportError as error:
            raise EngineMissingError(
                f"the LP engine clp needs the package cylp ({error}); pip install 'hansa[clp]', or use highs"
            ) from error
        self._iterations_max = iterations_max
        self._cost = self._upper = self._row_upper = np.zeros(0)
        self._entries: list[tuple[Index, Index, Real]] = []
        self._basis: tuple[Any, Any] | None = None
        self._x = self._duals = np.zeros(0)

    def load(self, problem: pulp.LpProblem, variables: Sequence[pulp.LpVariable]) -> None:
        """Take a PuLP problem as the first rows and columns, in the order of `variables`."""
        first = skeleton(problem, variables)
        self._cost, self._row_upper = first.cost, first.row_upper
        self._upper = np.minimum(first.column_upper, INFINITY)
        rows = np.repeat(np.arange(len(first.row_upper), dtype=np.int32), np.diff(first.start))
        self._entries = [(rows, first.column, first.value)]

    def add_rows(self, upper: Real, start: Int, column: Index, factor: Real) -> None:
        """Append rows `<= upper` over existing columns."""
        rows = len(self._row_upper) + np.repeat(np.arange(len(upper)), np.diff(start))
        self._entries.append((rows.astype(np.int32), column.astype(np.int32), factor))
        self._row_upper = np.append(self._row_upper, upper)

    def add_columns(self, cost: Real, upper: Real, start: Int, row: Index, use: Real) -> None:
        """Append columns with bounds [0, upper]."""
        columns = len(self._cost) + np.repeat(np.arange(len(cost)), np.diff(start))
        self._entries.append((row.astype(np.int32), columns.astype(np.int32), use))
        self._cost, self._upper = np.append(self._cost, cost), np.append(self._upper, upper)

    def set_column_upper(self, column: Index, upper: Real) -> None:
        """Change upper bounds of columns."""
        self._upper[column] = upper

    def set_column_cost(self, column: Index, cost: Real) -> None:
        """Change costs of columns."""
        self._cost[column] = cost

    def set_row_upper(self, row: Index, upper: Real) -> None:
        """Change right-hand sides."""
        self._row_upper[row] = upper

    def run(self, method: str) -> Run:
        """Solve by "ipm" (its initial solve), "dual" or "primal" simplex, the latter two from the last basis."""
        clp = self._loaded()
        if method == "ipm":
            clp.initialSolve()
        elif method == "primal":
            clp.primal()
        else:
            clp.dual()
        self._x = np.array(clp.primalVariableSolution)
        self._duals = np.array(clp.dualConstraintSolution)
        self._basis = clp.getBasisStatus()
        return Run(clp.getStatusCode() == _OPTIMAL, max(0, int(clp.iteration)))

    def point(self) -> tuple[Real, Real]:
        """Return x and the rows' duals, each at or below 0 in a minimisation with rows <=."""
        return self._x, self._duals

    def basis(self) -> Basis:
        """Return the last basis."""
        assert self._basis is not None, "a basis is what a run leaves"
        ours = np.zeros(4, np.int8)
        ours[[_FREE, _BASIC, _AT_UPPER, _AT_LOWER]] = 3, 1, 2, 0
        columns, rows = self._basis
        # A row has no lower bound here: one that is not basic is at its upper, whatever sign its slack has.
        return Basis(ours[columns], np.where(rows == _BASIC, 1, 2).astype(np.int8))

    def _loaded(self) -> Any:  # noqa: ANN401  cylp ships no types
        """Return a simplex with the model as it is now, at the last basis: new columns at 0, new rows slack."""
        columns, rows = len(self._cost), len(self._row_upper)
        clp = self._simplex()
        clp.logLevel = 0
        clp.primalTolerance = clp.dualTolerance = FEASIBILITY_TOLERANCE
        clp.maxNumIteration = self._iterations_max
        # The matrix takes its size from its entries: a nought in the last corner states it.
        corner = (np.array([rows - 1]), np.array([columns - 1]), np.zeros(1))
        row, column, value = (np.concatenate(parts) for parts in zip(*self._entries, corner, strict=True))
        clp.loadProblem(
            self._matrix(True, row.astype(np.int32), column.astype(np.int32), value.astype(np.float64)),
            np.zeros(columns),
            self._upper.astype(np.float64),
            self._cost.astype(np.float64),
            np.full(rows, -INFINITY),
            self._row_upper.astype(np.float64),
        )
        if self._basis is not None:
            old_columns, old_rows = self._basis
            status = np.full(columns, _AT_LOWER, np.int32), np.full(rows, _BASIC, np.int32)
            status[0][: len(old_columns)], status[1][: len(old_rows)] = old_columns, old_rows
            clp.setBasisStatus(*status)
        return clp
