"""Refunds of lost work: what a site was paid for and lost goes back to the tenant, by new transfers, when a job settles.

A gang that was lost whole resumes from its newest checkpoint; what came after that checkpoint was paid for nothing.
The site that broke or fell silent gives back its share (`pricing.refunds` has the rule); the others delivered. Run by
`broker.settle` before a hold closes, when no site of the job may report any more; once for each lease.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Job, Lease, Placement, UsageReport
from broker.leases import newest_checkpoint
from broker.transitions import EndCause, record_event
from pricing.money import format_credits
from pricing.refunds import refund_micros

# Causes of a lease's end that are its site's own.
FAULTS: Final = frozenset({EndCause.EXPIRED, EndCause.SITE})


def refund_lost_work(session: Session, job: Job, now_ms: int) -> int:
    """Refund what sites at fault were paid for lost work of a job; return how much, in micro-credits."""
    placements = list(
        session.scalars(select(Placement).where(Placement.job_id == job.job_id).order_by(Placement.epoch))
    )
    total = 0
    for number, placement in enumerate(placements):
        if placement.end_cause != EndCause.LOST:
            continue
        kept = _kept_samples(session, job, placements, number)
        leases = list(session.scalars(select(Lease).where(Lease.placement_id == placement.placement_id)))
        delivered = sum(lease.delivered_samples for lease in leases)
        for lease in leases:
            if lease.end_cause in FAULTS:
                total += _refund(session, job, lease, delivered=delivered, kept=kept, now_ms=now_ms)
    return total


def _kept_samples(session: Session, job: Job, placements: list[Placement], number: int) -> int:
    """Return the samples of a placement that a later one, or nobody, resumed from."""
    if number + 1 < len(placements):
        resumed = placements[number + 1].base_samples
    else:
        checkpoint = newest_checkpoint(session, job.job_id)
        resumed = 0 if checkpoint is None else checkpoint.samples_done
    return max(0, resumed - placements[number].base_samples)


def _refund(session: Session, job: Job, lease: Lease, *, delivered: int, kept: int, now_ms: int) -> int:
    own = func.sum(UsageReport.charge_micros - UsageReport.fee_micros)
    earned = int(session.scalar(select(func.coalesce(own, 0)).where(UsageReport.lease_id == lease.lease_id)) or 0)
    amount = refund_micros(earned_micros=earned, samples_delivered=delivered, samples_kept=kept)
    if amount == 0:
        return 0
    memo = f"{max(0, delivered - kept)} of {delivered} samples were lost with {lease.site_id} ({lease.end_cause})"
    if ledger.refund(session, lease, job.tenant_id, amount, now_ms=now_ms, memo=memo):
        record_event(
            session,
            "refunded",
            now_ms=now_ms,
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            site_id=lease.site_id,
            lease_id=lease.lease_id,
            detail=f"{format_credits(amount)} credits: {memo}",
        )
    return int(amount)
