"""What every clearing promises, searched for on random markets and shown on markets written out."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.allocation.clearing import Clearing
from broker.allocation.compile import compile_market
from broker.allocation.quote import _places
from broker.allocation.relaxation import Relaxation, relax
from broker.allocation.rules import Option, Row, Rules
from broker.allocation.snapshot import Incumbent, Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_rows import from_snapshot
from broker.allocation.verify import verify
from pricing.value import value_micros_per_hour
from tests.broker.allocation.instances import CREDIT, NOW_MS, job, market, pool, random_market
from training.spec import SyncPlan

ROOT = Path(__file__).parents[3]
# `make soak` looks at a hundred.
SOME = settings(
    max_examples=int(os.environ.get("HANSA_EXAMPLES", "10")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def options_of(rules: Rules) -> list[list[Option]]:
    """Return everything that each job could be given, by the rules in plain Python."""
    found = []
    for row in rules.jobs.values():
        places = [rules.option(row, parts, plan, hub, action="start") for parts, plan, hub in _places(rules, row)]
        found.append([option for option in places if option is not None])
    return found


def best_welfare(rules: Rules, options: list[list[Option]], used: dict[Row, int]) -> int:
    """Return the most welfare that whole placements reach, by trying all of them; asks are flat."""
    if not options:
        return 0
    mine, rest = options[0], options[1:]
    best = best_welfare(rules, rest, used)
    supplies = rules.supplies()
    for option in mine:
        after = dict(used)
        for row, use in option.rows.items():
            after[row] = after.get(row, 0) + use
        if all(use <= sum(units for units, _ in supplies[row][1]) for row, use in after.items()):
            asks = sum(rules.pools[pool_id].ask_micros_per_gpu_hour * gpus for pool_id, gpus in option.gpus.items())
            best = max(best, option.worth - asks + best_welfare(rules, rest, after))
    return best


@SOME
@given(seed=st.integers(0, 10_000), jobs=st.integers(1, 3))
def test_with_enough_equity_no_allocation_is_better_than_the_clearing(seed: int, jobs: int) -> None:
    snapshot = random_market(seed, jobs, sites=2, types=1, equity_credits=1e9)
    rules = Rules(snapshot)
    clearing = clear(snapshot)
    best = best_welfare(rules, options_of(rules), {})
    assert best * (1 - 1e-4) <= clearing.certificate.welfare_micros_per_hour <= best
    assert clearing.certificate.bound_micros_per_hour >= best


@SOME
@given(
    seed=st.integers(0, 10_000), jobs=st.integers(1, 25), sites=st.integers(1, 4), equity=st.sampled_from([0, 5, 1e6])
)
def test_the_verifier_finds_nothing_wrong_with_a_clearing(seed: int, jobs: int, sites: int, equity: float) -> None:
    snapshot = random_market(seed, jobs, sites, equity_credits=equity)
    clearing = clear(snapshot)
    assert verify(snapshot, clearing) == []
    proof = clearing.certificate
    assert all(proof.checks.values())
    gap = proof.bound_micros_per_hour - proof.welfare_micros_per_hour
    assert gap == proof.regret_sum_micros_per_hour + proof.slack_sum_micros_per_hour


@SOME
@given(seed=st.integers(0, 10_000), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(seed: int, shuffle: random.Random) -> None:
    snapshot = random_market(seed, 12, 3, equity_credits=3)
    shuffled = {name: list(getattr(snapshot, name)) for name in ("jobs", "pools", "sites", "links")}
    for rows in shuffled.values():
        shuffle.shuffle(rows)
    other = clear(snapshot.model_copy(update={name: tuple(rows) for name, rows in shuffled.items()}))
    first = clear(snapshot)
    assert other.model_copy(update={"snapshot_digest": first.snapshot_digest}) == first


def relaxed(snapshot: Snapshot) -> Relaxation:
    return relax(compile_market(from_snapshot(snapshot)).instance)


def with_supply(snapshot: Snapshot, where: int, more: int) -> float:
    """Return the LP's optimum with some more GPUs in one pool's row, and no other way to use them."""
    instance = compile_market(from_snapshot(snapshot)).instance
    units = instance.rows.step_units.copy()
    units[instance.rows.step_start[where]] += more
    return relax(instance._replace(rows=instance.rows._replace(step_units=units))).lp_objective


@SOME
@given(seed=st.integers(0, 10_000), where=st.integers(0, 5))
def test_one_more_gpu_never_lowers_the_optimum_of_the_lp(seed: int, where: int) -> None:
    snapshot = random_market(seed, 15, 3)
    before, after = with_supply(snapshot, where, 0), with_supply(snapshot, where, 1)
    assert after >= before - 2e-6 * max(1.0, abs(before))


def test_same_snapshot_same_bytes_in_a_fresh_process_with_another_hash_seed() -> None:
    snapshot = random_market(7, 30, 3, equity_credits=5)
    here = clear(snapshot).to_json()
    assert clear(Snapshot.from_json(snapshot.to_json())).to_json() == here
    program = (
        "import sys; from broker.allocation.snapshot import Snapshot; from broker.allocation.solve import clear; "
        "sys.stdout.buffer.write(clear(Snapshot.from_json(sys.stdin.buffer.read())).to_json())"
    )
    for hash_seed in ("0", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=snapshot.to_json(),
            capture_output=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            check=True,
            timeout=60,
        )
        assert done.stdout == here


def test_a_clearing_reads_back_as_it_was_written() -> None:
    clearing = clear(random_market(3, 20, 3))
    assert Clearing.from_json(clearing.to_json()) == clearing
    assert Clearing.from_json(clearing.to_json()).digest() == clearing.digest()


@pytest.mark.parametrize("seed", range(5))
def test_a_pools_rent_is_what_one_more_gpu_is_worth(seed: int) -> None:
    snapshot = random_market(seed, 20, 2, types=1)
    here = relaxed(snapshot)
    rents = []
    for where, pool_row in enumerate(snapshot.pools):
        more, less = (with_supply(snapshot, where, step) for step in (1, -1))
        rent = int(here.prices[where]) - pool_row.ask_micros_per_gpu_hour
        slack = 4e-6 * here.lp_objective + 1
        assert more - here.lp_objective - slack <= rent <= here.lp_objective - less + slack
        rents.append(rent)
    assert any(rent > 0 for rent in rents)


def test_scaling_all_money_by_a_thousand_scales_the_prices() -> None:
    pools = [pool("ada", 8), pool("bob", 4, 2.0)]
    book = [("a", 9.0, 5), ("b", 7.0, 3), ("c", 4.0, 4), ("d", 3.0, 2)]
    first = clear(market(pools, [job(name, value, gpus) for name, value, gpus in book]))
    dear = [row.model_copy(update={"ask_micros_per_gpu_hour": row.ask_micros_per_gpu_hour * 1000}) for row in pools]
    other = clear(market(dear, [job(name, value * 1000, gpus, hold_credits=1e9) for name, value, gpus in book]))
    assert [row.job_id for row in other.placements] == [row.job_id for row in first.placements]
    for pool_id, price in first.prices.items():
        assert other.prices[pool_id] == pytest.approx(price * 1000, rel=1e-6)


def test_the_loser_sets_the_price_and_the_winner_keeps_the_rest() -> None:
    clearing = clear(market([pool("ada", 4)], [job("high", 10, 4), job("low", 6, 4)]))
    (won,) = clearing.placements
    assert won.job_id == "high"
    assert clearing.prices["ada/A100"] == pytest.approx(6 * CREDIT, rel=1e-5)
    assert won.charge_micros_per_hour == 4 * clearing.prices["ada/A100"]
    (lost,) = clearing.unplaced
    assert lost.code == "fragmented"


def test_without_rivals_the_price_is_the_ask() -> None:
    clearing = clear(market([pool("ada", 4)], [job("only", 10, 2)]))
    assert clearing.prices == {"ada/A100": CREDIT}


def test_the_bid_that_an_unplaced_job_is_told_wins_when_solved_again() -> None:
    book = [job("high", 10, 4), job("low", 0.4, 4)]
    clearing = clear(market([pool("ada", 4), pool("bob", 4, 2.0)], book))
    (lost,) = clearing.unplaced
    assert lost.code == "bid_below_ask"
    assert lost.bid_needed_micros_per_million_samples is not None
    better = book[1].model_copy(update={"bid_micros_per_million_samples": lost.bid_needed_micros_per_million_samples})
    again = clear(market([pool("ada", 4), pool("bob", 4, 2.0)], [book[0], better]))
    assert {row.job_id for row in again.placements} == {"high", "low"}
    worse = better.model_copy(
        update={"bid_micros_per_million_samples": better.bid_micros_per_million_samples * 99 // 100}
    )
    assert len(clear(market([pool("ada", 4), pool("bob", 4, 2.0)], [book[0], worse])).placements) == 1


FRACTIONAL = [
    # GPUs in the pool; (value per GPU, GPUs) of jobs of which the LP takes a part, and a small one
    (8, [(10, 5), (9, 5), (5, 3)]),
    (4, [(10, 3), (9, 3), (3, 1)]),
    (12, [(8, 7), (7.5, 7), (4, 5)]),
]


@pytest.mark.parametrize(("gpus", "book"), FRACTIONAL)
def test_a_fractional_gap_is_bridged_by_equity_or_the_placement_is_dropped(
    gpus: int, book: list[tuple[float, int]]
) -> None:
    jobs = [job(f"job{index}", value, count) for index, (value, count) in enumerate(book)]
    rich = market([pool("ada", gpus)], jobs, market_equity_micros=1000 * CREDIT)
    poor = market([pool("ada", gpus)], jobs)
    with_equity, without = clear(rich), clear(poor)
    assert verify(rich, with_equity) == verify(poor, without) == []
    assert [row.job_id for row in with_equity.placements] == ["job0", "job2"]
    filler = with_equity.placements[1]
    assert filler.uplift_micros_per_hour > 0
    assert filler.charge_micros_per_hour == filler.value_micros_per_hour
    assert [row.job_id for row in without.placements] == ["job0"]
    assert {row.job_id: row.code for row in without.unplaced}["job2"] == "uplift_short"
    needed = -(-filler.uplift_micros_per_hour * filler.term_s // 3600)
    just = market([pool("ada", gpus)], jobs, market_equity_micros=needed)
    short = market([pool("ada", gpus)], jobs, market_equity_micros=needed - 1)
    assert len(clear(just).placements) == 2
    assert len(clear(short).placements) == 1


def test_ties_go_to_the_job_that_came_first() -> None:
    for order in itertools.permutations([0, 1, 2]):
        jobs = [job(f"job{name}", 10, 4, submitted_ms=rank) for rank, name in enumerate(order)]
        (won,) = clear(market([pool("ada", 4)], jobs)).placements
        assert won.job_id == f"job{order[0]}"


def test_a_job_too_large_for_one_site_spans_two_through_a_hub() -> None:
    jobs = [job("big", 10, 8, sites_max=2, parameters=1_000_000)]
    snapshot = market([pool("ada", 4), pool("bob", 4)], jobs)
    (won,) = clear(snapshot).placements
    assert won.configuration.key == "ada/A100:4+bob/A100:4"
    assert won.configuration.hub_site in {"ada", "bob"}
    assert won.configuration.sync.strategy == "diloco"
    assert {(row.from_site, row.to_site) for row in won.links} == {("ada", "bob"), ("bob", "ada")}
    deaf = snapshot.model_copy(update={"sites": tuple(s.model_copy(update={"listens": False}) for s in snapshot.sites)})
    assert clear(deaf).placements == ()
    unlinked = market([pool("ada", 4), pool("bob", 4)], jobs, links=False)
    assert clear(unlinked).placements == ()


def test_a_thin_link_is_not_oversold_and_gets_a_price() -> None:
    # Three jobs, each on its own GPU type and on both sites, each sending for 43 % of the link's time.
    kinds = ["A100", "T4", "V100"]
    pools = [pool(site, 4, gpu_type=kind) for site in ("ada", "bob") for kind in kinds]
    sync = SyncPlan(codec="int8", period_steps=1)
    jobs = [
        job(f"job{n}", 100 + n, 8, gpu_type=kind, sites_max=2, parameters=10**10, sync=sync)
        for n, kind in enumerate(kinds)
    ]
    fast = market(pools, jobs)
    thin = [row.model_copy(update={"bandwidth_bits_per_s": 1e7}) for row in fast.links]
    slow = fast.model_copy(update={"links": tuple(thin)})
    assert len(clear(fast).placements) == 3
    assert clear(fast).link_prices == ()
    clearing = clear(slow)
    assert [row.job_id for row in clearing.placements] == ["job1", "job2"]
    assert any(row.price_micros_per_share_hour > 0 for row in clearing.link_prices)
    assert any(row.rent_micros_per_hour > 0 for row in clearing.placements[0].links)
    assert verify(fast, clear(fast)) == verify(slow, clearing) == []


def lease(won_from: Snapshot, job_id: str, *, ends_ms: int, restart_credits: float = 0.0) -> Incumbent:
    clearing = clear(won_from)
    (won,) = (row for row in clearing.placements if row.job_id == job_id)
    return Incumbent(
        configuration=won.configuration,
        epoch=1,
        locked_prices={row.pool_id: row.price_micros_per_gpu_hour for row in won.pools},
        term_ends_ms=ends_ms,
        restart_cost_micros=round(restart_credits * CREDIT),
    )


def test_inside_its_term_a_job_keeps_its_place_and_price_against_a_higher_bid() -> None:
    pools = [pool("ada", 4)]
    held = lease(market(pools, [job("old", 5, 4)]), "old", ends_ms=NOW_MS + 1000)
    snapshot = market(pools, [job("old", 5, 4, incumbent=held), job("new", 50, 4)])
    clearing = clear(snapshot)
    (kept,) = clearing.placements
    assert (kept.job_id, kept.action) == ("old", "keep")
    assert kept.pools[0].price_micros_per_gpu_hour == CREDIT
    assert verify(snapshot, clearing) == []
    over = snapshot.model_copy(update={"taken_at_ms": NOW_MS + 1000})
    (won,) = clear(over).placements
    assert won.job_id == "new"
    assert verify(over, clear(over)) == []


def test_a_running_job_moves_only_for_more_than_its_restart_costs() -> None:
    dear = [pool("ada", 4, 3.0)]
    both = [pool("ada", 4, 3.0), pool("bob", 4, 1.0)]
    # The move saves two credits for each of four GPUs an hour: 8; a term is a sixth of an hour.
    for restart_credits, action in ((1.0, "move"), (2.0, "renew")):
        held = lease(market(dear, [job("old", 5, 4)]), "old", ends_ms=NOW_MS, restart_credits=restart_credits)
        snapshot = market(both, [job("old", 5, 4, incumbent=held)])
        clearing = clear(snapshot)
        assert [row.action for row in clearing.placements] == [action]
        assert verify(snapshot, clearing) == []


def test_a_pool_that_shrank_evicts_the_youngest_first() -> None:
    one = [pool("ada", 4)]
    held = lease(market(one, [job("x", 5, 4)]), "x", ends_ms=NOW_MS + 1000)
    jobs = [job("older", 5, 4, submitted_ms=1, incumbent=held), job("younger", 9, 4, submitted_ms=2, incumbent=held)]
    snapshot = market(one, jobs)
    clearing = clear(snapshot)
    assert [(row.job_id, row.action) for row in clearing.placements] == [("older", "keep")]
    assert verify(snapshot, clearing) == []


def test_a_vetoed_configuration_is_not_offered_again() -> None:
    barred = job("a", 5, 4, barred=("ada/A100:4",))
    clearing = clear(market([pool("ada", 4), pool("bob", 4, 3.0)], [barred]))
    assert clearing.placements[0].configuration.key == "bob/A100:4"
    assert clear(market([pool("ada", 4)], [barred])).unplaced[0].code == "barred"


def test_a_deadline_that_cannot_be_met_has_no_value() -> None:
    # Eight GPU-hours on one to four GPUs, three hours from now: only three or more finish in time.
    late = job("a", 5, (1, 4), hours=8, deadline_ms=NOW_MS + 3 * 3_600_000)
    (won,) = clear(market([pool("ada", 4)], [late])).placements
    assert won.configuration.gpus == 4
    assert clear(market([pool("ada", 2)], [late])).unplaced[0].code == "deadline"


def test_a_term_is_reserved_inside_the_hold() -> None:
    # The hold pays 1.2 credits per GPU-hour for a term: above the ask, below the bid.
    poor = job("a", 50, 4, hold_credits=1.2 * 4 / 6)
    (won,) = clear(market([pool("ada", 4)], [poor, job("b", 0.9, 4)])).placements
    assert won.reservation_micros <= poor.hold_left_micros
    broke = job("a", 50, 4, hold_credits=0.5 * 4 / 6)
    (lost,) = clear(market([pool("ada", 4)], [broke])).unplaced
    assert lost.code == "budget_short"


def test_a_job_near_its_end_gets_a_term_that_its_hold_can_pay() -> None:
    # Two minutes of work left in a ten-minute term: the hold need not cover the other eight.
    ending = job("a", 5, 4, hours=4 / 30, hold_credits=5 * 4 / 30)
    (won,) = clear(market([pool("ada", 4)], [ending])).placements
    assert 120 <= won.term_s <= 160
    assert won.value_micros_per_hour < value_micros_per_hour(ending.bid_micros_per_million_samples, won.samples_per_s)
    assert won.reservation_micros <= ending.hold_left_micros


def test_the_fee_comes_out_of_the_price_and_never_out_of_the_ask() -> None:
    jobs = [job("high", 10, 4), job("low", 6, 4)]
    scarce = clear(market([pool("ada", 4)], jobs, fee_basis_points=1000)).placements[0].pools[0]
    assert scarce.payout_micros_per_gpu_hour == scarce.price_micros_per_gpu_hour * 9 // 10
    plenty = clear(market([pool("ada", 4)], jobs[:1], fee_basis_points=1000)).placements[0].pools[0]
    assert plenty.payout_micros_per_gpu_hour == plenty.price_micros_per_gpu_hour == CREDIT


def test_an_empty_market_clears_to_nothing() -> None:
    clearing = clear(market([], []))
    assert clearing.status == "empty"
    assert verify(market([], []), clearing) == []
    (lost,) = clear(market([], [job("a", 5)])).unplaced
    assert lost.code == "no_pool"


def test_a_face_thinner_than_the_solvers_tolerance_still_settles() -> None:
    # Found by search: rows that entered late contradicted what earlier steps had fixed too tightly.
    clearing = clear(random_market(5854, 15, 3))
    assert clearing.effort.prices_settled
    assert clearing.certificate.checks["lp_gap_proved"]
