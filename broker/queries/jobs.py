"""What is known of jobs: a tenant's list, and everything about one.

The number of queries is the same however many jobs, placements and leases there are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.forecasts import Forecast
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import (
    Artifact,
    Event,
    Hold,
    Job,
    JobArtifact,
    Lease,
    Placement,
    ViewChange,
)
from broker.errors import NotFoundError
from broker.invoices import Invoice, invoice
from broker.queries.forecasts import newest_forecasts
from broker.speeds import ExpectedSpeed, read_speeds
from broker.transitions import FINAL_JOB_STATES, PlacementState
from sites.protocol import AttemptReport
from training.spec import SITES_PER_JOB_MAX, JobSpec

JOBS_PER_PAGE: Final = 50
EVENTS_MAX: Final = 100
PLACEMENTS_MAX: Final = 20
VIEWS_MAX: Final = 20
ARTIFACTS_SHOWN: Final = 100
# A job has up to 100 outputs, of each at most one for a site, and a checkpoint for each site.
ARTIFACTS_MAX: Final = 101 * SITES_PER_JOB_MAX + 1


@dataclass(frozen=True, slots=True)
class JobRow:
    """One line of a tenant's list."""

    job_id: str
    name: str
    state: str
    reason: str
    configuration_key: str | None
    samples_done: int
    samples: int
    posted_micros: int
    hold_micros: int
    submitted_ms: int


@dataclass(frozen=True, slots=True)
class LeaseView:
    """One site's part of a placement, with the last report of its attempt."""

    row: Lease
    report: AttemptReport | None


@dataclass(frozen=True, slots=True)
class PlacementView:
    """A placement, the clearing's award and its leases by site."""

    row: Placement
    award: Award
    leases: tuple[LeaseView, ...]


@dataclass(frozen=True, slots=True)
class ArtifactRow:
    """A file of a job that can be fetched, and its size."""

    row: JobArtifact
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MembershipRow:
    """A view of a job's round log: who was in it, from when on, and how long it took to agree on it."""

    number: int
    epoch: int
    state: str
    sites: tuple[str, ...]
    hub: str
    cause: str
    created_ms: int
    opened_in_ms: int | None


@dataclass(frozen=True, slots=True)
class JobView:
    """One job with all that its page shows. Placements, memberships and events come newest first.

    `expected` is what its newest placement reaches by what its family has measured; None before the first measurement.
    """

    row: Job
    spec: JobSpec
    hold: Hold
    placements: tuple[PlacementView, ...]
    memberships: tuple[MembershipRow, ...]
    events: tuple[Event, ...]
    artifacts: tuple[ArtifactRow, ...]
    invoice: Invoice
    forecasts: dict[str, Forecast]
    expected: ExpectedSpeed | None

    @property
    def placement(self) -> PlacementView | None:
        """The placement that stands, None where the job waits or has ended."""
        live = (placement for placement in self.placements if placement.row.state != PlacementState.ENDED)
        return next(live, None)

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self.row.state in FINAL_JOB_STATES and self.hold.closed_ms is not None

    @property
    def egress_bytes(self) -> int:
        """What all its sites have sent each other, as metered."""
        return sum(lease.row.egress_bytes for placement in self.placements for lease in placement.leases)


def list_jobs(
    session: Session, tenant_id: str, *, state: str | None = None, after: tuple[int, str] | None = None
) -> list[JobRow]:
    """Return a page of a tenant's jobs, newest first, and one more where there is a next page."""
    query = (
        select(Job, Hold, Placement.configuration_key)
        .join(Hold, Hold.job_id == Job.job_id)
        .join(Placement, (Placement.job_id == Job.job_id) & (PLACEMENT_STANDS), isouter=True)
        .where(Job.tenant_id == tenant_id)
        .order_by(Job.submitted_ms.desc(), Job.job_id.desc())
        .limit(JOBS_PER_PAGE + 1)
    )
    if state is not None:
        query = query.where(Job.state == state)
    if after is not None:
        query = query.where(tuple_(Job.submitted_ms, Job.job_id) < after)
    return [
        JobRow(
            job_id=job.job_id,
            name=job.name,
            state=job.state,
            reason=job.reason,
            configuration_key=key,
            samples_done=job.samples_done,
            samples=JobSpec.model_validate_json(job.spec).market.workload.samples,
            posted_micros=hold.posted_micros,
            hold_micros=hold.amount_micros,
            submitted_ms=job.submitted_ms,
        )
        for job, hold, key in session.execute(query)
    ]


