"""Small linear programmes on HiGHS: maximise, rows at most, columns within bounds, duals not negative."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray

from broker.backtest.errors import BacktestError

Real = NDArray[np.float64]
Int = NDArray[np.int64]

# HiGHS wants one number of threads for all models of a process.
THREADS: Final = 1


class Matrix(NamedTuple):
    """Columns one after the other: entries of column c are start[c] up to start[c + 1]."""

    start: Int
    row: Int
    use: Real


class Solution(NamedTuple):
    """An optimal point: columns' values and rows' duals (what one more unit of a row is worth)."""

    objective: float
    x: Real
    duals: Real


def maximise(worth: Real, upper: Real, matrix: Matrix, limit: Real) -> Solution:
    """Maximise worth x with 0 <= x <= upper and rows at most `limit`.

    Raises BacktestError where HiGHS reports no optimum.
    """
    if not len(worth):
        return Solution(0.0, np.zeros(0), np.zeros(len(limit)))
    scale = max(1e-12, float(np.abs(worth).max()))
    lp: Any = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(worth), len(limit)
    lp.col_cost_ = -worth / scale
    lp.col_lower_, lp.col_upper_ = np.zeros(len(worth)), upper
    lp.row_lower_, lp.row_upper_ = np.full(len(limit), -highspy.kHighsInf), limit
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]  # highspy's own signature lacks types
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", THREADS)
    solver.setOptionValue("random_seed", 0)
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise BacktestError(f"HiGHS ended a linear programme of the backtest as {status.name}; report this as a defect")
    solution = solver.getSolution()
    # As a minimisation, a binding upper row has a dual of at most 0.
    duals = np.maximum(0.0, -np.array(solution.row_dual)) * scale
    return Solution(-float(solver.getInfo().objective_function_value) * scale, np.array(solution.col_value), duals)
