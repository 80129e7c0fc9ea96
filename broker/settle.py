"""Step 8: settle. What a final job's hold still contains goes back, lost work is refunded, and its invoice is final.

A job's hold closes when every lease is settled: its site has reported the attempt's end, with its
last usage before it, or may no longer report. Idempotent like `reconcile`.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Hold, Job, Lease
from broker.lease_clock import ended_since_ms
from broker.market import Market
from broker.refunds import refund_lost_work
from broker.transitions import FINAL_JOB_STATES, JobState, LeaseState, record_event
from broker.underdelivery import refund_underdelivery
from pricing.money import format_credits
from sites.protocol import AttemptPhase


def settle(market: Market) -> int:
    """Close the holds that can be closed; return how many were."""

    def work(session: Session) -> list[str]:
        return [job.job_id for job in _open_final_jobs(session) if _close(session, market, job)]

    closed = market.database.write("settle", work)
    for job_id in closed:
        market.doorbell.wake_watchers(job_id)
    return len(closed)


def _open_final_jobs(session: Session) -> list[Job]:
    # From the open holds on: final jobs are nearly all that ever were.
    holding = select(Hold.job_id).where(Hold.closed_ms.is_(None))
    over = Job.state.not_in(sorted(set(JobState) - FINAL_JOB_STATES))
    return list(session.scalars(select(Job).where(Job.job_id.in_(holding), over).order_by(Job.job_id)))


def _close(session: Session, market: Market, job: Job) -> bool:
    now_ms = market.clock.now_ms()
    for lease in session.scalars(select(Lease).where(Lease.job_id == job.job_id)):
        assert lease.state == LeaseState.ENDED, "a final job has no live lease"
        reported = lease.active_ms is None or lease.phase == AttemptPhase.EXITED
        if not reported and ended_since_ms(lease, market.clock) < round(market.settings.settle_s * 1000):
            return False
    refund_lost_work(session, job, now_ms)
    refund_underdelivery(session, job, now_ms)
    voided = ledger.close_hold(session, job.job_id, now_ms)
    record_event(
        session,
        "settled",
        now_ms=now_ms,
        job_id=job.job_id,
        tenant_id=job.tenant_id,
        detail=f"{format_credits(voided)} credits given back",
    )
    return True
