"""Delivered against promised: a site that falls short of a prediction's interval gives back the difference.

A promise counts where it was measured: the job's family had run on this GPU type at other sites before this lease
began. Then the award's speed was the lower quartile of what they showed (`broker.speeds`), and the low end of the
interval follows from it. Where nothing was measured the promise rests on the tenant's own statement of its
work, and no site answers for that; nor for jobs across sites, whose pace is the slowest member's and the links'.
Run by `broker.settle` once for each lease; `pricing.refunds` has the rule.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.allocation.clearing import Placement as Award
from broker.database.tables import Job, Lease, Placement, UsageReport
from broker.refunds import FAULTS
from broker.speeds import read_speeds
from broker.transitions import record_event
from pricing.money import format_credits
from pricing.refunds import underdelivery_micros
from training.spec import JobSpec
from training.speeds import SECONDS_MIN, STARTING_S, VALUED_QUANTILE


def refund_underdelivery(session: Session, job: Job, now_ms: int) -> int:
    """Refund what sites were paid beyond what they delivered of a job; return how much, in micro-credits."""
    total = 0
    for placement in session.scalars(select(Placement).where(Placement.job_id == job.job_id).order_by(Placement.epoch)):
        leases = list(session.scalars(select(Lease).where(Lease.placement_id == placement.placement_id)))
        # A site at fault has its own rule, and gives back once.
        if len(leases) == 1 and leases[0].active_ms is not None and leases[0].end_cause not in FAULTS:
            total += _refund(session, job, placement, leases[0], now_ms)
    return total


def promised_low_samples(session: Session, job: Job, placement: Placement, lease: Lease) -> int:
    """Return the least that a lease's promise allows for its time; 0 where it was kept, or none was measured."""
    seconds = lease.delivered_gpu_milliseconds / 1000 / lease.gpus
    if seconds < SECONDS_MIN:
        return 0
    promised = Award.model_validate_json(placement.award).configuration.samples_per_s
    if lease.delivered_samples >= promised * seconds:
        return 0  # what was promised came in full: no need to look at what others measured
    spec = JobSpec.model_validate_json(job.spec)
    # A profile is the tenant's word: no site answers for it.
    spec = spec.model_copy(update={"market": spec.market.model_copy(update={"profile": ()})})
    speeds = read_speeds(session, but_site=lease.site_id, before_ms=lease.active_ms)
    known = speeds.of(job.tenant_id, spec).get(lease.gpu_type)
    if known is None or not known.measured:
        return 0
    # The award's speed is a quantile of the estimate already: only the rest of the way to its low end is left.
    normal = NormalDist()
    below = known.half_width_log * (1 - normal.inv_cdf(VALUED_QUANTILE) / normal.inv_cdf(0.05))
    return math.floor(promised * math.exp(-below) * max(0.0, seconds - STARTING_S))


def _refund(session: Session, job: Job, placement: Placement, lease: Lease, now_ms: int) -> int:
    promised = promised_low_samples(session, job, placement, lease)
    if lease.delivered_samples >= promised:
        return 0
    own = func.sum(UsageReport.charge_micros - UsageReport.fee_micros)
    earned = int(session.scalar(select(func.coalesce(own, 0)).where(UsageReport.lease_id == lease.lease_id)) or 0)
    amount = underdelivery_micros(
        earned_micros=earned, samples_delivered=lease.delivered_samples, samples_promised_low=promised
    )
    if amount == 0:
        return 0
    memo = f"{lease.site_id} delivered {lease.delivered_samples} samples; the low end of its promise was {promised}"
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
