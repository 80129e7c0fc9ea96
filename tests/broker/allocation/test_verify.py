"""The verifier finds each fault that is planted; a verifier that finds nothing proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broker.allocation.clearing import Clearing
from broker.allocation.snapshot import Incumbent, Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_rows import from_snapshot
from broker.allocation.verify import verify
from tests.broker.allocation.instances import CREDIT, NOW_MS, job, market, pool
from training.spec import SyncPlan


def book() -> tuple[Snapshot, Clearing]:
    """Return a market with a spanning job, a scarce pool, an uplift and a job left out, and its clearing."""
    pools = [pool("ada", 8), pool("bob", 4), pool("cyd", 4, 2.0)]
    jobs = [
        job("a", 10, 5, sites_allowed=("ada",)),
        job("b", 9, 5, sites_allowed=("ada",)),
        job("c", 5, 3, sites_allowed=("ada",)),
        job("d", 12, 8, sites_max=2, sites_allowed=("bob", "cyd"), parameters=100_000_000),
    ]
    snapshot = market(pools, jobs, market_equity_micros=100 * CREDIT, fee_basis_points=100)
    return snapshot, clear(snapshot)


def placed(clearing: Clearing, job_id: str, **changes: Any) -> Clearing:
    rows = [row.model_copy(update=changes) if row.job_id == job_id else row for row in clearing.placements]
    return clearing.model_copy(update={"placements": tuple(rows)})


def proof(clearing: Clearing, **changes: Any) -> Clearing:
    return clearing.model_copy(update={"certificate": clearing.certificate.model_copy(update=changes)})


def configured(clearing: Clearing, job_id: str, **changes: Any) -> Clearing:
    row = next(row for row in clearing.placements if row.job_id == job_id)
    return placed(clearing, job_id, configuration=row.configuration.model_copy(update=changes))


def charged(clearing: Clearing, job_id: str, **changes: Any) -> Clearing:
    row = next(row for row in clearing.placements if row.job_id == job_id)
    return placed(clearing, job_id, pools=(row.pools[0].model_copy(update=changes), *row.pools[1:]))


def with_gpus(clearing: Clearing, job_id: str, gpus: int, site: str | None = None) -> Clearing:
    row = next(row for row in clearing.placements if row.job_id == job_id)
    part = row.configuration.parts[0]
    site = site or part.site_id
    changed = part.model_copy(update={"gpus": gpus, "site_id": site, "pool_id": f"{site}/{part.gpu_type}"})
    return configured(clearing, job_id, parts=(changed, *row.configuration.parts[1:]))


FAULTS: dict[str, tuple[str, Callable[[Clearing], Clearing]]] = {
    "another snapshot": ("digest", lambda c: c.model_copy(update={"snapshot_digest": "0" * 64})),
    "another round": ("round", lambda c: c.model_copy(update={"round_number": 9})),
    "a price below the ask": ("below_ask", lambda c: c.model_copy(update={"prices": c.prices | {"bob/A100": 1}})),
    "a pool forgotten": ("pools", lambda c: c.model_copy(update={"prices": {}})),
    "a job forgotten": ("job_count", lambda c: c.model_copy(update={"unplaced": ()})),
    "a job placed twice": (
        "job_count",
        lambda c: c.model_copy(update={"placements": (*c.placements, c.placements[0])}),
    ),
    "an old version": ("version", lambda c: placed(c, "a", job_version=0)),
    "GPUs not asked for": ("request", lambda c: with_gpus(c, "a", 6)),
    "a site that it may not use": ("residency", lambda c: with_gpus(c, "c", 3, "bob")),
    "a pool that does not exist": ("pool", lambda c: with_gpus(c, "c", 3, "zed")),
    "a speed that nobody predicted": ("speed", lambda c: placed(c, "a", samples_per_s=1e9)),
    "another hub": ("hub", lambda c: configured(c, "d", hub_site="ada")),
    "traffic left out": ("traffic", lambda c: configured(c, "d", traffic=())),
    "a wrong action": ("action", lambda c: placed(c, "a", action="renew")),
    "a keep of nothing": ("action", lambda c: placed(c, "a", action="keep")),
    "a longer term": ("term", lambda c: placed(c, "a", term_s=601)),
    "a value above the bid": ("value", lambda c: placed(c, "a", value_micros_per_hour=10**9)),
    "a price of its own": ("price", lambda c: charged(c, "a", price_micros_per_gpu_hour=5)),
    "a payout below the ask": ("payout", lambda c: charged(c, "d", payout_micros_per_gpu_hour=5)),
    "a payout above the price": ("payout", lambda c: charged(c, "a", payout_micros_per_gpu_hour=10**9)),
    "a fee above the fee": ("fee", lambda c: charged(c, "a", payout_micros_per_gpu_hour=5 * CREDIT)),
    "more GPUs charged than given": ("rows", lambda c: charged(c, "a", gpus=6)),
    "no discount for the one who needs it": ("above_bid", lambda c: placed(c, "c", uplift_micros_per_hour=0)),
    "a discount for one who does not": ("uplift", lambda c: placed(c, "a", uplift_micros_per_hour=5)),
    "too little reserved": ("reservation", lambda c: placed(c, "a", reservation_micros=1)),
    "rent where links are free": (
        "rent",
        lambda c: placed(
            c,
            "d",
            links=tuple(
                row.model_copy(update={"rent_micros_per_hour": 1})
                for row in next(p for p in c.placements if p.job_id == "d").links
            ),
        ),
    ),
    "a better welfare": ("certificate_welfare", lambda c: proof(c, welfare_micros_per_hour=10**9)),
    "a lower bound": ("certificate_bound", lambda c: proof(c, bound_micros_per_hour=1)),
    "a smaller gap": ("certificate_gap", lambda c: proof(c, gap_micros_per_hour=0)),
    "less regret": ("certificate_regret", lambda c: proof(c, regret_sum_micros_per_hour=-1)),
    "less slack": ("certificate_slack", lambda c: proof(c, slack_sum_micros_per_hour=-1)),
    "less uplift": ("certificate_uplift", lambda c: proof(c, uplift_micros_per_hour=0)),
    "an LP that is far off": ("lp_gap", lambda c: proof(c, lp_objective_micros_per_hour=1.0)),
    "a failed check": ("checks", lambda c: proof(c, checks={"identity": False})),
    "a transfer too many": (
        "transfers",
        lambda c: c.model_copy(
            update={"transfers": tuple(t.model_copy(update={"rent_micros_per_hour": 1}) for t in c.transfers)}
        ),
    ),
}


def test_the_honest_clearing_has_what_the_faults_need_and_no_finding() -> None:
    snapshot, clearing = book()
    assert [row.job_id for row in clearing.placements] == ["a", "c", "d"]
    assert [row.uplift_micros_per_hour > 0 for row in clearing.placements] == [False, True, False]
    assert len(clearing.placements[2].links) == 2
    assert verify(snapshot, clearing) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    snapshot, clearing = book()
    code, plant = FAULTS[fault]
    assert code in {finding.code for finding in verify(snapshot, plant(clearing))}


def altered(snapshot: Snapshot, clearing: Clearing, **changes: Any) -> tuple[Snapshot, Clearing]:
    """Return the same clearing claimed for another snapshot."""
    other = snapshot.model_copy(update=changes)
    return other, clearing.model_copy(update={"snapshot_digest": from_snapshot(other).digest()})


def test_a_pool_sold_twice_is_found() -> None:
    pools = [pool("ada", 8)]
    jobs = [job("a", 10, 4), job("b", 9, 4)]
    clearing = clear(market(pools, jobs))
    snapshot, claimed = altered(market(pools, jobs), clearing, pools=(pool("ada", 7),))
    assert "oversold_pool" in {finding.code for finding in verify(snapshot, claimed)}


def test_a_link_sold_twice_is_found() -> None:
    kinds = ["A100", "T4", "V100"]
    sync = SyncPlan(codec="int8", period_steps=1)
    pools = [pool(site, 4, gpu_type=kind) for site in ("ada", "bob") for kind in kinds]
    jobs = [job(f"job{n}", 100, 8, gpu_type=k, sites_max=2, parameters=10**10, sync=sync) for n, k in enumerate(kinds)]
    everyone = market(pools, jobs)
    thin = tuple(row.model_copy(update={"bandwidth_bits_per_s": 1e7}) for row in everyone.links)
    everyone = everyone.model_copy(update={"links": thin})
    # Each alone fits and pays the asks; the three together send for 128 % of the link's time.
    alone = [clear(everyone.model_copy(update={"jobs": (row,)})) for row in jobs]
    claimed = alone[0].model_copy(
        update={
            "snapshot_digest": from_snapshot(everyone).digest(),
            "placements": tuple(clearing.placements[0] for clearing in alone),
        }
    )
    found = {finding.code for finding in verify(everyone, claimed)}
    assert "oversold_link" in found
    assert "oversold_pool" not in found


def test_uplift_beyond_equity_and_a_charge_beyond_the_hold_are_found() -> None:
    snapshot, clearing = book()
    assert "equity" in {f.code for f in verify(*altered(snapshot, clearing, market_equity_micros=1))}
    poor = tuple(row.model_copy(update={"hold_left_micros": 10}) for row in snapshot.jobs)
    assert {"value"} <= {f.code for f in verify(*altered(snapshot, clearing, jobs=poor))}


def test_a_vetoed_configuration_and_an_evicted_incumbent_are_found() -> None:
    snapshot, clearing = book()
    barred = tuple(row.model_copy(update={"barred": ("ada/A100:5",)}) for row in snapshot.jobs)
    assert "barred" in {f.code for f in verify(*altered(snapshot, clearing, jobs=barred))}
    sold = clearing.placements[0].configuration
    held = Incumbent(configuration=sold, epoch=1, locked_prices={"ada/A100": CREDIT}, term_ends_ms=NOW_MS + 1)
    jobs = tuple(row.model_copy(update={"incumbent": held}) if row.job_id == "b" else row for row in snapshot.jobs)
    assert "evicted" in {f.code for f in verify(*altered(snapshot, clearing, jobs=jobs))}
