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
    link probes      and what they measured, after 90 days
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, delete, exists, func, or_, select
from sqlalchemy.orm import Session

from broker.database.idempotency import IdempotencyKey
from broker.database.probes import LinkMeasurement, LinkProbe
from broker.database.refusals import BarredConfiguration
from broker.database.tables import (
    Artifact,
    BrowserSession,
    Job,
    JobArtifact,
    JoinToken,
    Lease,
    MarketState,
    Round,
    SiteCertificate,
)
from broker.database.uploads import SiteUpload, WorkdirUpload
from broker.market import Market
from broker.streams import streams_of
from broker.uploads import discard_unkept

DAY_MS: Final = 86_400 * 1000
JOB_FILES_LIFE_MS: Final = 30 * DAY_MS
IDEMPOTENCY_LIFE_MS: Final = 7 * DAY_MS
LINKS_LIFE_MS: Final = 90 * DAY_MS
UPLOAD_IDLE_MS_MAX: Final = DAY_MS
SWEPT_AT_ONCE_MAX: Final = 1000
BATCHES_MAX: Final = 50


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
        discard_unkept(market, digest)
    return Swept(
        artifacts=len(artifacts),
        uploads=market.artifacts.sweep_partials(now_ms, UPLOAD_IDLE_MS_MAX),
        documents=sum(_until_done(lambda: _sweep_documents(market))),
        streams=sum(_until_done(lambda: _sweep_streams(market, now_ms))),
        rows=market.database.write("retire rows", lambda session: _retire_rows(session, now_ms)),
    )


def _until_done(sweep_some: Callable[[], int | None]) -> Iterator[int]:
    """Sweep batch after batch until one finds nothing to do, within a bound."""
    for _ in range(BATCHES_MAX):
        swept = sweep_some()
        if swept is None:
            return
        yield swept


def _retire_artifacts(session: Session, now_ms: int) -> list[str]:
    """Remove the rows of artifacts that no kept job names, and return their digests.

    The rows go first: a file without a row is only lost space, and the next upload of it
    writes the row again; a row without a file would promise what is not there. Whoever writes the row again before
    the file is gone keeps it (`broker.uploads.discard_unkept`).
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
    for uploads in (WorkdirUpload, SiteUpload):
        session.execute(delete(uploads).where(uploads.digest.in_(gone)))
    session.execute(delete(Artifact).where(Artifact.digest.in_(gone)))
    return gone


def _sweep_documents(market: Market) -> int | None:
    """Remove the documents of the next old rounds, but for those that a kept round shares.

    Files first: a sweep that is cut goes over the same rounds again. None where no old round is left.
    """

    def old(session: Session) -> tuple[int, list[str]] | None:
        state = session.get(MarketState, 1)
        swept_to = 0 if state is None else state.documents_swept_to
        newest = session.scalar(select(func.max(Round.round_number))) or 0
        last_old = newest - market.settings.snapshot_retention_rounds
        until = min(last_old, swept_to + SWEPT_AT_ONCE_MAX)
        if until <= swept_to:
            return None
        digests = _documents(session, Round.round_number > swept_to, Round.round_number <= until)
        shared = _documents(
            session,
            Round.round_number > last_old,
            or_(Round.snapshot_digest.in_(digests), Round.clearing_digest.in_(digests)),
        )
        return until, sorted(digests - shared)

    found = market.database.read(old)
    if found is None:
        return None
    until, digests = found
    for digest in digests:
        market.artifacts.discard_document(digest)
    market.database.write("documents swept", lambda session: _remember(session, documents_swept_to=until))
    return len(digests)


def _documents(session: Session, *conditions: ColumnElement[bool]) -> set[str]:
    rows = session.execute(select(Round.snapshot_digest, Round.clearing_digest).where(*conditions))
    return {digest for row in rows for digest in row}


def _sweep_streams(market: Market, now_ms: int) -> int | None:
    """Remove the streams of the next jobs that ended long ago; None where no such job is left."""
    over_ms = now_ms - JOB_FILES_LIFE_MS

    def old(session: Session) -> tuple[int, list[str]] | None:
        state = session.get(MarketState, 1)
        swept_to = 0 if state is None else state.streams_swept_to
        jobs = session.execute(
            select(Job.job_id, Job.ended_ms)
            .where(Job.ended_ms > swept_to, Job.ended_ms <= over_ms)
            .order_by(Job.ended_ms)
            .limit(SWEPT_AT_ONCE_MAX)
        ).all()
        if not jobs:
            return None
        last_ms = jobs[-1].ended_ms
        # Of several that ended in the batch's last millisecond some may be beyond it: all of them are taken.
        leases = (
            select(Lease.lease_id)
            .join(Job, Job.job_id == Lease.job_id)
            .where(Job.ended_ms > swept_to, Job.ended_ms <= last_ms)
        )
        return last_ms, list(session.scalars(leases))

    found = market.database.read(old)
    if found is None:
        return None
    last_ms, leases = found
    streams = streams_of(market)
    removed = sum(streams.discard(lease_id) for lease_id in leases)
    market.database.write("streams swept", lambda session: _remember(session, streams_swept_to=last_ms))
    return removed


def _remember(session: Session, **swept_to: int) -> None:
    """Write down how far a sweep has come; of two at once the further one counts."""
    state = session.get(MarketState, 1)
    if state is None:
        state = MarketState(one=1, changes=0, changes_cleared=0, seed=0, documents_swept_to=0, streams_swept_to=0)
        session.add(state)
    for column, value in swept_to.items():
        setattr(state, column, max(value, getattr(state, column)))


def _retire_rows(session: Session, now_ms: int) -> int:
    over_ms = now_ms - DAY_MS
    newest = session.scalar(select(func.max(Round.round_number))) or 0
    statements = (
        delete(IdempotencyKey).where(IdempotencyKey.created_ms <= now_ms - IDEMPOTENCY_LIFE_MS),
        delete(JoinToken).where(JoinToken.expires_ms <= over_ms),
        delete(BrowserSession).where(BrowserSession.expires_ms <= over_ms),
        delete(SiteCertificate).where(SiteCertificate.not_after_ms <= over_ms),
        delete(LinkMeasurement).where(LinkMeasurement.measured_ms <= now_ms - LINKS_LIFE_MS),
        delete(LinkProbe).where(LinkProbe.ended_ms <= now_ms - LINKS_LIFE_MS),
        delete(BarredConfiguration).where(BarredConfiguration.until_round < newest),
    )
    return sum(max(0, getattr(session.execute(statement), "rowcount", 0)) for statement in statements)
