"""CLP gives the LPs' optima that HiGHS gives, live columns and rows included, and is asked for by name."""

from __future__ import annotations

import sys

import numpy as np
import pulp
import pytest

from broker.allocation.engine import Engine, HighsEngine
from broker.allocation.engines import engine_maker
from broker.allocation.errors import EngineMissingError
from broker.allocation.generate import generate
from broker.allocation.solve import clear_tables
from broker.allocation.table_rows import to_snapshot
from broker.allocation.verify import verify

try:
    import cylp
except ImportError:
    cylp = None

with_clp = pytest.mark.skipif(cylp is None, reason="needs cylp: pip install 'hansa[clp]'")


def grown(engine: Engine, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Solve a small packing LP, then with a new column and a new row, from the last basis."""
    x = [pulp.LpVariable(f"x{number}", 0, upper) for number, upper in enumerate((1, 1, None))]
    problem = pulp.LpProblem("packing", pulp.LpMinimize)
    problem += -3 * x[0] - 2 * x[1] - x[2]
    problem += x[0] + x[1] + x[2] <= 2.5
    problem += 2 * x[0] + x[1] <= 2
    engine.load(problem, x)
    assert engine.run("ipm").optimal
    engine.add_columns(np.array([-4.0]), np.array([0.75]), np.array([0, 2]), np.array([0, 1]), np.array([1.0, 1.0]))
    engine.add_rows(np.array([0.5]), np.array([0, 2]), np.array([1, 3]), np.array([1.0, 0.5]))
    engine.set_row_upper(np.array([1], np.int32), np.array([1.75]))
    engine.set_column_upper(np.array([0], np.int32), np.array([0.4]))
    engine.set_column_cost(np.array([2], np.int32), np.array([-1.5]))
    assert engine.run(method).optimal
    return engine.point()


@with_clp
@pytest.mark.parametrize("method", ["ipm", "dual", "primal"])
def test_a_live_lp_has_the_same_point_and_duals(method: str) -> None:
    ours, theirs = grown(engine_maker("clp")(), method), grown(HighsEngine(), method)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-9)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-9)
    assert np.all(ours[1] <= 1e-12)


@with_clp
def test_basic_columns_and_rows_are_as_many_as_rows() -> None:
    engine = engine_maker("clp")()
    grown(engine, "dual")
    basis = engine.basis()
    assert np.count_nonzero(basis.columns == 1) + np.count_nonzero(basis.rows == 1) == len(basis.rows) == 3


@with_clp
@pytest.mark.parametrize("family", ["A", "B"])
def test_rounds_solved_with_it_verify_and_prove_the_same_bound(family: str) -> None:
    tables = generate(family, jobs=40, sites=5, seed=3)
    ours, theirs = clear_tables(tables, engine="clp"), clear_tables(tables)
    assert verify(to_snapshot(tables), ours) == []
    assert "clp/cylp-" in ours.solver
    assert "clp" not in theirs.solver
    bounds = [each.certificate.bound_micros_per_hour for each in (ours, theirs)]
    assert bounds[0] == pytest.approx(bounds[1], rel=2e-6)
    assert ours.to_json() == clear_tables(tables, engine="clp").to_json()


def test_an_engine_that_is_not_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineMissingError, match="choose one of highs, clp"):
        engine_maker("cplex")
    monkeypatch.setitem(sys.modules, "cylp.cy.CyClpSimplex", None)
    with pytest.raises(EngineMissingError, match=r"pip install 'hansa\[clp\]'"):
        engine_maker("clp")
