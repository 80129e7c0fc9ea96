"""Sia's scheduling ILP in cvxpy, from the paper (Jayaram Subramanya et al., SOSP'23, section 3.4).

Binary A[job, configuration], at most one configuration per job, GPUs of each type bounded. With
its fairness power p = -0.5 the sum of normalised goodputs to the power p is minimised, and lambda
is charged for each job left without GPUs. Solved by HiGHS, and by CBC where cvxpy finds it.
"""

from __future__ import annotations

import time
from typing import Final

import cvxpy as cp
import numpy as np

from tests.benchmarks.market.instances import Configurations
from tests.benchmarks.market.peers.gavel import Answer

RELATIVE_GAP: Final = 1e-4


def solvers() -> tuple[str, ...]:
    """Return the MIP solvers that cvxpy has here."""
    return tuple(name for name in ("HIGHS", "CBC") if name in cp.installed_solvers())


def minimise(problem: Configurations, solver: str, limit_s: float) -> Answer:
    """Return Sia's best choice within a relative gap of 1e-4 or the time limit."""
    options: dict[str, dict[str, object]] = {
        "HIGHS": {"highs_options": {"mip_rel_gap": RELATIVE_GAP, "time_limit": limit_s, "threads": 1}},
        "CBC": {"allowableFractionGap": RELATIVE_GAP, "maximumSeconds": limit_s, "numberThreads": 1},
    }
    started = time.process_time()
    chosen = cp.Variable(problem.cost.shape, boolean=True)
    of_type = (problem.gpu_type[:, None] == np.arange(len(problem.capacity))) * problem.gpus[:, None]
    constraints = [cp.sum(chosen, axis=1) <= 1, cp.sum(chosen, axis=0) @ of_type <= problem.capacity]
    none = len(problem.cost) - cp.sum(chosen)
    model = cp.Problem(cp.Minimize(cp.sum(cp.multiply(problem.cost, chosen)) + problem.none_cost * none), constraints)
    model.solve(solver=solver, **options[solver])
    if chosen.value is None:
        raise RuntimeError(f"{solver} ended {model.status} without a choice: raise its time limit of {limit_s:.0f} s.")
    seconds = time.process_time() - started
    return Answer(float(model.value), np.rint(chosen.value), seconds, model.solver_stats.solve_time or 0.0)
