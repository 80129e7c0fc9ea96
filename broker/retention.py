"""Retention: what nobody needs any more is forgotten, files before rows never the other way round.

Run by the settle beat, at most once an hour; level-triggered, so a sweep that was cut is
made good by the next.

    artifacts        of no open job, past their expiry; a job's files expire 30 days after it ended
    uploads          untouched for a day
    snapshots        and clearings of rounds older than the last `snapshot_retention_rounds`
    streams          with the files of their job
    idempotency      after 7 days
    certificates, sessions, join tokens   a day after they ended
    bars             once they have lifted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.orm import Session

from broker.database.tables import (
    Artifact,
    BarredConfiguration,
    BrowserSession,
    IdempotencyKey,
    Job,
    JobArtifact,
    JoinToken,
    Lease,
    Round,
    SiteCertificate,
    WorkdirUpload,
)
from broker.market import Market
from broker.streams import streams_of

DAY_MS: Final = 86_400 * 1000
JOB_FILES_LIFE_MS: Final = 30 * DAY_MS
IDEMPOTENCY_LIFE_MS: Final = 7 * DAY_MS
UPLOAD_IDLE_MS_MAX: Final = DAY_MS
SWEPT_AT_ONCE_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Swept:
    """How much a sweep removed."""

    artifacts: int
    uploads: int
    documents: int
    streams: int
    rows: int


def sweep(market: Market) -> Swept:
    """Forget what is past its retention, a bounded number of files at a time."""
    now_ms = market.clock.now_ms()
    artifacts = market.database.write("retire artifacts", lambda session: _retire_artifacts(session, now_ms))
    for digest in artifacts:
        market.artifacts.discard(digest)
    documents = market.database.read(lambda session: _old_documents(session, market))
    for digest in documents:
        market.artifacts.discard_document(digest)
    leases = market.database.read(lambda session: _old_leases(session, now_ms))
    streams = streams_of(market)
    removed = sum(streams.discard(lease_id) for lease_id in leases)
    return Swept(
        artifacts=len(artifacts),
        uploads=market.artifacts.sweep_partials(now_ms, UPLOAD_IDLE_MS_MAX),
        documents=len(documents),
        streams=removed,
        rows=market.database.write("retire rows", lambda session: _retire_rows(session, now_ms)),
    )


def _retire_artifacts(session: Session, now_ms: int) -> list[str]:
    """Remove the rows of artifacts that no kept job names, and return their digests.

    The rows go first: a file without a row is only lost space, and the next upload of it
    writes the row again; a row without a file would promise what is not there.
    """
    kept_job = or_(Job.ended_ms.is_(None), Job.ended_ms > now_ms - JOB_FILES_LIFE_MS)
    needed = (
        select(JobArtifact.digest)
        .join(Job, Job.job_id == JobArtifact.job_id)
        .where(JobArtifact.digest == Artifact.digest, kept_job)
    )
    gone = list(
        session.scalars(
            select(Artifact.digest)
            .where(Artifact.expires_ms.is_not(None), Artifact.expires_ms <= now_ms, ~exists(needed))
            .order_by(Artifact.digest)
            .limit(SWEPT_AT_ONCE_MAX)
        )
    )
    session.execute(delete(JobArtifact).where(JobArtifact.digest.in_(gone)))
    session.execute(delete(WorkdirUpload).where(WorkdirUpload.digest.in_(gone)))
    session.execute(delete(Artifact).where(Artifact.digest.in_(gone)))
    return gone


def _old_documents(session: Session, market: Market) -> list[str]:
    """Return the documents of old rounds, only those that no kept round shares."""
    newest = session.scalar(select(func.max(Round.round_number))) or 0
    first_kept = newest - market.settings.snapshot_retention_rounds + 1
    old = select(Round).where(Round.round_number < first_kept, Round.round_number >= first_kept - SWEPT_AT_ONCE_MAX)
    kept = select(Round).where(Round.round_number >= first_kept)
    digests = {digest for row in session.scalars(old) for digest in (row.snapshot_digest, row.clearing_digest)}
    if not digests:
        return []
    shared = {digest for row in session.scalars(kept) for digest in (row.snapshot_digest, row.clearing_digest)}
    return sorted(digests - shared)


def _old_leases(session: Session, now_ms: int) -> list[str]:
    over = (
        select(Lease.lease_id)
        .join(Job, Job.job_id == Lease.job_id)
        .where(Job.ended_ms <= now_ms - JOB_FILES_LIFE_MS)
        .order_by(Job.ended_ms.desc())
        .limit(SWEPT_AT_ONCE_MAX)
    )
    return list(session.scalars(over))


def _retire_rows(session: Session, now_ms: int) -> int:
    over_ms = now_ms - DAY_MS
    newest = session.scalar(select(func.max(Round.round_number))) or 0
    statements = (
        delete(IdempotencyKey).where(IdempotencyKey.created_ms <= now_ms - IDEMPOTENCY_LIFE_MS),
        delete(JoinToken).where(JoinToken.expires_ms <= over_ms),
        delete(BrowserSession).where(BrowserSession.expires_ms <= over_ms),
        delete(SiteCertificate).where(SiteCertificate.not_after_ms <= over_ms),
        delete(BarredConfiguration).where(BarredConfiguration.until_round < newest),
    )
    return sum(max(0, getattr(session.execute(statement), "rowcount", 0)) for statement in statements)
