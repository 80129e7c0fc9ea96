"""Step 7: metering. A site's report of usage is taken once, charged at its term's prices and posted.

`broker.heartbeat` hands the reports over in the order of their numbers; `pricing.settlement` says
what a delivery comes to; `broker.ledger` moves the money under a key made of the lease and the
number, so that no report is ever paid twice. An old epoch, an expired lease, more GPU time than
the lease can have run and a closed hold are refused at this door (invariants 6, 14 and 15).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker import ledger
from broker.allocation.clearing import Placement as Award
from broker.database.tables import Hold, Lease, Link, Placement, UsageReport
from broker.errors import ConflictError, RefusedError, StaleEpochError
from broker.market import Market
from broker.transitions import LeaseState, PlacementState, record_event
from pricing.money import MILLISECONDS_PER_HOUR, cost_micros, egress_micros, format_credits
from pricing.settlement import Delivery, LinkTerms, PoolTerms, Settlement, Terms, settle
from sites.protocol import Usage

# What both `broker.reconcile` and a site that fenced itself give as the cause of a lease's end.
EXPIRED_CAUSE: Final = "expired"


class UsageConflictError(ConflictError):
    """A number under which the broker has taken another report already."""

    code = "usage.conflict"


class UsageRefusedError(RefusedError):
    """A report about time that the lease did not grant."""

    code = "usage.refused"


@dataclass(frozen=True, slots=True)
class Charges:
    """What one report comes to, in micro-credits; every figure is nought or more."""

    gpu_micros: int
    rent_micros: int
    egress_micros: int
    discount_micros: int
    cut_micros: int
    charge_micros: int
    uplift_micros: int
    payout_micros: int
    link_revenue_micros: int
    fee_micros: int
    shortfall_micros: int


def accept_usage(session: Session, market: Market, lease: Lease, usage: Usage) -> int:
    """Take one report, charge for it, and return the highest number taken without a gap.

    A number taken before is acknowledged and ignored, one after a gap is neither. Raises
    StaleEpochError for another epoch than the lease's, UsageConflictError for a number that
    stands for another report, UsageRefusedError for usage that the lease did not grant.
    """
    assert usage.lease_id == lease.lease_id, "the caller looked the lease up by the report's own id"
    if usage.epoch != lease.epoch:
        message = f"lease {lease.lease_id} has epoch {lease.epoch}, not {usage.epoch}; stop what runs under the old one"
        raise StaleEpochError(message)
    if usage.sequence <= lease.usage_sequence:
        _require_repetition(session, usage)
        return lease.usage_sequence
    if usage.sequence > lease.usage_sequence + 1:
        return lease.usage_sequence
    now_ms = market.clock.now_ms()
    placement = session.get_one(Placement, lease.placement_id)
    hold = session.get_one(Hold, lease.job_id)
    _require_granted(market, lease, hold, usage, now_ms)
    terms, delivery = _sold_and_delivered(session, placement, lease, usage)
    charges = charges_of(
        terms,
        delivery,
        lease.pool_id,
        reservation_left_micros=_reservation_left(session, placement, hold),
        equity_left_micros=ledger.balance_micros(session, ledger.EQUITY),
    )
    _post(session, lease, usage, charges, now_ms)
    _record(session, lease, placement, usage, terms=terms, charges=charges, now_ms=now_ms)
    session.flush()
    return lease.usage_sequence


def usage_key(lease_id: str, sequence: int) -> str:
    """Return the ledger's key for one report."""
    return f"usage/{lease_id}/{sequence}"


def charges_of(
    terms: Terms, delivery: Delivery, pool_id: str, *, reservation_left_micros: int, equity_left_micros: int
) -> Charges:
    """Return what a delivery of one site's pool comes to, with the parts that explain the charge."""
    settled = settle(
        terms,
        delivery,
        reservation_left_micros=reservation_left_micros,
        equity_left_micros=equity_left_micros,
    )
    # What the buyer would pay without a discount, and with it but without the reservation's bound.
    boundless = 2**63
    gross = settle(
        replace(terms, uplift_micros_per_hour=0),
        delivery,
        reservation_left_micros=boundless,
        equity_left_micros=0,
    ).charge_micros
    discounted = settle(
        terms, delivery, reservation_left_micros=boundless, equity_left_micros=equity_left_micros
    ).charge_micros
    price = next(row.price_micros_per_gpu_hour for row in terms.pools if row.pool_id == pool_id)
    gpu = cost_micros(price, delivery.gpu_ms[pool_id])
    sent = delivery.egress_bytes or {}
    egress = sum(
        egress_micros(row.egress_price_micros_per_gb, sent.get((row.from_site, row.to_site), 0)) for row in terms.links
    )
    charge, uplift, fee = _without_paying_fees_from_equity(settled)
    return Charges(
        gpu_micros=gpu,
        rent_micros=gross - gpu - egress,
        egress_micros=egress,
        discount_micros=gross - discounted,
        cut_micros=discounted - settled.charge_micros,
        charge_micros=charge,
        uplift_micros=uplift,
        payout_micros=sum(settled.payouts.values()),
        link_revenue_micros=sum(settled.link_revenue.values()),
        fee_micros=fee,
        shortfall_micros=settled.shortfall_micros,
    )


