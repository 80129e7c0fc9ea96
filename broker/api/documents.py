"""What the API says of jobs: one document for lists, one with everything for a single job.

Work with `broker.database.tables` for the rows and `broker.allocation.clearing` for a placement's
own account of its prices.
"""

from __future__ import annotations

from dataclasses import asdict

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import LinkCharge, PoolCharge
from broker.allocation.clearing import Placement as Award
from broker.database.tables import Event, Hold, Job, Lease, Placement
from broker.queries.forecasts import newest_forecasts
from broker.queries.jobs import ArtifactRow, list_memberships
from broker.speeds import read_speeds
from broker.transitions import PlacementState
from training.spec import JobSpec, SyncPlan


class JobDocument(BaseModel):
    """A job in a list. `reason` is one sentence that says why it is where it is."""

    job_id: str
    name: str
    state: str
    reason_code: str
    reason: str
    samples: int
    samples_done: int
    progress: float
    epoch: int
    submitted_ms: int
    started_ms: int | None
    ended_ms: int | None


class ForecastDocument(BaseModel):
    """When a job was said to start or finish: nine of ten fall between `low_ms` and `high_ms`."""

    stated_ms: int
    low_ms: int
    middle_ms: int
    high_ms: int


class LeaseDocument(BaseModel):
    """One site's part of a placement, as it stands."""

    lease_id: str
    site_id: str
    gpu_type: str
    gpus: int
    price_micros_per_gpu_hour: int
    state: str
    phase: str
    delivered_gpu_milliseconds: int
    egress_bytes: int
    end_cause: str


class PlacementDocument(BaseModel):
    """What a job won, at which prices and why; predicted and measured speed side by side.

    `samples_per_s_predicted` is what it was sold with; `..._expected` what it will reach by all that its family has
    measured by now, itself included, 90 % of runs between `..._low` and `..._high`; null before the first measurement.
    """

    placement_id: str
    epoch: int
    round_number: int
    state: str
    why: str
    pools: tuple[PoolCharge, ...]
    links: tuple[LinkCharge, ...]
    sync: SyncPlan
    hub_site: str | None
    value_micros_per_hour: int
    charge_micros_per_hour: int
    uplift_micros_per_hour: int
    reserved_micros: int
    samples_per_s_predicted: float
    samples_per_s_expected: float | None
    samples_per_s_low: float | None
    samples_per_s_high: float | None
    samples_per_s_measured: float | None
    proposed_ms: int
    active_ms: int | None
    term_ends_ms: int | None
    ended_ms: int | None
    end_cause: str
    leases: list[LeaseDocument]


class MembershipDocument(BaseModel):
    """A view of the job's round log; `opened_in_ms` is None until all its sites have promised it."""

    number: int
    epoch: int
    state: str
    sites: list[str]
    hub: str
    cause: str
    created_ms: int
    opened_in_ms: int | None


class JobDetail(JobDocument):
    """One job with its money, its specification, its newest placement and who was in its round log."""

    spec: JobSpec
    budget_micros: int
    cost_micros: int
    held_micros: int
    placement: PlacementDocument | None
    memberships: list[MembershipDocument]
    forecasts: dict[str, ForecastDocument] = Field(description="by what is forecast: start and finish, as last stated")


class EventDocument(BaseModel):
    """Something that happened."""

    event_id: int
    created_ms: int
    kind: str
    before: str
    after: str
    detail: str
    job_id: str | None
    site_id: str | None
    lease_id: str | None
    round_number: int | None
    actor: str | None = Field(default=None, description="who asked for it; admins see it")


class EventPage(BaseModel):
    """A page of events: a job's oldest first, the market's newest first."""

    items: list[EventDocument]
    next_cursor: str | None


class ArtifactDocument(BaseModel):
    """A file of a job: its workdir, a checkpoint or an output. `path` is where to fetch it."""

    name: str
    kind: str
    digest: str
    size_bytes: int
    site_id: str | None
    epoch: int
    round_number: int
    samples_done: int
    created_ms: int
    path: str


def job_document(job: Job) -> JobDocument:
    """Return what a list says of `job`."""
    return JobDocument(**_job_fields(job, JobSpec.model_validate_json(job.spec)))


def job_detail(session: Session, job: Job, now_ms: int) -> JobDetail:
    """Return everything that its tenant may know of `job`."""
    spec = JobSpec.model_validate_json(job.spec)
    hold = session.get(Hold, job.job_id)
    newest = session.scalar(
        select(Placement).where(Placement.job_id == job.job_id).order_by(Placement.epoch.desc()).limit(1)
    )
    return JobDetail(
        **_job_fields(job, spec),
        spec=spec,
        budget_micros=spec.market.budget_micros,
        cost_micros=0 if hold is None else hold.posted_micros,
        held_micros=0 if hold is None else hold.amount_micros - hold.posted_micros - hold.voided_micros,
        placement=None if newest is None else placement_document(session, job, newest, now_ms),
        memberships=[MembershipDocument(**asdict(row)) for row in list_memberships(session, job.job_id)],
        forecasts={
            what: ForecastDocument(
                stated_ms=row.stated_ms, low_ms=row.low_ms, middle_ms=row.middle_ms, high_ms=row.high_ms
            )
            for what, row in newest_forecasts(session, job.job_id).items()
        },
    )


