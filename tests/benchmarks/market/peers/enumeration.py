"""The plain way: every column in one PuLP model, solved by HiGHS as an LP or as a MIP.

Only for markets of a few hundred jobs. The model is built from `listing`, not from the solver's own
oracle, so that both sides' objectives can be held against each other.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import numpy as np
import pulp

from broker.allocation.instance import Instance
from tests.benchmarks.market.peers.listing import Listing, list_columns

COLUMNS_MAX: Final = 400_000
RELATIVE_GAP: Final = 1e-6


class EnumerationAnswer(NamedTuple):
    """Welfare found and proved bound, in micro-credits per hour; columns; CPU seconds in all and of HiGHS."""

    welfare: float
    bound: float
    columns: int
    seconds: float
    solver_s: float


def solve(instance: Instance, *, whole: bool, limit_s: float) -> EnumerationAnswer:
    """Solve a market with all its columns, `whole` placements or shares of them."""
    started = time.process_time()
    listing = list_columns(instance)
    columns = len(listing.value)
    if columns > COLUMNS_MAX:
        raise ValueError(f"{columns} columns are too many to enumerate: at most {COLUMNS_MAX}. Take a smaller market.")
    problem = _model(instance, listing, whole=whole)
    solver = pulp.HiGHS(msg=False, timeLimit=limit_s, gapRel=RELATIVE_GAP, threads=1)
    stated = time.process_time()
    problem.solve(solver)
    solver_s = time.process_time() - stated
    info = problem.solverModel.getInfo()
    found = info.objective_function_value
    # HiGHS through PuLP minimises the negated objective of a maximisation; its bound has the same sign.
    sign = 1.0 if np.sign(found) == np.sign(pulp.value(problem.objective) or found) else -1.0
    bound = info.mip_dual_bound if whole else found
    return EnumerationAnswer(sign * found, sign * bound, columns, time.process_time() - started, solver_s)


def _model(instance: Instance, listing: Listing, *, whole: bool) -> pulp.LpProblem:
    problem = pulp.LpProblem("every_column", pulp.LpMaximize)
    kind = pulp.LpInteger if whole else pulp.LpContinuous
    columns = [problem.add_variable(f"x{c}", 0, 1, kind) for c in range(len(listing.value))]
    rows = instance.rows
    steps = [problem.add_variable(f"s{k}", 0, int(units)) for k, units in enumerate(rows.step_units)]
    problem.setObjective(
        pulp.LpAffineExpression(
            [*zip(columns, listing.value.tolist(), strict=True), *zip(steps, (-rows.step_cost).tolist(), strict=True)]
        )
    )
    for job in range(instance.job_count):
        mine = pulp.LpAffineExpression([(x, 1) for x in columns[listing.start[job] : listing.start[job + 1]]])
        problem += (mine == 1 if instance.jobs.must[job] else mine <= 1), f"job{job}"
    uses: list[list[tuple[pulp.LpVariable, int]]] = [[] for _ in range(instance.row_count)]
    owner = np.repeat(np.arange(len(listing.value)), np.diff(listing.entry_start))
    for c, row, use in zip(owner.tolist(), listing.entry_row.tolist(), listing.entry_use.tolist(), strict=True):
        uses[row].append((columns[c], use))
    for row, entries in enumerate(uses):
        taken = [(steps[k], -1) for k in range(rows.step_start[row], rows.step_start[row + 1])]
        problem += pulp.LpAffineExpression([*entries, *taken]) <= int(rows.base[row]), f"row{row}"
    return problem