def _without_paying_fees_from_equity(settled: Settlement) -> tuple[int, int, int]:
    """Return charge, uplift and fee such that the fee comes out of the charge alone.

    Where equity fell short, rounding may leave a fee above the charge: that much is not drawn.
    """
    fee = min(settled.fee_micros, settled.charge_micros)
    return settled.charge_micros, settled.equity_drawn_micros - (settled.fee_micros - fee), fee


def _require_repetition(session: Session, usage: Usage) -> None:
    row = session.get_one(UsageReport, (usage.lease_id, usage.sequence))
    taken = (row.epoch, row.gpu_milliseconds, row.samples, row.egress)
    if taken != (usage.epoch, usage.gpu_milliseconds, usage.samples, _canonical(usage)):
        message = (
            f"report {usage.sequence} of lease {usage.lease_id} was taken already with {row.gpu_milliseconds} "
            f"GPU-milliseconds and {row.samples} samples; the first one stands: number new usage anew"
        )
        raise UsageConflictError(message)


def _require_granted(market: Market, lease: Lease, hold: Hold, usage: Usage, now_ms: int) -> None:
    """Refuse usage that the lease did not grant: before, after, or more than it can have run."""
    if lease.active_ms is None:
        message = f"lease {lease.lease_id} is {lease.state} and never was active; nothing can have run under it"
        raise UsageRefusedError(message)
    end_ms = now_ms
    if lease.state == LeaseState.ENDED:
        assert lease.ended_ms is not None, "an ended lease has its time"
        end_ms = lease.ended_ms
        late_ms = round(market.settings.settle_s * 1000)
        if lease.end_cause == EXPIRED_CAUSE:
            message = f"lease {lease.lease_id} expired before this report came; what ran after its last one is not paid"
            raise UsageRefusedError(message)
        if now_ms > lease.ended_ms + late_ms:
            message = f"lease {lease.lease_id} ended more than {late_ms / 1000:g} s ago; its account is closed"
            raise UsageRefusedError(message)
    if hold.closed_ms is not None:
        message = f"the hold of job {lease.job_id} is closed and its invoice final; this report came too late"
        raise UsageRefusedError(message)
    # A site stops what ended only once it hears of it, which is within the liveness.
    slack_ms = round(market.settings.liveness_s * 1000)
    most_ms = lease.gpus * max(0, end_ms - lease.active_ms + slack_ms)
    total_ms = lease.delivered_gpu_milliseconds + usage.gpu_milliseconds
    if total_ms > most_ms:
        message = (
            f"{total_ms} GPU-milliseconds on {lease.gpus} GPUs are more than lease {lease.lease_id} can have run by "
            f"now ({most_ms}); check the agent's clock and report again"
        )
        raise UsageRefusedError(message)


def _sold_and_delivered(session: Session, placement: Placement, lease: Lease, usage: Usage) -> tuple[Terms, Delivery]:
    """Return the term's prices for this site and what it delivered under them.

    A link that the award does not name (the hub moved) is charged its offered egress price.
    """
    award = Award.model_validate_json(placement.award)
    gang = set(session.scalars(select(Lease.site_id).where(Lease.placement_id == placement.placement_id)))
    strangers = sorted(set(usage.egress_bytes) - (gang - {lease.site_id}))
    if strangers:
        message = f"egress to {', '.join(strangers)} is not part of job {lease.job_id}; only its own sites are charged"
        raise UsageRefusedError(message)
    if lease.pool_id not in {row.pool_id for row in award.pools}:
        return _as_agreed_before_renewal(session, lease, usage)
    links = [
        LinkTerms(
            from_site=row.from_site,
            to_site=row.to_site,
            rent_micros_per_hour=row.rent_micros_per_hour,
            egress_price_micros_per_gb=row.egress_price_micros_per_gb,
            egress_bytes_per_s=row.egress_bytes_per_s,
        )
        for row in award.links
    ]
    sold = {link.to_site for link in links if link.from_site == lease.site_id}
    links += [_offered(session, lease.site_id, target) for target in sorted(set(usage.egress_bytes) - sold)]
    terms = Terms(
        pools=tuple(
            PoolTerms(
                pool_id=row.pool_id,
                site_id=row.site_id,
                gpus=row.gpus,
                price_micros_per_gpu_hour=row.price_micros_per_gpu_hour,
                payout_micros_per_gpu_hour=row.payout_micros_per_gpu_hour,
            )
            for row in award.pools
        ),
        links=tuple(links),
        uplift_micros_per_hour=award.uplift_micros_per_hour,
    )
    delivery = Delivery(
        gpu_ms={lease.pool_id: usage.gpu_milliseconds},
        egress_bytes={(lease.site_id, target): size for target, size in usage.egress_bytes.items()},
        # A link is rented for as long as its sender's GPUs ran.
        rented_ms={
            (link.from_site, link.to_site): usage.gpu_milliseconds // lease.gpus
            for link in links
            if link.from_site == lease.site_id
        },
    )
    return terms, delivery