def placement_document(session: Session, job: Job, placement: Placement, now_ms: int) -> PlacementDocument:
    """Return a placement as its tenant sees it."""
    award = Award.model_validate_json(placement.award)
    spec = JobSpec.model_validate_json(job.spec)
    known = read_speeds(session, tenant_id=job.tenant_id).expected(job.tenant_id, spec, award.configuration)
    leases = session.scalars(select(Lease).where(Lease.placement_id == placement.placement_id).order_by(Lease.site_id))
    return PlacementDocument(
        placement_id=placement.placement_id,
        epoch=placement.epoch,
        round_number=placement.round_number,
        state=placement.state,
        why=placement.why,
        pools=award.pools,
        links=award.links,
        sync=award.configuration.sync,
        hub_site=award.configuration.hub_site,
        value_micros_per_hour=placement.value_micros_per_hour,
        charge_micros_per_hour=placement.charge_micros_per_hour,
        uplift_micros_per_hour=placement.uplift_micros_per_hour,
        reserved_micros=placement.reserved_micros,
        samples_per_s_predicted=placement.samples_per_s_predicted,
        samples_per_s_expected=None if known is None else known.samples_per_s,
        samples_per_s_low=None if known is None else known.low,
        samples_per_s_high=None if known is None else known.high,
        samples_per_s_measured=_measured(job, placement, now_ms),
        proposed_ms=placement.proposed_ms,
        active_ms=placement.active_ms,
        term_ends_ms=placement.term_ends_ms,
        ended_ms=placement.ended_ms,
        end_cause=placement.end_cause,
        leases=[_lease_document(lease) for lease in leases],
    )


def event_document(event: Event, *, to_admin: bool = False) -> EventDocument:
    """Return an event as it is shown to a tenant or to an admin."""
    return EventDocument(
        event_id=event.event_id,
        created_ms=event.created_ms,
        kind=event.kind,
        before=event.before,
        after=event.after,
        detail=event.detail,
        job_id=event.job_id,
        site_id=event.site_id,
        lease_id=event.lease_id,
        round_number=event.round_number,
        actor=event.actor if to_admin else None,
    )


def artifact_document(artifact: ArtifactRow) -> ArtifactDocument:
    """Return a file of a job as it is shown."""
    row = artifact.row
    return ArtifactDocument(
        name=row.name,
        kind=row.kind,
        digest=row.digest,
        size_bytes=artifact.size_bytes,
        site_id=row.site_id,
        epoch=row.epoch,
        round_number=row.round_number,
        samples_done=row.samples_done,
        created_ms=row.created_ms,
        path=f"/v1/jobs/{row.job_id}/artifacts/{row.name}?kind={row.kind}",
    )


def _job_fields(job: Job, spec: JobSpec) -> dict[str, object]:
    samples = spec.market.workload.samples
    return {
        "job_id": job.job_id,
        "name": job.name,
        "state": job.state,
        "reason_code": job.reason_code,
        "reason": job.reason,
        "samples": samples,
        "samples_done": job.samples_done,
        "progress": min(1.0, job.samples_done / samples),
        "epoch": job.epoch,
        "submitted_ms": job.submitted_ms,
        "started_ms": job.started_ms,
        "ended_ms": job.ended_ms,
    }


def _measured(job: Job, placement: Placement, now_ms: int) -> float | None:
    """Return samples per second of the placement so far; None while nothing can be said."""
    if placement.active_ms is None or placement.epoch != job.epoch:
        return None
    until_ms = now_ms if placement.state == PlacementState.ACTIVE else (placement.ended_ms or now_ms)
    done = job.samples_done - placement.base_samples
    if until_ms <= placement.active_ms or done <= 0:
        return None
    return done * 1000 / (until_ms - placement.active_ms)


def _lease_document(lease: Lease) -> LeaseDocument:
    return LeaseDocument(
        lease_id=lease.lease_id,
        site_id=lease.site_id,
        gpu_type=lease.gpu_type,
        gpus=lease.gpus,
        price_micros_per_gpu_hour=lease.price_micros_per_gpu_hour,
        state=lease.state,
        phase=lease.phase,
        delivered_gpu_milliseconds=lease.delivered_gpu_milliseconds,
        egress_bytes=lease.egress_bytes,
        end_cause=lease.end_cause,
    )
