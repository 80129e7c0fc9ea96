"""A tenant's wish to stop a job: at once where it waits, by ending its leases where it runs."""

from __future__ import annotations

from sqlalchemy.orm import Session

from broker.attempts import Ending, end_job
from broker.database.tables import Job
from broker.errors import ConflictError, NotFoundError
from broker.leases import end_placement, live_placement
from broker.market import Market
from broker.transitions import FINAL_JOB_STATES, EndCause, JobState


def request_cancel(market: Market, tenant_id: str, job_id: str) -> Job:
    """Cancel a job of `tenant_id`; what was delivered so far stays charged, the rest is released.

    Raises NotFoundError for another tenant's job, ConflictError where it has ended already.
    """

    def work(session: Session) -> tuple[Job, list[str]]:
        job = session.get(Job, job_id)
        if job is None or job.tenant_id != tenant_id:
            message = f"there is no job {job_id!r}"
            raise NotFoundError(message)
        if job.state in FINAL_JOB_STATES:
            message = f"the job has already {job.state}; nothing is left to cancel"
            raise ConflictError(message)
        placement = live_placement(session, job_id)
        sites = [] if placement is None else end_placement(session, market, placement, EndCause.CANCELLED)
        end_job(session, market, job_id, Ending(JobState.CANCELLED, "cancelled", "cancelled by its tenant"))
        return job, sites

    job, sites = market.database.write("cancel", work)
    for site_id in sites:
        market.doorbell.wake_site(site_id)
    market.doorbell.ring_round()
    market.doorbell.wake_watchers(job_id)
    return job
