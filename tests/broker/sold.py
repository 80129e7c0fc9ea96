"""A small market in which a job was sold two sites for an hour: what metering and the audit work on.

ada sells 4 GPUs at 2 credits an hour, bob 8 at 1; each sends to the other over a link with rent and
an egress price. The job is worth 15 credits an hour to its tenant and costs 16.2: equity adds 1.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from broker import ledger
from broker.allocation.clearing import LinkCharge, PoolCharge
from broker.allocation.clearing import Placement as Award
from broker.allocation.configuration import Configuration, Part
from broker.artifacts import ArtifactStore
from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.database.tables import (
    Gpu,
    Job,
    Lease,
    LeasedGpu,
    Link,
    Placement,
    Pool,
    Round,
    Site,
    Tenant,
    ViewChange,
)
from broker.database.terms import Term
from broker.doorbell import SilentDoorbell
from broker.identity.authority import Authority
from broker.ids import SequentialIds
from broker.market import Market
from broker.settings import Settings
from broker.transitions import JobState, LeaseState, PlacementState, SiteState, ViewState, change_state
from training.clock import ManualClock
from training.spec import SyncPlan

CREDIT: Final = 1_000_000
HOUR_MS: Final = 3_600_000
TERM_S: Final = 3600
GPUS: Final = {"ada": 4, "bob": 8}
PRICES: Final = {"ada": 2 * CREDIT, "bob": 1 * CREDIT}
RENT: Final = 100_000
EGRESS_PRICE: Final = 50_000
BANDWIDTH: Final = 1e8
UPLIFT: Final = 1_200_000
BUDGET: Final = 100 * CREDIT
EQUITY: Final = 50 * CREDIT


def sold_market(url: str, home: Path, *, reserved_micros: int = 20 * CREDIT, equity_micros: int = EQUITY) -> Market:
    """Return a market whose only job runs at ada and bob since now."""
    clock = ManualClock()
    database = Database(url)
    upgrade(database)
    market = Market(
        settings=Settings(home=home),
        database=database,
        clock=clock,
        ids=SequentialIds(),
        authority=Authority(home, clock),
        artifacts=ArtifactStore(home / "artifacts"),
        doorbell=SilentDoorbell(),
    )
    database.write("sell", lambda session: _sell(session, clock.now_ms(), reserved_micros, equity_micros))
    return market


def _sell(session: Session, now_ms: int, reserved_micros: int, equity_micros: int) -> None:
    ledger.open_accounts(session, now_ms)
    if equity_micros:
        ledger.fund_equity(session, equity_micros, "first", now_ms)
    session.add(Tenant(tenant_id="acme", name="Acme", created_ms=now_ms))
    ledger.open_tenant(session, "acme", now_ms)
    ledger.deposit(session, "acme", 2 * BUDGET, "first", now_ms)
    for site_id in GPUS:
        _open_site(session, site_id, now_ms)
    for source, target in (("ada", "bob"), ("bob", "ada")):
        session.add(
            Link(
                source=source,
                target=target,
                bandwidth_bits_per_s=BANDWIDTH,
                delay_s=0.01,
                loss=0.0,
                egress_price_micros_per_gb=EGRESS_PRICE,
            )
        )
    session.add(_round(now_ms))
    job = Job(job_id="job", tenant_id="acme", name="job", state="", version=0, spec="{}", epoch=1, submitted_ms=now_ms)
    session.add(job)
    session.flush()
    change_state(session, job, JobState.QUEUED, now_ms=now_ms)
    ledger.place_hold(session, job, BUDGET, now_ms)
    placement = _placement(award(), now_ms, reserved_micros)
    session.add(placement)
    session.flush()
    session.add(
        Term(
            placement_id="placement",
            number=1,
            award=placement.award,
            starts_ms=now_ms,
            ends_ms=placement.term_ends_ms,
            reserved_micros=reserved_micros,
        )
    )
    change_state(session, placement, PlacementState.PROPOSED, now_ms=now_ms)
    change_state(session, job, JobState.PROPOSED, now_ms=now_ms)
    session.flush()
    for site_id in GPUS:
        _lease(session, site_id, now_ms)
    change_state(session, placement, PlacementState.ACTIVE, now_ms=now_ms)
    change_state(session, job, JobState.RUNNING, now_ms=now_ms)
    view = ViewChange(
        job_id="job", number=1, epoch=1, state="", sites="[]", hub="ada", cause="start", created_ms=now_ms
    )
    session.add(view)
    change_state(session, view, ViewState.ISSUED, now_ms=now_ms)


def award() -> Award:
    """Return what the round gave the job."""
    return Award(
        job_id="job",
        job_version=1,
        action="start",
        configuration=Configuration(
            parts=tuple(
                Part(pool_id=f"{site_id}/H100", site_id=site_id, gpu_type="H100", gpus=GPUS[site_id])
                for site_id in sorted(GPUS)
            ),
            sync=SyncPlan(),
            hub_site="ada",
            samples_per_s=1.0,
            compute_s=1.0,
            intra_site_s=0.0,
            inter_site_s=0.0,
            step_s=1.0,
        ),
        value_micros_per_hour=15 * CREDIT,
        pools=tuple(
            PoolCharge(
                pool_id=f"{site_id}/H100",
                site_id=site_id,
                gpus=GPUS[site_id],
                price_micros_per_gpu_hour=PRICES[site_id],
                payout_micros_per_gpu_hour=PRICES[site_id],
            )
            for site_id in sorted(GPUS)
        ),
        links=tuple(
            LinkCharge(
                from_site=source,
                to_site=target,
                shares=100,
                rent_micros_per_hour=RENT,
                egress_bytes_per_s=1000,
                egress_price_micros_per_gb=EGRESS_PRICE,
            )
            for source, target in (("ada", "bob"), ("bob", "ada"))
        ),
        uplift_micros_per_hour=UPLIFT,
        term_s=TERM_S,
        reservation_micros=20 * CREDIT,
        samples_per_s=1.0,
        why="the best that its bid buys",
    )


def _open_site(session: Session, site_id: str, now_ms: int) -> None:
    site = Site(site_id=site_id, state="", version=0, offer="{}", joined_ms=now_ms)
    session.add(site)
    change_state(session, site, SiteState.LIVE, now_ms=now_ms)
    session.flush()
    ledger.open_site(session, site_id, now_ms)
    pool = Pool(
        pool_id=f"{site_id}/H100", site_id=site_id, gpu_type="H100", ask_micros_per_gpu_hour=PRICES[site_id] // 2
    )
    session.add(pool)
    session.flush()
    for number in range(GPUS[site_id]):
        session.add(Gpu(site_id=site_id, gpu_id=f"g{number}", pool_id=pool.pool_id, present=True))


def _round(now_ms: int) -> Round:
    return Round(
        round_number=1,
        taken_ms=now_ms,
        committed_ms=now_ms,
        snapshot_digest="",
        clearing_digest="",
        status="optimal",
        solver="",
        solve_s=0.0,
        prices="{}",
        certificate="{}",
        dropped="[]",
        jobs_considered=1,
        placements_made=1,
    )


def _placement(sold: Award, now_ms: int, reserved_micros: int) -> Placement:
    return Placement(
        placement_id="placement",
        job_id="job",
        epoch=1,
        round_number=1,
        state="",
        configuration=sold.configuration.model_dump_json(),
        configuration_key=sold.configuration.key,
        award=sold.model_dump_json(),
        why=sold.why,
        samples_per_s_predicted=sold.samples_per_s,
        value_micros_per_hour=sold.value_micros_per_hour,
        charge_micros_per_hour=sold.charge_micros_per_hour,
        uplift_micros_per_hour=sold.uplift_micros_per_hour,
        term_s=sold.term_s,
        reserved_micros=reserved_micros,
        charged_micros=0,
        proposed_ms=now_ms,
        proposal_ends_ms=now_ms + 30_000,
        active_ms=now_ms,
        term_ends_ms=now_ms + HOUR_MS,
    )


def _lease(session: Session, site_id: str, now_ms: int) -> None:
    lease = Lease(
        lease_id=f"lease_{site_id}",
        placement_id="placement",
        job_id="job",
        epoch=1,
        site_id=site_id,
        pool_id=f"{site_id}/H100",
        gpu_type="H100",
        gpus=GPUS[site_id],
        price_micros_per_gpu_hour=PRICES[site_id],
        state="",
        active_ms=now_ms,
        usage_sequence=0,
        delivered_gpu_milliseconds=0,
        delivered_samples=0,
        egress_bytes=0,
    )
    session.add(lease)
    for state in (LeaseState.PROPOSED, LeaseState.CONFIRMED, LeaseState.ACTIVE):
        change_state(session, lease, state, now_ms=now_ms)
    session.flush()
    for number in range(GPUS[site_id]):
        session.add(LeasedGpu(lease_id=lease.lease_id, site_id=site_id, gpu_id=f"g{number}", live=True))
    session.flush()
