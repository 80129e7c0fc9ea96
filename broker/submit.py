"""Step 1 of a job's journey: submit. One transaction writes the job, its hold and its event.

Works with `broker.ledger` for the hold and `broker.quote` for the question whether any state of
this federation could ever hold the job. After the commit the doorbell is rung, best effort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Artifact, Job, JobArtifact, Tenant
from broker.database.uploads import WorkdirUpload
from broker.errors import NeverPossibleError, NotFoundError, RefusedError
from broker.freeze import require_open
from broker.instant import TRIES_MAX, InstantOffer, InstantOvertakenError, commit_offer, make_offer, wants_instant
from broker.market import Market
from broker.quote import reason_never_possible
from broker.tenant_secrets import require_secrets
from broker.transitions import FINAL_JOB_STATES, JobState, change_state, note_change
from training.spec import JobSpec

WORKDIR_KIND: Final = "workdir"

BeforeCommit = Callable[[Session, Job], None]


class WorkdirMissingError(RefusedError):
    """The job names a workdir that its tenant has not uploaded, whoever else may have."""

    code = "job.workdir_missing"


class DeadlinePastError(RefusedError):
    """The job's deadline has passed already."""

    code = "job.deadline_past"


class QueueFullError(RefusedError):
    """The tenant has as many waiting jobs as one tenant may."""

    code = "job.queue_full"


def submit_job(market: Market, tenant_id: str, spec: JobSpec, before_commit: BeforeCommit | None = None) -> Job:
    """Accept a job for the market and return its row.

    `before_commit` runs in the same transaction: the API records its idempotency key there.
    Raises RefusedError (and its kinds), InsufficientFundsError or NeverPossibleError; a refused
    job leaves nothing behind.
    """
    now_ms = market.clock.now_ms()
    if spec.market.deadline_ms is not None and spec.market.deadline_ms <= now_ms:
        message = "the deadline lies in the past; give a later one, or none"
        raise DeadlinePastError(message)
    if wants_instant(spec):
        return _submit_instant(market, tenant_id, spec, before_commit)

    def work(session: Session) -> Job:
        job = _write(session, market, tenant_id, spec)
        if before_commit is not None:
            before_commit(session, job)
        return job

    job = market.database.write("submit", work)
    market.doorbell.ring_round()
    return job


def _submit_instant(market: Market, tenant_id: str, spec: JobSpec, before_commit: BeforeCommit | None) -> Job:
    """Submit a job together with its lease; an offer that was overtaken is made anew a few times."""
    market.database.read(lambda session: _check_admissible(session, market, tenant_id, spec))
    for _ in range(TRIES_MAX):
        offer = make_offer(market, tenant_id, spec)

        def work(session: Session, offer: InstantOffer = offer) -> tuple[Job, list[str]]:
            job = _write(session, market, tenant_id, spec)
            sites = commit_offer(session, market, job, offer)
            if sites is None:
                raise _OvertakenError
            if before_commit is not None:
                before_commit(session, job)
            return job, sites

        try:
            job, sites = market.database.write("submit", work)
        except _OvertakenError:
            continue
        for site_id in sites:
            market.doorbell.wake_site(site_id)
        market.doorbell.ring_round()
        return job
    message = "others were faster each time that a place was found for it; submit it again, or without `start: now`"
    raise InstantOvertakenError(message)


class _OvertakenError(Exception):
    """What was offered no longer stands; the transaction is rolled back."""


def _write(session: Session, market: Market, tenant_id: str, spec: JobSpec) -> Job:
    """Write the job, its hold and its event. Raises FrozenError while the market takes nothing new."""
    require_open(session)
    now_ms = market.clock.now_ms()
    _check_admissible(session, market, tenant_id, spec)
    job = Job(
        job_id=market.ids.new("job"),
        tenant_id=tenant_id,
        name=spec.name,
        state="",
        version=0,
        spec=spec.model_dump_json(),
        epoch=0,
        samples_done=0,
        failures=0,
        reason_code="waiting",
        reason="waits for the next round",
        submitted_ms=now_ms,
    )
    session.add(job)
    change_state(session, job, JobState.QUEUED, now_ms=now_ms)
    session.flush()
    session.add(_workdir_of(job, spec, now_ms))
    ledger.place_hold(session, job, spec.market.budget_micros, now_ms)
    note_change(session)
    return job


def _check_admissible(session: Session, market: Market, tenant_id: str, spec: JobSpec) -> None:
    if session.get(Tenant, tenant_id) is None:
        message = f"there is no tenant {tenant_id!r}; ask the market's admin to create it"
        raise NotFoundError(message)
    workdir = session.get(Artifact, spec.workdir_digest)
    # A digest is no pass: whoever learns another tenant's cannot have its files run, or know that they are here.
    own = session.get(WorkdirUpload, (tenant_id, spec.workdir_digest))
    if workdir is None or not workdir.complete or own is None:
        message = f"you have not uploaded the workdir {spec.workdir_digest[:12]}… whole; upload it, then submit again"
        raise WorkdirMissingError(message)
    require_secrets(session, tenant_id, spec)
    waiting = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(Job.tenant_id == tenant_id, Job.state.not_in(sorted(FINAL_JOB_STATES)))
    )
    if (waiting or 0) >= market.settings.jobs_queued_per_tenant_max:
        message = f"{waiting} jobs are waiting or running, which is the most for one tenant; wait or cancel some"
        raise QueueFullError(message)
    never = reason_never_possible(session, spec)
    if never is not None:
        raise NeverPossibleError(never)


def _workdir_of(job: Job, spec: JobSpec, now_ms: int) -> JobArtifact:
    return JobArtifact(
        job_id=job.job_id,
        kind=WORKDIR_KIND,
        name="workdir.tar.gz",
        digest=spec.workdir_digest,
        epoch=0,
        round_number=0,
        samples_done=0,
        created_ms=now_ms,
    )
