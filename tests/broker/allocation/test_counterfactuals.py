"""What a waiting job is told would place it is true when the round is solved again."""

from __future__ import annotations

from broker.allocation.counterfactuals import counterfactuals
from broker.allocation.generate import generate
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_rows import to_snapshot
from tests.broker.allocation.instances import CREDIT, job, market, pool


def again(snapshot: Snapshot, changed: object) -> set[str]:
    """Solve a market with one job changed, all of it read anew as a round would read it."""
    jobs = tuple(changed if row.job_id == changed.job_id else row for row in snapshot.jobs)  # type: ignore[attr-defined]
    anew = Snapshot.from_json(snapshot.model_copy(update={"jobs": jobs}).to_json())
    return {row.job_id for row in clear(anew).placements}


def test_every_counterfactual_is_true_when_solved_again() -> None:
    """A few here; `tests/benchmarks/bench_counterfactuals.py` solves 200 again."""
    snapshot = to_snapshot(generate("B", 8, 2, 4))
    told = 0
    for left_out in clear(snapshot).unplaced[:2]:
        for row in counterfactuals(snapshot, left_out):
            told += 1
            assert left_out.job_id in again(snapshot, row.job), f"{left_out.job_id}: {row.sentence}"
    assert told >= 1


def test_a_named_bid_that_moves_the_price_is_raised_until_it_wins() -> None:
    """The rival's next-best is dearer than what the loser is told at the old prices."""
    snapshot = market([pool("ada", 4), pool("bob", 4, 2.0)], [job("high", 3, 4), job("low", 0.5, 4)])
    (left_out,) = clear(snapshot).unplaced
    (bid,) = [row for row in counterfactuals(snapshot, left_out) if row.kind == "bid"]
    assert "low" in again(snapshot, bid.job)
    assert bid.job.bid_micros_per_million_samples > snapshot.jobs[1].bid_micros_per_million_samples
    assert bid.charge_micros_per_hour >= 4 * CREDIT


def test_a_job_is_told_of_the_type_the_site_and_the_count_that_would_place_it() -> None:
    pools = [pool("ada", 2), pool("bob", 2), pool("cid", 4, gpu_type="V100")]
    snapshot = market(pools, [job("wide", 5, 4)])
    (left_out,) = clear(snapshot).unplaced
    told = {row.kind: row for row in counterfactuals(snapshot, left_out)}
    assert {"gpu_type", "sites", "fewer"} <= told.keys()
    assert told["gpu_type"].sentence.startswith("allowing V100 would start it on 4 x cid/V100 for ")
    assert told["sites"].sentence.startswith("one site more would start it on 2 x ada/A100 + 2 x bob/A100 for ")
    assert told["fewer"].sentence.startswith("taking as few as 2 GPUs would start it on 2 x ")


def test_a_budget_that_is_short_is_named_with_the_bid() -> None:
    snapshot = market([pool("ada", 4)], [job("poor", 5, 4, hold_credits=0.01)])
    (left_out,) = clear(snapshot).unplaced
    assert left_out.code == "budget_short"
    told = counterfactuals(snapshot, left_out)
    assert "budget" in {row.kind for row in told}
    assert all("poor" in again(snapshot, row.job) for row in told)


def test_what_nothing_would_place_is_told_nothing() -> None:
    snapshot = market([pool("ada", 1)], [job("huge", 5, 64)])
    (left_out,) = clear(snapshot).unplaced
    assert counterfactuals(snapshot, left_out) == []
