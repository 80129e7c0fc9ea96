"""Rounds that follow the last one's prices: placed, proved and kept as any other."""

from __future__ import annotations

import numpy as np
import pytest

from broker.allocation import oracle
from broker.allocation.clearing import Clearing
from broker.allocation.following import follow
from broker.allocation.generate import generate
from broker.allocation.instance import BUNDLE, NONE, Choice, Instance, Int
from broker.allocation.snapshot import Incumbent, Snapshot
from broker.allocation.solve import clear
from broker.allocation.solver import Outcome, solve
from broker.allocation.table_rows import to_snapshot
from broker.allocation.verify import verify
from tests.broker.allocation.later_rounds import a_round_later


def moved(instance: Instance, choice: Choice) -> int:
    """Return how many leases are no longer where they were."""
    stays = (choice.form == BUNDLE) & (choice.item == instance.jobs.own)
    return int(np.count_nonzero(~stays[instance.jobs.own >= 0]))


@pytest.fixture(scope="module")
def followed() -> tuple[Instance, Int, Outcome]:
    """Return a market a round after another with the prices of that, and how it follows them."""
    later, first = a_round_later(60, 5, "A", 2, changed=3)
    outcome = follow(later, first.prices, equity_micros=10**12, gap_max=0.05)
    assert outcome is not None
    return later, first.prices, outcome


def test_a_round_that_follows_keeps_leases_and_says_how_far_it_is_from_the_best(
    followed: tuple[Instance, Int, Outcome],
) -> None:
    later, _, outcome = followed
    assert outcome.status == "followed"
    assert np.count_nonzero(later.jobs.own != NONE) > 20
    assert moved(later, outcome.choice) <= 1
    assert outcome.bound == oracle.dual_exact(later, outcome.prices) >= outcome.welfare
    cold = solve(later, equity_micros=10**12)
    assert cold.bound <= outcome.bound * (1 + 1e-6)
    assert outcome.welfare >= 0.98 * cold.welfare
    # Who came is placed too, and not beside the leases only.
    came = slice(later.job_count - 3, None)
    assert np.count_nonzero(outcome.choice.form[came] != NONE) >= np.count_nonzero(cold.choice.form[came] != NONE) - 1


def test_following_is_a_function_of_the_market_and_the_prices(followed: tuple[Instance, Int, Outcome]) -> None:
    later, prices, outcome = followed
    again = follow(later, prices.copy(), equity_micros=10**12, gap_max=0.05)
    assert again is not None
    assert (again.welfare, again.bound) == (outcome.welfare, outcome.bound)
    assert all(np.array_equal(a, b) for a, b in zip(again.choice, outcome.choice, strict=True))


def test_prices_that_are_far_off_are_not_followed(followed: tuple[Instance, Int, Outcome]) -> None:
    later, prices, _ = followed
    assert follow(later, prices * 2, equity_micros=10**12, gap_max=0.05) is None


def followed_by(snapshot: Snapshot, clearing: Clearing) -> Snapshot:
    """Return the market a minute later, told to follow: who won has a lease, and one job has gone."""
    won = {row.job_id: row for row in clearing.placements}
    leases = {
        job_id: Incumbent(
            configuration=row.configuration,
            epoch=1,
            locked_prices={charge.pool_id: charge.price_micros_per_gpu_hour for charge in row.pools},
            term_ends_ms=snapshot.taken_at_ms + row.term_s * 1000,
            restart_cost_micros=10**5,
        )
        for job_id, row in won.items()
    }
    priced = {(row.from_site, row.to_site): row.price_micros_per_share_hour for row in clearing.link_prices}
    return snapshot.model_copy(
        update={
            "round_number": snapshot.round_number + 1,
            "taken_at_ms": snapshot.taken_at_ms + 60_000,
            "follow_last_prices": True,
            "last_prices": clearing.prices,
            "links": tuple(
                row.model_copy(update={"last_price_micros_per_share_hour": priced.get((row.from_site, row.to_site), 0)})
                for row in snapshot.links
            ),
            "jobs": tuple(
                row.model_copy(update={"incumbent": leases.get(row.job_id)})
                for row in snapshot.jobs
                if row.job_id != clearing.placements[0].job_id
            ),
        }
    )


def test_a_snapshot_that_says_so_is_followed_and_verifies() -> None:
    snapshot = to_snapshot(generate("B", 24, 3, 2, ()))
    first = clear(snapshot)
    assert first.status != "followed"
    later = followed_by(snapshot, first)
    second = clear(later)
    assert second.status == "followed"
    assert verify(later, second) == []
    assert all(second.certificate.checks.values())
    assert second.spelled() == clear(later.model_copy()).spelled()
    # Where prices have drifted, the flag asks for nothing that is not so.
    off = later.model_copy(update={"last_prices": {pool: 3 * price for pool, price in first.prices.items()}})
    anew = clear(off)
    assert anew.status in {"optimal", "feasible"}
    assert verify(off, anew) == []