def _as_agreed_before_renewal(session: Session, lease: Lease, usage: Usage) -> tuple[Terms, Delivery]:
    """Return the terms of a site that was lost before its gang's term was renewed without it.

    Its last report may come after the renewal, whose award no longer names it: it is charged by
    the price of its own lease, which then was the market's, without rent or uplift.
    """
    price = lease.price_micros_per_gpu_hour
    terms = Terms(
        pools=(PoolTerms(lease.pool_id, lease.site_id, lease.gpus, price, price),),
        links=tuple(_offered(session, lease.site_id, target) for target in sorted(usage.egress_bytes)),
    )
    sent = {(lease.site_id, target): size for target, size in usage.egress_bytes.items()}
    return terms, Delivery(gpu_ms={lease.pool_id: usage.gpu_milliseconds}, egress_bytes=sent, rented_ms={})


def _offered(session: Session, source: str, target: str) -> LinkTerms:
    link = session.get(Link, (source, target))
    return LinkTerms(
        from_site=source,
        to_site=target,
        rent_micros_per_hour=0,
        egress_price_micros_per_gb=0 if link is None else link.egress_price_micros_per_gb,
        egress_bytes_per_s=0,
    )


def _reservation_left(session: Session, placement: Placement, hold: Hold) -> int:
    """Return what may still be charged under a placement without touching another one's reservation."""
    others: Sequence[Placement] = session.scalars(
        select(Placement).where(
            Placement.job_id == placement.job_id,
            Placement.state != PlacementState.ENDED,
            Placement.placement_id != placement.placement_id,
        )
    ).all()
    promised = sum(other.reserved_micros - other.charged_micros for other in others)
    hold_left = hold.amount_micros - hold.posted_micros - hold.voided_micros
    return max(0, min(placement.reserved_micros - placement.charged_micros, hold_left - promised))


def _post(session: Session, lease: Lease, usage: Usage, charges: Charges, now_ms: int) -> None:
    due = charges.payout_micros + charges.link_revenue_micros
    # Invariant 14, at each posting.
    assert charges.charge_micros + charges.uplift_micros == due + charges.fee_micros, "a posting must balance"
    site = ledger.site_account(lease.site_id)
    key = usage_key(lease.lease_id, usage.sequence)
    hours = usage.gpu_milliseconds / MILLISECONDS_PER_HOUR
    memo = f"{hours:.4f} GPU-hours of {lease.gpu_type} at {lease.site_id}"
    ledger.draw_equity(
        session, lease.job_id, lease.lease_id, [(site, charges.uplift_micros)], key=key, now_ms=now_ms, memo=memo
    )
    ledger.post(
        session,
        lease.job_id,
        lease.lease_id,
        [(site, due - charges.uplift_micros), (ledger.FEES, charges.fee_micros)],
        key=key,
        now_ms=now_ms,
        memo=memo,
    )
    if charges.shortfall_micros:
        record_event(
            session,
            "shortfall",
            now_ms=now_ms,
            job_id=lease.job_id,
            site_id=lease.site_id,
            lease_id=lease.lease_id,
            detail=f"market equity lacked {format_credits(charges.shortfall_micros)} credits of report {usage.sequence}",
        )


def _record(
    session: Session,
    lease: Lease,
    placement: Placement,
    usage: Usage,
    *,
    terms: Terms,
    charges: Charges,
    now_ms: int,
) -> None:
    placement.charged_micros += charges.charge_micros
    lease.usage_sequence = usage.sequence
    lease.delivered_gpu_milliseconds += usage.gpu_milliseconds
    lease.delivered_samples += usage.samples
    lease.egress_bytes += sum(usage.egress_bytes.values())
    pool = next(row for row in terms.pools if row.pool_id == lease.pool_id)
    session.add(
        UsageReport(
            lease_id=lease.lease_id,
            sequence=usage.sequence,
            epoch=usage.epoch,
            gpu_milliseconds=usage.gpu_milliseconds,
            samples=usage.samples,
            egress=_canonical(usage),
            price_micros_per_gpu_hour=pool.price_micros_per_gpu_hour,
            payout_micros_per_gpu_hour=pool.payout_micros_per_gpu_hour,
            gpu_micros=charges.gpu_micros,
            rent_micros=charges.rent_micros,
            egress_micros=charges.egress_micros,
            discount_micros=charges.discount_micros,
            cut_micros=charges.cut_micros,
            charge_micros=charges.charge_micros,
            uplift_micros=charges.uplift_micros,
            payout_micros=charges.payout_micros,
            link_revenue_micros=charges.link_revenue_micros,
            fee_micros=charges.fee_micros,
            received_ms=now_ms,
        )
    )


def _canonical(usage: Usage) -> str:
    return json.dumps(usage.egress_bytes, sort_keys=True, separators=(",", ":"))