def count_jobs(session: Session, tenant_id: str) -> dict[str, int]:
    """Return how many of a tenant's jobs are in each state."""
    rows = session.execute(select(Job.state, func.count()).where(Job.tenant_id == tenant_id).group_by(Job.state))
    return dict(rows.all())


def job_row(session: Session, job_id: str, tenant_id: str | None) -> Job:
    """Return a job of `tenant_id`, or of anyone where that is None.

    Raises NotFoundError for another tenant's job in the words that it has for none.
    """
    job = session.get(Job, job_id)
    if job is None or (tenant_id is not None and job.tenant_id != tenant_id):
        raise NotFoundError(f"there is no job {job_id[:64]!r}")
    return job


def read_job(session: Session, job_id: str, tenant_id: str | None) -> JobView:
    """Return everything about a job. Raises NotFoundError as `job_row` does."""
    job = job_row(session, job_id, tenant_id)
    events = select(Event).where(Event.job_id == job_id).order_by(Event.event_id.desc()).limit(EVENTS_MAX)
    spec = JobSpec.model_validate_json(job.spec)
    placements = _placements(session, job_id)
    expected = None
    if placements:
        speeds = read_speeds(session, tenant_id=job.tenant_id)
        expected = speeds.expected(job.tenant_id, spec, placements[0].award.configuration)
    return JobView(
        row=job,
        spec=spec,
        hold=session.get_one(Hold, job_id),
        placements=placements,
        memberships=list_memberships(session, job_id),
        events=tuple(session.scalars(events)),
        artifacts=list_artifacts(session, job_id, limit=ARTIFACTS_SHOWN),
        invoice=invoice(session, job_id),
        forecasts=newest_forecasts(session, job_id),
        expected=expected,
    )


def list_memberships(session: Session, job_id: str) -> tuple[MembershipRow, ...]:
    """Return the newest views of a job's round log."""
    newest = select(ViewChange).where(ViewChange.job_id == job_id).order_by(ViewChange.number.desc()).limit(VIEWS_MAX)
    return tuple(
        MembershipRow(
            number=row.number,
            epoch=row.epoch,
            state=row.state,
            sites=tuple(json.loads(row.sites)),
            hub=row.hub,
            cause=row.cause,
            created_ms=row.created_ms,
            opened_in_ms=None if row.issued_ms is None else row.issued_ms - row.created_ms,
        )
        for row in session.scalars(newest)
    )


def list_artifacts(session: Session, job_id: str, *, limit: int = ARTIFACTS_MAX) -> tuple[ArtifactRow, ...]:
    """Return the files of a job that are stored whole, outputs first."""
    rows = session.execute(
        select(JobArtifact, Artifact.size_bytes)
        .join(Artifact, Artifact.digest == JobArtifact.digest)
        .where(JobArtifact.job_id == job_id, Artifact.complete)
        .order_by(JobArtifact.kind != "output", JobArtifact.kind, JobArtifact.name)
        .limit(limit)
    )
    return tuple(ArtifactRow(row, size_bytes) for row, size_bytes in rows)


def artifact_digest(session: Session, job_id: str, kind: str, name: str) -> str:
    """Return the digest of a job's file. Raises NotFoundError where it has none of that name."""
    held = session.get(JobArtifact, (job_id, kind, name))
    if held is None:
        raise NotFoundError(f"this job has no {kind[:20]} called {name[:100]!r}")
    return held.digest


def _placements(session: Session, job_id: str) -> tuple[PlacementView, ...]:
    rows = list(
        session.scalars(
            select(Placement).where(Placement.job_id == job_id).order_by(Placement.epoch.desc()).limit(PLACEMENTS_MAX)
        )
    )
    leases: dict[str, list[LeaseView]] = {row.placement_id: [] for row in rows}
    for lease in session.scalars(select(Lease).where(Lease.placement_id.in_(list(leases))).order_by(Lease.site_id)):
        report = AttemptReport.model_validate_json(lease.attempt) if lease.attempt else None
        leases[lease.placement_id].append(LeaseView(lease, report))
    return tuple(
        PlacementView(row, Award.model_validate_json(row.award), tuple(leases[row.placement_id])) for row in rows
    )
