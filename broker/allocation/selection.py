"""The selection problem as a mixed-integer programme: at most one column per job, rows within their steps.

    max  sum_c value_c x_c - sum_k cost_k s_k
         sum over job j's columns x <= 1          (= 1 where it must have one)
         sum_c use_rc x_c - sum_k s_k <= base_r   for every row
         x whole, 0 <= s_k <= units_k

`crossing` poses a small one over spans alone, `finish` one over all columns that can still matter.
HiGHS solves it on one thread with limits that are counts, so an equal problem has an equal answer.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, cast

import highspy
import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import Flag, Int, Real

# Millions of micro-credits are what HiGHS sees: its absolute tolerances then mean little money.
_MONEY: Final = 1e-6
_GAP: Final = 1e-6
_WHOLE: Final = 0.5
# HiGHS's own default.
_HEURISTIC_EFFORT: Final = 0.05


class Problem(NamedTuple):
    """Columns with their values and uses (CSR: entry_start, entry_row, entry_use), and rows with steps.

    `job` numbers the groups from 0; `must` says which of them need a column. Rows are numbered
    from 0 too; the steps of row r are step_start[r] up to step_start[r + 1].
    """

    job: Int
    value: Real
    entry_start: Int
    entry_row: Int
    entry_use: Real
    must: Flag
    base: Real
    step_start: Int
    step_units: Real
    step_cost: Real


class Selection(NamedTuple):
    """Which columns were chosen, a proved upper bound of the objective, and the nodes it took.

    `chosen` is None where no whole solution was found.
    """

    chosen: NDArray[np.bool_] | None
    bound: float
    nodes: int


def select(
    problem: Problem, *, nodes_max: int, gap: float = _GAP, start: Flag | None = None, heuristics: bool = True
) -> Selection:
    """Solve a selection problem, from the columns of `start` if given; `heuristics` take half of the time."""
    columns, steps = len(problem.job), len(problem.step_units)
    lp = _model(problem, np.zeros(columns))
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns + [highspy.HighsVarType.kContinuous] * steps
    engine: Any = cast("Any", highspy.Highs)()
    for option, setting in (
        ("output_flag", False),
        ("threads", 1),
        ("random_seed", 0),
        ("mip_rel_gap", gap),
        ("mip_abs_gap", 0.0),
        ("mip_feasibility_tolerance", 1e-7),
        ("mip_max_nodes", nodes_max),
        ("mip_max_stall_nodes", nodes_max),
        ("mip_heuristic_effort", _HEURISTIC_EFFORT if heuristics else 0.0),
    ):
        engine.setOptionValue(option, setting)
    engine.passModel(lp)
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = np.concatenate([start.astype(np.float64), _steps_for(problem, start)]).tolist()
        engine.setSolution(solution)
    engine.run()
    info = engine.getInfo()
    bound = float(info.mip_dual_bound) / _MONEY
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Selection(None, bound, int(info.mip_node_count))
    x = np.array(engine.getSolution().col_value[:columns])
    return Selection(x > _WHOLE, bound, int(info.mip_node_count))


def relaxed(problem: Problem, extra: Real) -> tuple[Real, Real]:
    """Return how much of every column the problem takes where none need be whole, and each one's reduced cost (>= 0).

    `extra` is added to the columns' values: among equal solutions the one with most of it is found.
    """
    engine: Any = cast("Any", highspy.Highs)()
    for option, setting in (("output_flag", False), ("threads", 1), ("random_seed", 0)):
        engine.setOptionValue(option, setting)
    engine.passModel(_model(problem, extra))
    engine.run()
    solution, columns = engine.getSolution(), len(problem.job)
    x = np.array(solution.col_value[:columns])
    return x, np.maximum(0.0, -np.array(solution.col_dual[:columns]) / _MONEY)


def _model(problem: Problem, extra: Real) -> Any:  # noqa: ANN401 - highspy has no types
    """Return the programme with `extra` added to the columns' values, nothing whole yet."""
    columns, steps, rows = len(problem.job), len(problem.step_units), len(problem.base)
    groups = len(problem.must)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns + steps, groups + rows
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = np.concatenate([problem.value + extra, -problem.step_cost]) * _MONEY
    lp.col_lower_ = np.zeros(columns + steps)
    lp.col_upper_ = np.concatenate([np.ones(columns), problem.step_units])
    lp.row_lower_ = np.concatenate([np.where(problem.must, 1.0, -highspy.kHighsInf), np.full(rows, -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([np.ones(groups), problem.base])
    # One entry in the job's row ahead of each column's own entries, then one entry per step.
    counts = np.diff(problem.entry_start) + 1
    starts = np.concatenate([[0], np.cumsum(counts), np.cumsum(counts)[-1:].repeat(steps) + np.arange(1, steps + 1)])
    if columns == 0:
        starts = np.arange(steps + 1)
    index = np.empty(int(starts[-1]), np.int32)
    entry = np.empty(int(starts[-1]))
    head = starts[:columns]
    index[head], entry[head] = problem.job, 1.0
    body = np.ones(len(index), np.bool_)
    body[head] = False
    body[len(index) - steps :] = False
    index[body], entry[body] = groups + problem.entry_row, problem.entry_use
    step_row = np.repeat(np.arange(rows), np.diff(problem.step_start))
    index[len(index) - steps :], entry[len(index) - steps :] = groups + step_row, -1.0
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = starts
    lp.a_matrix_.index_ = index
    lp.a_matrix_.value_ = entry
    return lp


def _steps_for(problem: Problem, chosen: Flag) -> Real:
    """Return how much of every step the chosen columns need, cheapest first."""
    owner = np.repeat(np.arange(len(problem.job)), np.diff(problem.entry_start))
    inside = chosen[owner]
    use = np.bincount(problem.entry_row[inside], problem.entry_use[inside], minlength=len(problem.base))
    left = np.maximum(0.0, use - problem.base)
    taken = np.zeros(len(problem.step_units))
    for row in np.flatnonzero(left):
        for step in range(problem.step_start[row], problem.step_start[row + 1]):
            taken[step] = min(left[row], problem.step_units[step])
            left[row] -= taken[step]
    return taken
