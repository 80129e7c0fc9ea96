"""What is concluded from a replay: the LP game between sites, Owen's theorem, misreports and intervals."""

from __future__ import annotations

from itertools import product as combinations_of
from pathlib import Path

import numpy as np
import pytest

from broker.allocation.instance import Instance
from broker.backtest.allocate import plain
from broker.backtest.bids import BidRule
from broker.backtest.book import Book, instance_of
from broker.backtest.coalition import Coalitions, outcome_of, play, published_payoffs
from broker.backtest.engine import Costs, Simulation
from broker.backtest.misreport import buyers
from broker.backtest.misreport import sites as sellers
from broker.backtest.policies.market import Market
from broker.backtest.value import ratio_interval
from pricing.fairness import core_slack
from tests.broker.backtest.small import random_trace, table, three_sites, workload_of


def _market(tmp_path: Path, seed: int, jobs: int, first: int = 0) -> Instance:
    """Return the market of some jobs of a trace, all at once."""
    trace = random_trace(tmp_path, seed=seed)
    sites = three_sites(trace)
    work = workload_of(trace, sites, table(tmp_path), bids=BidRule.LOGNORMAL)
    policy = Market(plain)
    Simulation(work, sites, policy).run()
    present = np.arange(first, first + jobs)
    book = Book(
        job=present,
        pool=np.full(jobs, -1, dtype=np.int32),
        option=np.full(jobs, -1, dtype=np.int32),
        left_s=work.work_s[present],
        paused=np.zeros(jobs, dtype=bool),
        free=sites.capacity.copy(),
    )
    return instance_of(book, work, sites, policy.open_to, Costs(staging_s=0), term_s=3600.0, home_only=False).instance


def test_the_coalitions_lp_bounds_every_whole_allocation(tmp_path: Path) -> None:
    instance = _market(tmp_path, 3, 4)
    value, _, _ = Coalitions(instance).solve(0b111)
    best = 0.0
    singles, rows = instance.singles, instance.rows
    options = [[None, *range(singles.start[job], singles.start[job + 1])] for job in range(4)]
    for chosen in combinations_of(*options):
        # By kind: any split over the pools of a kind is allowed in the relaxation.
        welfare, need = 0.0, dict.fromkeys(range(int(instance.pools.kind.max()) + 1), 0)
        for item in chosen:
            if item is not None:
                welfare += float(singles.value[item])
                need[int(singles.good[item])] += int(singles.gpus[item])
        feasible = True
        for kind, gpus in need.items():
            for pool in sorted(np.flatnonzero(instance.pools.kind == kind), key=lambda each: rows.step_cost[each]):
                sold = min(gpus, int(rows.step_units[pool]))
                welfare -= sold * float(rows.step_cost[pool])
                gpus -= sold  # noqa: PLW2901  what is left to sell
            feasible = feasible and gpus == 0
        if feasible:
            best = max(best, welfare)
    assert value >= best - 1e-3
    assert value <= best * 1.5


def test_owen_leaves_no_coalition_a_reason_to_go_and_published_none_beyond_the_gap(tmp_path: Path) -> None:
    for seed in range(4):
        instance = _market(tmp_path, seed, 30)
        cleared = plain(instance, None)
        game = play(0.0, instance, cleared, seed)
        assert game.coalitions == 8
        assert game.worse_off() == []
        assert game.core_slack >= -1e-6 * game.grand
        assert sum(game.owen) == pytest.approx(game.grand)
        assert sum(game.shapley) == pytest.approx(game.grand)
        assert game.published_slack >= -game.gap - 1e-6 * game.grand
        assert game.grand >= sum(game.alone) - 1e-6


def test_a_division_that_favours_one_site_is_seen_to_leave_the_core(tmp_path: Path) -> None:
    instance = _market(tmp_path, 1, 30)
    coalitions = Coalitions(instance)
    values = {mask: coalitions.value(mask) for mask in range(8)}
    assert core_slack(values, [values[7], 0.0, 0.0]) < 0


def test_the_plain_clearing_is_possible_pays_no_site_below_its_ask_and_is_near_its_bound(tmp_path: Path) -> None:
    for seed in range(5):
        instance = _market(tmp_path, seed, 60)
        cleared = plain(instance, None)
        held, _ = outcome_of(instance, cleared)
        used = np.zeros(instance.pool_count, dtype=int)
        for _, pool, gpus, _ in held:
            used[pool] += gpus
        assert (used <= instance.rows.step_units).all()
        assert (cleared.prices >= instance.rows.step_cost).all()
        assert all(value >= cleared.prices[pool] * gpus for _, pool, gpus, value in held)
        assert cleared.welfare <= cleared.bound
        assert cleared.welfare >= 0.75 * cleared.bound
        assert published_payoffs(instance, cleared).sum() == pytest.approx(cleared.welfare)


def test_a_misreport_is_measured_at_the_truth_and_never_below_it(tmp_path: Path) -> None:
    instance = _market(tmp_path, 2, 30)
    cleared = plain(instance, None)
    found = [*buyers(instance, cleared, plain, range(10)), *sellers(instance, cleared, plain, tenants=True)]
    assert {each.kind for each in found} == {"bid", "ask", "capacity"}
    assert all(each.gain >= 0 for each in found)
    assert all(each.gain <= each.stake for each in found if each.kind == "bid")


def test_a_monopolist_gains_by_asking_more(tmp_path: Path) -> None:
    instance = _market(tmp_path, 2, 6)
    cleared = plain(instance, None)
    gains = {each.agent: each for each in sellers(instance, cleared, plain, tenants=False) if each.kind == "ask"}
    # With room for all, prices are the asks; b alone has the fast type, and its buyers would pay more.
    assert max(each.gain for each in gains.values()) > 0


def test_equal_weeks_give_a_tight_interval_and_unequal_ones_a_wide_one() -> None:
    alone = np.full(12, 10.0)
    tight = ratio_interval([alone * 1.2], [alone], block_weeks=2, seed=0)
    assert (tight.estimate, tight.low, tight.high) == pytest.approx((1.2, 1.2, 1.2))
    wide = ratio_interval([alone * np.tile([1.0, 1.0, 1.0, 1.8, 1.8, 1.8], 2)], [alone], block_weeks=2, seed=0)
    assert wide.estimate == pytest.approx(1.4)
    assert wide.low < 1.3
    assert wide.high > 1.5
    assert wide == ratio_interval([alone * np.tile([1.0, 1.0, 1.0, 1.8, 1.8, 1.8], 2)], [alone], block_weeks=2, seed=0)


def test_a_single_week_gives_a_ratio_but_no_interval() -> None:
    found = ratio_interval([np.array([12.0])], [np.array([10.0])], block_weeks=2, seed=0)
    assert found.estimate == pytest.approx(1.2)
    assert np.isnan([found.low, found.high]).all()
