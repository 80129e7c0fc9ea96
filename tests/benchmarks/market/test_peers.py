"""The peers' formulations against brute force and against each other, on problems small enough to see.

make bench-market          # runs these first
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from broker.allocation.instance import Choice, Instance
from tests.benchmarks.market import alike, instances, tables
from tests.benchmarks.market.peers import enumeration, gavel, greedy, listing, pop, sia
from tests.broker.allocation.large_instances import large
from tests.broker.allocation.small_instances import small

SPEEDS = tables.read_or_generate(None, 0)


def tiny_time_shares(seed: int) -> instances.TimeShares:
    problem = instances.time_shares(SPEEDS, 12, 2, seed)
    return problem._replace(workers=np.random.default_rng(seed).integers(0, 4, len(problem.workers)))


def best_vertex(problem: instances.TimeShares, jobs: int, types: int) -> float:
    """Maximise by hand: a grid of quarters of time for a few jobs and worker types."""
    quarters = [shares for shares in itertools.product(np.arange(5) / 4, repeat=types) if sum(shares) <= 1]
    best = 0.0
    for shares in itertools.product(quarters, repeat=jobs):
        x = np.array(shares)
        if (problem.gpus[:jobs] @ x <= problem.workers[:types] + 1e-12).all():
            best = max(best, float((problem.throughput[:jobs, :types] * x).sum()))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_max_sum_of_single_gpu_jobs_is_what_brute_force_finds(seed: int) -> None:
    problem = tiny_time_shares(seed)
    problem = problem._replace(
        throughput=problem.throughput[:3, :2],
        gpus=np.ones(3, np.int64),
        workers=np.array([1, 1]),
        kind=problem.kind[:2],
    )
    # One GPU per job: an assignment problem, whose corners are whole, so the grid contains one.
    assert gavel.max_sum(problem, "HIGHS").objective == pytest.approx(best_vertex(problem, 3, 2), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_solvers_agree_on_gavels_problems(seed: int) -> None:
    problem = tiny_time_shares(seed)
    sums = [gavel.max_sum(problem, solver).objective for solver in gavel.SOLVERS]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-6)
    problem = problem._replace(workers=problem.workers + 1)
    least = [gavel.max_min(problem, solver).objective for solver in gavel.SOLVERS]
    assert least == pytest.approx([least[0]] * len(least), rel=1e-6)


def test_max_min_gives_equals_an_equal_share() -> None:
    speeds = np.tile([[2.0, 4.0]], (4, 1))
    problem = instances.TimeShares(speeds, np.ones(4, np.int64), np.array([1, 1]), np.arange(2, dtype=np.int32))
    answer = gavel.max_min(problem, "HIGHS")
    # Four equal jobs on two GPUs: each gets 1.5 steps/s, half of the 3 of an equal split of a whole GPU.
    assert answer.objective == pytest.approx(0.5)
    assert (answer.allocation.sum(axis=0) <= 1 + 1e-9).all()


@pytest.mark.parametrize("alike_sites", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_market_of_gavels_problem_has_gavels_optimum(seed: int, alike_sites: bool) -> None:  # noqa: FBT001 (a parameter of the test)
    problem = instances.time_shares(SPEEDS, 24, 3, seed, alike=alike_sites)
    market = instances.market_of_time_shares(problem)
    peer = gavel.max_sum(problem, "HIGHS").objective
    ours = enumeration.solve(market, whole=False, limit_s=30)
    assert ours.welfare / instances.VALUE_SCALE == pytest.approx(peer, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_market_of_sias_problem_has_sias_optimum(seed: int) -> None:
    problem = instances.configurations(SPEEDS, 8, seed)
    problem = problem._replace(capacity=problem.capacity // 2)
    market = instances.market_of_configurations(problem)
    ours = enumeration.solve(market, whole=True, limit_s=30)
    cost = problem.none_cost * len(problem.cost) - ours.welfare / instances.VALUE_SCALE
    assert sia.minimise(problem, "HIGHS", 30).objective == pytest.approx(cost, rel=2 * sia.RELATIVE_GAP)


def test_sia_chooses_what_brute_force_chooses() -> None:
    problem = instances.configurations(SPEEDS, 3, 1)
    keep = np.flatnonzero(problem.gpus <= 4)
    problem = problem._replace(
        cost=problem.cost[:, keep],
        gpus=problem.gpus[keep],
        gpu_type=problem.gpu_type[keep],
        capacity=np.array([2, 2, 4]),
    )
    options = [-1, *range(len(keep))]
    best = np.inf
    for chosen in itertools.product(options, repeat=3):
        used = np.zeros(3, np.int64)
        for column in chosen:
            if column >= 0:
                used[problem.gpu_type[column]] += problem.gpus[column]
        if (used <= problem.capacity).all():
            costs = (problem.none_cost if c < 0 else problem.cost[job, c] for job, c in enumerate(chosen))
            best = min(best, sum(costs))
    assert sia.minimise(problem, "HIGHS", 30).objective == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_a_split_deals_every_job_and_worker_once(parts: int) -> None:
    problem = instances.time_shares(SPEEDS, 32, 3, 0)
    dealt = pop.split(problem, parts, 0)
    assert np.array_equal(sum(part.workers for part in dealt), problem.workers)
    assert np.array_equal(np.sort(np.concatenate([part.gpus for part in dealt])), np.sort(problem.gpus))
    assert np.isclose(sum(part.throughput.sum() for part in dealt), problem.throughput.sum())


def test_a_split_is_feasible_so_never_better_than_the_whole() -> None:
    problem = instances.time_shares(SPEEDS, 64, 3, 0)
    whole = gavel.max_sum(problem, "HIGHS").objective
    assert sum(pop.max_sum(problem, 1, "HIGHS", 0).objectives) == pytest.approx(whole)
    assert sum(pop.max_sum(problem, 4, "HIGHS", 0).objectives) < whole


@pytest.mark.parametrize("seed", range(4))
def test_joining_jobs_that_are_alike_keeps_the_optimum(seed: int) -> None:
    problem = instances.shared_workers(SPEEDS, 24, seed)
    joined = alike.max_min_shared(problem)
    assert joined.objective == pytest.approx(gavel.max_min_shared(problem, "HIGHS").objective, rel=1e-7)
    assert alike.spread(problem, joined).min() == pytest.approx(joined.objective, rel=1e-7)


def test_a_job_alone_of_its_type_is_not_paired_with_itself() -> None:
    problem = instances.shared_workers(SPEEDS, 3, 0)._replace(
        job_type=np.array([0, 1, 2], np.int32), workers=np.ones(3, np.int64)
    )
    full = gavel.max_min_shared(problem, "HIGHS").objective
    assert alike.max_min_shared(problem).objective == pytest.approx(full, rel=1e-7)


def brute_force(market: Instance) -> float:
    """Return the best welfare over all whole choices."""
    columns = listing.list_columns(market)
    options = []
    for job in range(market.job_count):
        mine = list(range(columns.start[job], columns.start[job + 1]))
        options.append(mine if market.jobs.must[job] else [-1, *mine])
    best = -np.inf
    for chosen in itertools.product(*options):
        used, value = np.zeros(market.row_count, np.int64), []
        for column in chosen:
            if column >= 0:
                entries = slice(columns.entry_start[column], columns.entry_start[column + 1])
                np.add.at(used, columns.entry_row[entries], columns.entry_use[entries])
                value.append(columns.value[column])
        best = max(best, listing.welfare(market, np.array(value), used))
    return best


def tractable(market: Instance) -> bool:
    start = listing.list_columns(market).start
    return 10 < float(np.prod(np.diff(start) + 1.0)) < 30_000


def test_enumeration_finds_what_brute_force_finds() -> None:
    markets = [market for market in map(small, range(60)) if tractable(market)]
    assert len(markets) >= 5
    for market in markets[:8]:
        _check_against_brute_force(market)


def _check_against_brute_force(market: Instance) -> None:
    best = brute_force(market)
    mip = enumeration.solve(market, whole=True, limit_s=30)
    assert mip.welfare == pytest.approx(best, rel=1e-6, abs=1.0)
    assert enumeration.solve(market, whole=False, limit_s=30).welfare >= best - 1e-6 * abs(best) - 1.0
    for order in greedy.ORDERS:
        assert greedy.place(market, order).welfare <= best + 1e-6 * abs(best) + 1.0


@pytest.mark.parametrize("order", greedy.ORDERS)
def test_greedy_welfare_is_that_of_its_columns_and_fits(order: str) -> None:
    market = large(60, 5, "B", 1)
    answer = greedy.place(market, order)
    columns = listing.list_columns(market)
    named = {key: at for at, key in enumerate(zip(columns.form, columns.item, columns.place, strict=True))}
    used, values = np.zeros(market.row_count, np.int64), []
    for key in zip(*_chosen(answer.choice), strict=True):
        at = named[key]
        entries = slice(columns.entry_start[at], columns.entry_start[at + 1])
        np.add.at(used, columns.entry_row[entries], columns.entry_use[entries])
        values.append(columns.value[at])
    assert len(values) == answer.placed > 0
    assert listing.welfare(market, np.array(values), used) == pytest.approx(answer.welfare)
    assert np.isfinite(answer.welfare)


def _chosen(choice: Choice) -> list[np.ndarray]:
    placed = choice.form >= 0
    return [part[placed].astype(np.int64) for part in choice]
