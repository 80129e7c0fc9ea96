"""Quotes price every candidate, and say at submit what no round could ever do."""

from __future__ import annotations

from broker.allocation.quote import SITES_QUOTED_MAX, never_possible, quote
from broker.allocation.snapshot import JobState, Snapshot
from broker.allocation.solve import clear
from tests.broker.allocation.instances import CREDIT, NOW_MS, job, market, pool


def impossible(snapshot: Snapshot, row: JobState) -> str | None:
    return never_possible(row, snapshot.pools, snapshot.sites, snapshot.links)


def test_a_quote_lists_each_configuration_with_its_cost_to_the_end() -> None:
    wanted = job("q", 5, (1, 4), hours=8)
    snapshot = market([pool("ada", 4), pool("bob", 2)], [], last_prices={"ada/A100": 3 * CREDIT})
    rows = quote(snapshot, wanted)
    assert {row.configuration.key for row in rows} == {
        "ada/A100:1", "ada/A100:2", "ada/A100:3", "ada/A100:4", "bob/A100:1", "bob/A100:2",
    }  # fmt: skip
    by_key = {row.configuration.key: row for row in rows}
    four = by_key["ada/A100:4"]
    assert four.price_micros_per_hour == 12 * CREDIT
    assert abs(four.hours_to_finish - 2) < 1e-4
    assert abs(four.total_micros - 24 * CREDIT) < 100
    assert by_key["bob/A100:2"].price_micros_per_hour == 2 * CREDIT
    assert rows[0].configuration.key.startswith("bob/")
    assert all(row.reason is None for row in rows)


def test_a_quote_says_why_a_configuration_could_not_win() -> None:
    snapshot = market([pool("ada", 4)], [], last_prices={"ada/A100": 3 * CREDIT})
    assert {row.reason for row in quote(snapshot, job("q", 2, 4))} == {"the bid is worth less than the last price"}
    late = quote(snapshot, job("q", 9, (1, 4), hours=8, deadline_ms=NOW_MS + 3 * 3_600_000))
    assert [row.reason is None for row in late] == [True, True, False, False]
    assert "after the deadline" in (late[-1].reason or "")
    (poor,) = quote(snapshot, job("q", 9, 4, hold_credits=1))
    assert "budget" in (poor.reason or "")


def test_the_first_quote_of_an_idle_market_is_what_the_round_then_gives() -> None:
    wanted = job("q", 5, 4)
    pools = [pool("ada", 4, 2.0), pool("bob", 4, 1.0)]
    first = quote(market(pools, []), wanted)[0]
    (won,) = clear(market(pools, [wanted])).placements
    assert won.configuration == first.configuration
    assert won.charge_micros_per_hour == first.price_micros_per_hour


def test_a_job_larger_than_its_sites_is_never_possible() -> None:
    pools = [pool("ada", 8, gpu_type="H100"), pool("bob", 4, gpu_type="H100"), pool("cyd", 4, gpu_type="H100")]
    snapshot = market(pools, [])
    sentence = impossible(snapshot, job("q", 5, 16, gpu_type="H100", sites_max=2))
    assert sentence == (
        "no federation could ever hold this job: it asks for 16 H100 within 2 sites; the largest two sites have 12"
    )
    assert impossible(snapshot, job("q", 5, 16, gpu_type="H100", sites_max=3)) is None
    assert "the largest site has 8" in (impossible(snapshot, job("q", 5, 9, gpu_type="H100")) or "")
    assert impossible(snapshot, job("q", 5, 8, gpu_type="H100")) is None


def test_a_gpu_type_that_nobody_has_is_never_possible() -> None:
    snapshot = market([pool("ada", 8)], [])
    assert "offers T4" in (impossible(snapshot, job("q", 5, 1, gpu_type="T4")) or "")
    assert "no site that the job allows" in (impossible(snapshot, job("q", 5, 1, sites_allowed=("bob",))) or "")


def test_sites_that_cannot_reach_each_other_never_hold_a_spanning_job() -> None:
    apart = market([pool("ada", 4), pool("bob", 4)], [], links=False)
    assert "listens" in (impossible(apart, job("q", 5, 8, sites_max=2)) or "")
    joined = market([pool("ada", 4), pool("bob", 4)], [])
    assert impossible(joined, job("q", 5, 8, sites_max=2)) is None


def test_many_sites_are_quoted_by_what_their_gpus_do_for_their_price() -> None:
    sites = SITES_QUOTED_MAX + 20
    pools = [pool(f"s{number:03d}", 4, 1 + number / 1000) for number in range(sites)]
    # The dearest site computes three times as fast as the others: it must be in the table.
    pools[-1] = pools[-1].model_copy(update={"flops_per_s": 3e12})
    rows = quote(market(pools, [], links=False), job("q", 5, (1, 1), hours=8))
    assert len(rows) == SITES_QUOTED_MAX
    named = {site for row in rows for site in row.configuration.site_ids}
    assert f"s{sites - 1:03d}" in named
    assert "s000" in named
    assert f"s{sites - 2:03d}" not in named
