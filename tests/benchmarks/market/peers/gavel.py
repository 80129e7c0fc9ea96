"""Gavel's allocation LPs in cvxpy, from the paper (Narayanan et al., OSDI'20, sections 3 and 4).

`max_sum` maximises the sum of effective throughputs, `max_min` the least throughput over that of an
equal split (least attained service), `max_min_shared` the same where pairs of jobs may share a GPU
(section 3.1). Written like the paper's own cvxpy code: matrices of all jobs and worker types.
`seconds` counts from the matrices to the allocation, `solver_s` the solver alone; both CPU time.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from broker.allocation.instance import Int, Real
from tests.benchmarks.market.instances import SharedWorkers, TimeShares

SOLVERS: Final = ("ECOS", "CLARABEL", "HIGHS")
# The solvers' own tolerances: tighter ones make ECOS give up on some of these problems.
_OPTIONS: Final[dict[str, dict[str, object]]] = {
    "ECOS": {},
    "CLARABEL": {"max_threads": 1},
    "HIGHS": {"highs_options": {"threads": 1}},
    "HIGHS-IPM": {"highs_options": {"threads": 1, "solver": "ipm"}},
}


class Answer(NamedTuple):
    """What a peer found: objective, allocation, and the CPU seconds that it took."""

    objective: float
    allocation: Real
    seconds: float
    solver_s: float


def max_sum(problem: TimeShares, solver: str) -> Answer:
    """Maximise the sum of throughputs: `ThroughputSum` of section 4.2 without its prices."""
    started = time.process_time()
    x = cp.Variable(problem.throughput.shape, nonneg=True)
    objective = cp.Maximize(cp.sum(cp.multiply(problem.throughput, x)))
    return _solved(cp.Problem(objective, _feasible(x, problem)), x, solver, started)


def max_min(problem: TimeShares, solver: str) -> Answer:
    """Maximise the least of throughput x scale factor over that of an equal split (section 4.1).

    A job that runs nowhere has no share of anything: it would only make everyone's least nought.
    """
    started = time.process_time()
    x = cp.Variable(problem.throughput.shape, nonneg=True)
    runs = np.flatnonzero(problem.throughput.any(axis=1))
    fair = problem.throughput[runs] @ (problem.workers / problem.workers.sum())
    normalised = problem.throughput[runs] * (problem.gpus[runs] / fair)[:, None]
    objective = cp.Maximize(cp.min(cp.sum(cp.multiply(normalised, x[runs]), axis=1)))
    return _solved(cp.Problem(objective, _feasible(x, problem)), x, solver, started)


def max_min_shared(problem: SharedWorkers, solver: str) -> Answer:
    """Maximise the least normalised throughput with a column for each job, and pair, on each type.

    The allocation lists singles (job-major), then pairs i < j, by worker type innermost.
    """
    started = time.process_time()
    normalised, time_used, worker_used = shared_columns(problem)
    x = cp.Variable(normalised.shape[1], nonneg=True)
    constraints = [time_used @ x <= 1, worker_used @ x <= problem.workers]
    return _solved(cp.Problem(cp.Maximize(cp.min(normalised @ x)), constraints), x, solver, started)


def shared_columns(problem: SharedWorkers) -> tuple[sp.csr_array, sp.csr_array, sp.csr_array]:
    """Return [job, column] normalised speeds, [job, column] and [worker type, column] time used."""
    jobs, types = len(problem.job_type), len(problem.workers)
    left, right = np.triu_indices(jobs, 1)
    kinds = problem.job_type
    alone = problem.alone[kinds] / fair_speed(problem)[kinds][:, None]
    of_left = problem.beside[kinds[left], kinds[right]] / fair_speed(problem)[kinds[left]][:, None]
    of_right = problem.beside[kinds[right], kinds[left]] / fair_speed(problem)[kinds[right]][:, None]
    members = np.concatenate([np.arange(jobs), left, right]).repeat(types)
    single = np.arange(jobs * types)
    pair = jobs * types + np.arange(len(left) * types)
    columns = np.concatenate([single, pair, pair])
    speeds = np.concatenate([alone.ravel(), of_left.ravel(), of_right.ravel()])
    shape = (jobs, len(single) + len(pair))
    every = np.arange(shape[1])
    return (
        sp.csr_array((speeds, (members, columns)), shape=shape),
        sp.csr_array((np.ones(len(columns)), (members, columns)), shape=shape),
        sp.csr_array((np.ones(shape[1]), (every % types, every)), shape=(types, shape[1])),
    )


def fair_speed(problem: SharedWorkers) -> Real:
    """Return the speed of each job type when its time is split over the workers equally."""
    return problem.alone @ (problem.workers / problem.workers.sum())


def _feasible(x: cp.Variable, problem: TimeShares) -> list[cp.Constraint]:
    gpus: Int = problem.gpus[:, None] * np.ones((1, len(problem.workers)), np.int64)
    return [cp.sum(x, axis=1) <= 1, cp.sum(cp.multiply(gpus, x), axis=0) <= problem.workers]


def _solved(problem: cp.Problem, x: cp.Variable, solver: str, started: float) -> Answer:
    name, options = solver.partition("-")[0], _OPTIONS[solver]
    data, chain, inverse = problem.get_problem_data(name, solver_opts=options)
    stated = time.process_time()
    solution = chain.solve_via_data(problem, data, warm_start=False, verbose=False, solver_opts=options)
    solver_s = time.process_time() - stated
    problem.unpack_results(solution, chain, inverse)
    if problem.status not in {cp.OPTIMAL, cp.OPTIMAL_INACCURATE}:
        raise RuntimeError(f"{solver} ended {problem.status}: this comparison has no peer's answer.")
    return Answer(float(problem.value), np.asarray(x.value), time.process_time() - started, solver_s)
