from __future__ import annotations

import highspy
import numpy as np
import pytest

from broker.allocation import oracle
from broker.allocation.compile import compile_market
from broker.allocation.generate import generate
from broker.allocation.instance import Instance
from broker.allocation.relaxation import GAP, Limits, relax
from broker.allocation.solver import solve
from tests.broker.allocation import large_instances, small_instances
from tests.broker.allocation.test_oracle import every_column


def full_enumeration(instance: Instance) -> float:
    """Return the optimum of the LP over every column of every job, written out anew."""
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    jobs = instance.job_count
    for job in range(jobs):
        highs.addRow(1.0 if instance.jobs.must[job] else 0.0, 1.0, 0, [], [])
    for row in range(instance.row_count):
        highs.addRow(-highspy.kHighsInf, float(instance.rows.base[row]), 0, [], [])
        for step in range(instance.rows.step_start[row], instance.rows.step_start[row + 1]):
            highs.addCol(
                float(instance.rows.step_cost[step]),
                0.0,
                float(instance.rows.step_units[step]),
                1,
                [jobs + row],
                [-1.0],
            )
    for job in range(jobs):
        for _, _, _, value, uses in every_column(instance, job):
            rows = [job, *(jobs + row for row in uses)]
            highs.addCol(-float(value), 0.0, highspy.kHighsInf, len(rows), rows, [1.0, *map(float, uses.values())])
    highs.run()
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return -highs.getObjectiveValue()


@pytest.mark.parametrize("seed", range(50))
def test_relaxation_reaches_the_optimum_over_every_column(seed: int) -> None:
    instance = small_instances.small(seed)
    found = relax(instance)
    optimum = full_enumeration(instance)
    in_floats = oracle.dual(instance, found.y, oracle.best(instance, found.y))
    assert found.optimal
    assert in_floats == pytest.approx(optimum, rel=GAP, abs=1.0)
    assert found.lp_objective == pytest.approx(optimum, rel=GAP, abs=1.0)
    assert found.bound >= optimum * (1 - 1e-9) - 1


# On one of fifty seeds two optimal duals remain apart: the perturbation does not decide between them. A
# round's own path is fixed, so its clearing is the same all the same; a live model kept between rounds must wait.
UNDECIDED = pytest.param(8, marks=pytest.mark.xfail(reason="two dual vertices trade the prices of two rows"))


@pytest.mark.parametrize("seed", [*range(8), UNDECIDED, *range(9, 50)])
def test_prices_are_the_same_whole_numbers_whatever_path_the_solver_takes(seed: int) -> None:
    instance = small_instances.small(seed)
    cold = relax(instance, methods=("dual", "primal"))
    other = relax(instance, methods=("ipm", "dual"))
    warm = relax(instance, last_prices=cold.prices * 1.05, methods=("primal", "ipm"))
    assert np.array_equal(cold.prices, other.prices)
    assert np.array_equal(cold.prices, warm.prices)


@pytest.mark.parametrize("family", ["A", "B"])
@pytest.mark.parametrize("feature", ["", "ask_curves", "mixed_types", "slots", "budgets", "floors", "incumbents"])
def test_the_bound_of_a_generated_market_is_above_what_the_lp_reaches(family: str, feature: str) -> None:
    # As many as the name has letters: another market for each feature.
    tables = generate(family, 12, 6, len(feature), features=(feature,) if feature else ())
    instance = compile_market(tables).instance
    found = relax(instance)
    assert found.optimal
    assert 0 <= found.gap <= GAP
    # Welfare that is placed is never above the bound, whatever prices the bound is taken at.
    assert solve(instance).welfare <= min(found.bound, oracle.dual_exact(instance, found.prices * 9 // 10))


def test_a_stopped_relaxation_still_states_a_valid_bound_and_says_that_it_stopped() -> None:
    instance = large_instances.large(100, 10, "B", 1)
    whole, cut = relax(instance), relax(instance, limits=Limits(iterations=1), last_prices=np.zeros(instance.row_count))
    assert whole.optimal
    assert not cut.optimal
    assert cut.bound >= whole.lp_objective
    assert cut.bound == oracle.dual_exact(instance, cut.prices)
