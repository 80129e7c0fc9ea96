"""Our answer to POP's space-sharing benchmark: jobs that are alike are one row, exactly.

The LP is convex and does not change when two jobs of one type change places, so the mean of an
optimal allocation over such changes is optimal: an LP over job *types* and pairs of types has the
same optimum, with some thousand columns where that over jobs has millions. `spread` gives every
job its share again. HiGHS solves it, as everywhere in Hansa. The market itself sells whole GPUs
and shares none: this is the comparison's own code, not the product's.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import highspy
import numpy as np

from broker.allocation.instance import Int, Real
from tests.benchmarks.market.instances import SharedWorkers
from tests.benchmarks.market.peers.gavel import fair_speed


class AlikeAnswer(NamedTuple):
    """The least normalised speed, what each type and pair gets in all, columns and CPU seconds.

    `left`, `right`, `worker` [column]: types of the pair (right -1: alone) and the GPU type;
    `total` [column]: GPUs' worth of time.
    """

    objective: float
    left: Int
    right: Int
    worker: Int
    total: Real
    seconds: float


def max_min_shared(problem: SharedWorkers) -> AlikeAnswer:
    """Maximise the least normalised speed of all jobs."""
    started = time.process_time()
    types, workers = problem.alone.shape
    members = np.bincount(problem.job_type, minlength=types)
    left, right, worker = _columns(members, workers)
    alone, fair = right < 0, fair_speed(problem)
    speed_left = np.where(alone, problem.alone[left, worker], problem.beside[left, right, worker]) / fair[left]
    speed_right = np.where(alone, 0.0, problem.beside[right, left, worker] / fair[right])
    present = np.flatnonzero(members)
    row_of = np.full(types, -1)
    row_of[present] = np.arange(len(present))
    # Rows: speed of a type - members x least >= 0, time of a type <= members, workers. The last column is the least.
    columns, rows = len(left) + 1, 2 * len(present) + workers
    matrix = np.zeros((columns, rows))
    each = np.arange(len(left))
    np.add.at(matrix, (each, row_of[left]), speed_left)
    np.add.at(matrix, (each, len(present) + row_of[left]), 1.0)
    both = each[~alone]
    np.add.at(matrix, (both, row_of[right[~alone]]), speed_right[~alone])
    np.add.at(matrix, (both, len(present) + row_of[right[~alone]]), 1.0)
    matrix[each, 2 * len(present) + worker] = 1.0
    matrix[-1, : len(present)] = -members[present]
    low = np.concatenate([np.zeros(len(present)), np.full(len(present) + workers, -highspy.kHighsInf)])
    high = np.concatenate([np.full(len(present), highspy.kHighsInf), members[present], problem.workers])
    x = _maximise_last(matrix, low, high)
    return AlikeAnswer(float(x[-1]), left, right, worker, x[:-1], time.process_time() - started)


def spread(problem: SharedWorkers, answer: AlikeAnswer) -> Real:
    """Return the speed that each job then has, normalised, when its type's time is dealt evenly."""
    types = len(problem.alone)
    fair, speed = fair_speed(problem), np.zeros(types)
    alone = answer.right < 0
    a, b, w, total = answer.left, answer.right, answer.worker, answer.total
    np.add.at(speed, a, total * np.where(alone, problem.alone[a, w], problem.beside[a, b, w]))
    np.add.at(speed, b[~alone], (total * problem.beside[b, a, w])[~alone])
    members = np.bincount(problem.job_type, minlength=types)
    return (speed / np.maximum(1, members) / fair)[problem.job_type]


def _columns(members: Int, workers: int) -> tuple[Int, Int, Int]:
    """Return (left, right, worker) of all types alone and all pairs of types that two jobs can form."""
    present = np.flatnonzero(members)
    a, b = np.triu_indices(len(present))
    a, b = present[a], present[b]
    possible = (a != b) | (members[a] > 1)
    left = np.concatenate([present, a[possible]]).repeat(workers)
    right = np.concatenate([np.full(len(present), -1), b[possible]]).repeat(workers)
    return left, right, np.tile(np.arange(workers), len(left) // workers)


def _maximise_last(matrix: Real, low: Real, high: Real) -> Real:
    """Return x >= 0 that maximises its last entry, low <= matrix.T @ x <= high."""
    columns, rows = matrix.shape
    column, row = np.nonzero(matrix)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_, lp.sense_ = columns, rows, highspy.ObjSense.kMaximize
    lp.col_cost_ = np.append(np.zeros(columns - 1), 1.0)
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.full(columns, highspy.kHighsInf)
    lp.row_lower_, lp.row_upper_ = low, high.astype(np.float64)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.searchsorted(column, np.arange(columns + 1)).astype(np.int32)
    lp.a_matrix_.index_ = row.astype(np.int32)
    lp.a_matrix_.value_ = matrix[column, row]
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS ended {solver.getModelStatus()} on the space-sharing LP.")
    return np.array(solver.getSolution().col_value)
