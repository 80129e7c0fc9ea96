from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker.backtest.engine import Costs, Place, Policy, Simulation, State, summary
from broker.backtest.policies import POLICIES
from broker.backtest.policies.market import MarketAlone
from broker.backtest.workload import HALF, SAME, TWICE
from tests.broker.backtest.small import random_trace, sites_of, table, three_sites, trace_of, workload_of


class Script(Policy):
    """Does what it was told at each instant."""

    def __init__(self, *steps: tuple[float, dict[int, Place | None]]) -> None:
        self.steps = list(steps)

    def arrived(self, job: int) -> None:
        pass

    def ended(self, job: int, pool: int) -> None:
        pass

    def decide(self, now_s: float) -> None:
        while self.steps and self.steps[0][0] <= now_s + 1e-6:
            self.simulation.rearrange(self.steps.pop(0)[1])

    def wake_s(self) -> float:
        return self.steps[0][0] if self.steps else float("inf")


def _scene(tmp_path: Path, *jobs: str, patience: float | None = None):  # noqa: ANN202  a pair for the tests here
    trace = trace_of(tmp_path, *jobs, "999999,1,1,b")
    sites = sites_of(trace, a=("slow", "1", 4), b=("fast", "2", 8))
    return workload_of(trace, sites, table(tmp_path), patience=patience), sites


def test_a_job_at_home_takes_its_traced_time_and_pays_its_ask(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,2,a")
    run = Simulation(work, sites, Script((0.0, {0: Place(0, SAME)})), Costs(0, 0))
    run.run()
    got = summary(run)
    assert run.totals.end_s[0] == pytest.approx(3600)
    assert got.value[0] == pytest.approx(2 * 2.0)
    assert got.cost[0] == got.charge[0] == pytest.approx(2 * 1.0)
    assert got.welfare[0] == pytest.approx(2.0)


def test_a_move_keeps_progress_costs_a_restart_and_books_both_sites(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,2,a")
    # Half of the work at home; then at b, three times as fast, after 100 + 20 s with the GPUs held.
    script = Script((0.0, {0: Place(0, SAME)}), (1800.0, {0: Place(1, SAME, 3_000_000.0)}))
    run = Simulation(work, sites, script, Costs(restart_s=100, staging_s=20))
    run.run()
    got = summary(run)
    assert run.totals.end_s[0] == pytest.approx(1800 + 120 + 600)
    assert got.value[0] == pytest.approx(4.0)
    assert got.cost[0] == pytest.approx(2 * 0.5 * 1 + 2 * 720 / 3600 * 2)
    assert got.charge[0] == pytest.approx(2 * 0.5 * 1 + 2 * 720 / 3600 * 3)
    assert got.site_rent.tolist() == pytest.approx([0.0, 2 * 720 / 3600 * 1])
    assert got.counters["moves"] == 1
    assert run.free == [4, 8]


def test_a_pause_keeps_what_was_done_and_a_smaller_size_goes_on_slower(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,2,a")
    script = Script((0.0, {0: Place(0, SAME)}), (900.0, {0: None}), (5000.0, {0: Place(0, HALF)}))
    run = Simulation(work, sites, script, Costs(restart_s=50, staging_s=0))
    run.run()
    assert run.totals.end_s[0] == pytest.approx(5000 + 50 + 2700 * 1.8)
    assert run.totals.preemptions == 1


def test_swapping_two_jobs_at_once_fits_though_neither_fits_first(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,4,a", "0,3600,4,a")
    script = Script((0.0, {0: Place(0, SAME), 1: Place(1, TWICE)}), (60.0, {0: Place(1, TWICE), 1: Place(0, SAME)}))
    run = Simulation(work, sites, script)
    run.run()
    assert run.state[:2] == [State.FINISHED] * 2


def test_a_pool_cannot_be_given_more_than_it_has(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,4,a", "0,3600,4,a")
    with pytest.raises(AssertionError, match="more than it has"):
        Simulation(work, sites, Script((0.0, {0: Place(0, SAME), 1: Place(0, SAME)}))).run()


def test_a_job_past_its_patience_withdraws_and_what_it_did_counts(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,2,a", patience=1.0)
    # An hour plus its duration: 7,200 s. It starts at 6,300 s, so a quarter is done.
    run = Simulation(work, sites, Script((6300.0, {0: Place(0, SAME)})), Costs(0, 0))
    run.run()
    assert run.state[0] == State.WITHDRAWN
    assert summary(run).value[0] == pytest.approx(1.0)
    assert run.free[0] == 4


def test_no_buyer_pays_above_its_value_and_the_market_adds_the_rest(tmp_path: Path) -> None:
    work, sites = _scene(tmp_path, "0,3600,2,a")
    run = Simulation(work, sites, Script((0.0, {0: Place(0, SAME, 9_000_000.0)})), Costs(0, 0))
    run.run()
    got = summary(run)
    assert got.charge[0] == pytest.approx(got.value[0])
    assert got.uplift_share == pytest.approx((18 - 4) / 18, rel=1e-3)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_serves_a_busy_trace_within_capacity_and_books_everything(tmp_path: Path, name: str) -> None:
    trace = random_trace(tmp_path, seed=5)
    sites = three_sites(trace)
    work = workload_of(trace, sites, table(tmp_path))
    policy = POLICIES[name]()
    run = Simulation(work, sites, policy, home_only=isinstance(policy, MarketAlone))
    run.run()
    got = summary(run)
    assert got.finished.all()
    assert run.free == sites.capacity.tolist()
    # All work is done and valued at the bid, whatever route it took.
    assert got.value == pytest.approx(work.bid_micros / 1e6 * work.gpus * work.work_s / 3600, rel=1e-4)
    # What buyers pay, with uplift, is what sites receive.
    revenue = sum(run.totals.revenue)
    assert sum(run.totals.charge) + run.totals.uplift == pytest.approx(revenue)
    assert got.site_rent.sum() + got.cost.sum() == pytest.approx(revenue / 1e6)
    assert (got.charge <= got.value + got.charge * 0.5 + 1e-9).all()
    assert (got.completion_s >= work.work_s / work.rate.max(axis=(1, 2)) - 1e-6).all()
    if name in {"alone", "market-alone"}:
        assert got.away_share == 0
    else:
        assert got.away_share > 0


@pytest.mark.parametrize("name", ["alone", "gavel", "sia", "market"])
def test_a_run_again_gives_the_same_figures(tmp_path: Path, name: str) -> None:
    trace = random_trace(tmp_path, seed=6, jobs=80)
    sites = three_sites(trace)
    work = workload_of(trace, sites, table(tmp_path))
    found = []
    for _ in range(2):
        run = Simulation(work, sites, POLICIES[name]())
        run.run()
        found.append((run.totals.end_s, run.totals.value, run.totals.charge))
    assert np.array_equal(found[0], found[1])
