"""What a job's ended placements may still be charged: their sites' last usage is on its way.

`broker.rounds` leaves that much of a hold alone, so that a site that ran until it heard of the
end is paid in full beside the job's next placement.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Lease, LeasedGpu, Placement
from broker.lease_clock import ran_ms
from broker.market import Market
from broker.terms import terms_of
from broker.transitions import EndCause, LeaseState
from pricing.money import divide_up


def due_of_ended(session: Session, market: Market, job_id: str | None = None) -> dict[str, int]:
    """Return by job the most, in micro-credits, that its ended placements may still be charged.

    Counted until a site has reported its processes dead or its liveness is over (the GPUs' rows
    say so), and for no longer than the lease can have run, as `broker.metering` will accept.
    """
    held = select(LeasedGpu.lease_id).where(LeasedGpu.live)
    ended = (
        select(Lease, Placement)
        .join(Placement, Placement.placement_id == Lease.placement_id)
        .where(Lease.state == LeaseState.ENDED, Lease.end_cause != EndCause.EXPIRED, Lease.lease_id.in_(held))
    )
    if job_id is not None:
        ended = ended.where(Lease.job_id == job_id)
    longest: dict[str, tuple[Placement, int]] = {}
    for lease, placement in session.execute(ended):
        left_ms = _unreported_ms(lease, market)
        before = longest.get(placement.placement_id)
        longest[placement.placement_id] = (placement, max(left_ms, 0 if before is None else before[1]))
    due: dict[str, int] = {}
    for placement, left_ms in longest.values():
        awards = [Award.model_validate_json(term.award) for term in terms_of(session, placement.placement_id)]
        # A reservation covers the whole gang for a term, so its share of time bounds every site's part.
        most = max(divide_up(award.reservation_micros * left_ms, award.term_s * 1000) for award in awards)
        open_micros = placement.reserved_micros - placement.charged_micros
        due[placement.job_id] = due.get(placement.job_id, 0) + min(most, open_micros)
    return due


def _unreported_ms(lease: Lease, market: Market) -> int:
    if lease.active_ms is None or lease.ended_ms is None:
        return 0
    # A site stops what ended only once it hears of it, which is within the liveness.
    most_ms = ran_ms(lease, market.clock) + round(market.settings.liveness_s * 1000)
    return max(0, most_ms - lease.delivered_gpu_milliseconds // lease.gpus)
