"""Step 7: metering. A site's report of usage is taken once, charged at its term's prices and posted.

`broker.heartbeat` hands the reports over in the order of their numbers; `broker.terms` says which of it was
delivered in which term, so that a new price counts from the term that it was made for; `pricing.settlement` says
what a delivery comes to; `broker.ledger` moves the money under a key made of the lease and the
number, so that no report is ever paid twice. An old epoch, an expired lease, more GPU time than
the lease can have run and a closed hold are refused at this door (invariants 6, 14 and 15).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker import ledger
from broker.allocation.clearing import Placement as Award
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import Hold, Lease, Link, Placement, UsageReport
from broker.database.terms import Term
from broker.errors import ConflictError, RefusedError, StaleEpochError
from broker.lease_clock import ended_since_ms, ran_ms
from broker.market import Market
from broker.terms import Part, spans, split, terms_of
from broker.transitions import EndCause, LeaseState, record_event
from pricing.money import MILLISECONDS_PER_HOUR, cost_micros, divide_up, egress_micros, format_credits
from pricing.settlement import Delivery, LinkTerms, PoolTerms, Settlement, Terms, settle
from sites.protocol import Usage

# A probe sees what other traffic leaves of a link: a transfer may find twice that.
EGRESS_HEADROOM: Final = 2
# How far delays on the way may part two reports that follow one another without a gap.
FOLLOWING_MS_MAX: Final = 1000


class UsageConflictError(ConflictError):
    """A number under which the broker has taken another report already."""

    code = "usage.conflict"


class UsageRefusedError(RefusedError):
    """A report about time that the lease did not grant."""

    code = "usage.refused"


class UsageTooEarlyError(RefusedError):
    """More GPU time than the lease can have run by now; not final: the report may be sent again."""

    code = "usage.too_early"


class EgressImpossibleError(RefusedError):
    """More bytes than a link of that bandwidth can have carried; the report may be sent again."""

    code = "usage.egress_impossible"


@dataclass(frozen=True, slots=True)
class Charges:
    """What one report comes to, in micro-credits; every figure is nought or more.

    But for the discount, which is below nought by the premium of a buyer that pays as bid.
    """

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


def accept_usage(session: Session, market: Market, lease: Lease, usage: Usage, *, age_ms: int = 0) -> int:
    """Take one report, charge for it, and return the highest number taken without a gap.

    It is charged by the terms in which it was delivered; it ended `age_ms` ago. A number taken before is acknowledged and ignored, one after a gap is neither. Raises
    StaleEpochError for another epoch than the lease's, UsageConflictError for a number that
    stands for another report, UsageRefusedError for usage that the lease did not grant, UsageTooEarlyError for
    more than it can have run by now and EgressImpossibleError for more than its links can have carried.
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
    _require_granted(market, lease, hold, usage)
    ended_ms = _ended_ms(market, lease, usage, age_ms, now_ms)
    terms = _terms_naming(session, lease)
    _require_own_links(session, lease, usage)
    lease.egress = _carried(session, market, lease, usage)
    for part in split(usage, spans(list(terms.values())), gpus=lease.gpus, ended_ms=ended_ms):
        term = terms[part.term]
        sold, delivery = _sold_and_delivered(session, Award.model_validate_json(term.award), lease, part)
        charges = charges_of(
            sold,
            delivery,
            lease.pool_id,
            reservation_left_micros=_reservation_left(session, placement, term, hold),
            equity_left_micros=ledger.balance_micros(session, ledger.EQUITY),
        )
        _post(session, lease, usage_key(lease.lease_id, usage.sequence, part.term), part, charges, now_ms=now_ms)
        placement.charged_micros += charges.charge_micros
        term.charged_micros += charges.charge_micros
        _record(session, lease, usage, part, terms=sold, charges=charges, now_ms=now_ms)
        session.flush()
    if usage.samples:
        _pace(lease)
    lease.usage_sequence = usage.sequence
    lease.usage_until_ms = ended_ms
    session.flush()
    return lease.usage_sequence


def usage_key(lease_id: str, sequence: int, term: int) -> str:
    """Return the ledger's key for one report in one term."""
    return f"usage/{lease_id}/{sequence}.{term}"


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
        replace(terms, uplift_micros_per_hour=0, premium_micros_per_hour=0),
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
    rows = session.scalars(
        select(UsageReport).where(UsageReport.lease_id == usage.lease_id, UsageReport.sequence == usage.sequence)
    ).all()
    egress: Counter[str] = Counter()
    for row in rows:
        egress.update(json.loads(row.egress))
    gpu_ms, samples = sum(row.gpu_milliseconds for row in rows), sum(row.samples for row in rows)
    taken = ({row.epoch for row in rows}, gpu_ms, samples, _canonical(egress))
    if taken != ({usage.epoch}, usage.gpu_milliseconds, usage.samples, _canonical(usage.egress_bytes)):
        message = (
            f"report {usage.sequence} of lease {usage.lease_id} was taken already with {gpu_ms} "
            f"GPU-milliseconds and {samples} samples; the first one stands: number new usage anew"
        )
        raise UsageConflictError(message)


def _require_granted(market: Market, lease: Lease, hold: Hold, usage: Usage) -> None:
    """Refuse usage that the lease did not grant: before, after, or more than it can have run."""
    if lease.active_ms is None:
        message = f"lease {lease.lease_id} is {lease.state} and never was active; nothing can have run under it"
        raise UsageRefusedError(message)
    if lease.state == LeaseState.ENDED:
        late_ms = round(market.settings.settle_s * 1000)
        if lease.end_cause == EndCause.EXPIRED:
            message = f"lease {lease.lease_id} expired before this report came; what ran after its last one is not paid"
            raise UsageRefusedError(message)
        if ended_since_ms(lease, market.clock) > late_ms:
            message = f"lease {lease.lease_id} ended more than {late_ms / 1000:g} s ago; its account is closed"
            raise UsageRefusedError(message)
    if hold.closed_ms is not None:
        message = f"the hold of job {lease.job_id} is closed and its invoice final; this report came too late"
        raise UsageRefusedError(message)
    # A site stops what ended only once it hears of it, which is within the liveness.
    slack_ms = round(market.settings.liveness_s * 1000)
    most_ms = lease.gpus * (ran_ms(lease, market.clock) + slack_ms)
    total_ms = lease.delivered_gpu_milliseconds + usage.gpu_milliseconds
    if total_ms > most_ms:
        message = (
            f"{total_ms} GPU-milliseconds on {lease.gpus} GPUs are more than lease {lease.lease_id} can have run by "
            f"now ({most_ms}); check the agent's clock and report again"
        )
        raise UsageTooEarlyError(message)


def _require_own_links(session: Session, lease: Lease, usage: Usage) -> None:
    """Refuse bytes to a site that is not part of the gang."""
    gang = set(session.scalars(select(Lease.site_id).where(Lease.placement_id == lease.placement_id)))
    strangers = sorted(set(usage.egress_bytes) - (gang - {lease.site_id}))
    if strangers:
        message = f"egress to {', '.join(strangers)} is not part of job {lease.job_id}; only its own sites are charged"
        raise UsageRefusedError(message)


def _carried(session: Session, market: Market, lease: Lease, usage: Usage) -> str:
    """Return what the lease has now sent to each site, as canonical JSON.

    Raises EgressImpossibleError where that is more than a link can have carried since the lease began: its
    offered bandwidth, with headroom for what a probe did not see, times that time.
    """
    elapsed_ms = ran_ms(lease, market.clock) + round(market.settings.liveness_s * 1000)
    sent: dict[str, int] = json.loads(lease.egress or "{}")
    for target, size in usage.egress_bytes.items():
        sent[target] = sent.get(target, 0) + size
        link = session.get(Link, (lease.site_id, target))
        if link is None:
            continue  # it is not offered, so nothing is charged for it either
        most = round(link.bandwidth_bits_per_s * EGRESS_HEADROOM * elapsed_ms) // (8 * 1000)
        if sent[target] > most:
            message = (
                f"{sent[target]} bytes to {target} are more than the link can have carried by now ({most}, which is "
                f"{EGRESS_HEADROOM} times the bandwidth that this site offers on it); correct the offer's links"
            )
            raise EgressImpossibleError(message)
    return _canonical(sent)


def _ended_ms(market: Market, lease: Lease, usage: Usage, age_ms: int, now_ms: int) -> int:
    """Return when the usage of a report ended, on the broker's clock.

    Reports follow one another: one that seems to begin about when the former ended began just then, so that
    no delay on the way counts an instant twice or moves it over the end of a term.
    """
    assert lease.active_ms is not None, "usage was granted"
    latest_ms = now_ms
    if lease.ended_ms is not None:
        latest_ms = min(now_ms, lease.ended_ms + round(market.settings.liveness_s * 1000))
    ended_ms = max(lease.active_ms, min(latest_ms, now_ms - age_ms))
    if lease.usage_until_ms is not None:
        follows_ms = lease.usage_until_ms + divide_up(usage.gpu_milliseconds, lease.gpus)
        if abs(follows_ms - ended_ms) <= FOLLOWING_MS_MAX:
            return min(follows_ms, latest_ms)
        ended_ms = max(ended_ms, lease.usage_until_ms)
    return ended_ms


def _terms_naming(session: Session, lease: Lease) -> dict[int, Term]:
    """Return by number the terms in which the lease had a part.

    A site that was lost before its gang's term was renewed without it has none in the new one.
    """
    terms = {
        term.number: term
        for term in terms_of(session, lease.placement_id)
        if any(row.pool_id == lease.pool_id for row in Award.model_validate_json(term.award).pools)
    }
    assert terms, "the first term of a placement names every lease of it"
    return terms


def _sold_and_delivered(session: Session, award: Award, lease: Lease, part: Part) -> tuple[Terms, Delivery]:
    """Return a term's prices for this site and what it delivered under them.

    A link that the award does not name (the hub moved) is charged its offered egress price; one that the site
    no longer offers costs nothing, for nobody can say what it carries.
    """
    links = [
        LinkTerms(
            from_site=row.from_site,
            to_site=row.to_site,
            rent_micros_per_hour=row.rent_micros_per_hour,
            egress_price_micros_per_gb=(
                row.egress_price_micros_per_gb if session.get(Link, (row.from_site, row.to_site)) is not None else 0
            ),
            egress_bytes_per_s=row.egress_bytes_per_s,
        )
        for row in award.links
    ]
    sold = {link.to_site for link in links if link.from_site == lease.site_id}
    links += [_offered(session, lease.site_id, target) for target in sorted(set(part.egress_bytes) - sold)]
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
        premium_micros_per_hour=award.premium_micros_per_hour,
    )
    delivery = Delivery(
        gpu_ms={lease.pool_id: part.gpu_milliseconds},
        egress_bytes={(lease.site_id, target): size for target, size in part.egress_bytes.items()},
        # A link is rented for as long as its sender's GPUs ran.
        rented_ms={
            (link.from_site, link.to_site): part.gpu_milliseconds // lease.gpus
            for link in links
            if link.from_site == lease.site_id
        },
    )
    return terms, delivery


def _offered(session: Session, source: str, target: str) -> LinkTerms:
    link = session.get(Link, (source, target))
    return LinkTerms(
        from_site=source,
        to_site=target,
        rent_micros_per_hour=0,
        egress_price_micros_per_gb=0 if link is None else link.egress_price_micros_per_gb,
        egress_bytes_per_s=0,
    )


def _reservation_left(session: Session, placement: Placement, term: Term, hold: Hold) -> int:
    """Return what may still be charged under a term without touching another reservation of the job's hold."""
    others: Sequence[Placement] = session.scalars(
        select(Placement).where(
            Placement.job_id == placement.job_id,
            PLACEMENT_STANDS,
            Placement.placement_id != placement.placement_id,
        )
    ).all()
    promised = sum(other.reserved_micros - other.charged_micros for other in others)
    hold_left = hold.amount_micros - hold.posted_micros - hold.voided_micros
    term_left = term.reserved_micros - term.charged_micros
    return max(0, min(term_left, placement.reserved_micros - placement.charged_micros, hold_left - promised))


def _post(session: Session, lease: Lease, key: str, part: Part, charges: Charges, *, now_ms: int) -> None:
    due = charges.payout_micros + charges.link_revenue_micros
    # Invariant 14, at each posting.
    assert charges.charge_micros + charges.uplift_micros == due + charges.fee_micros, "a posting must balance"
    site = ledger.site_account(lease.site_id)
    hours = part.gpu_milliseconds / MILLISECONDS_PER_HOUR
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
            detail=f"market equity lacked {format_credits(charges.shortfall_micros)} credits of {key}",
        )


def _record(
    session: Session,
    lease: Lease,
    usage: Usage,
    part: Part,
    *,
    terms: Terms,
    charges: Charges,
    now_ms: int,
) -> None:
    lease.delivered_gpu_milliseconds += part.gpu_milliseconds
    lease.delivered_samples += part.samples
    lease.egress_bytes += sum(part.egress_bytes.values())
    pool = next(row for row in terms.pools if row.pool_id == lease.pool_id)
    session.add(
        UsageReport(
            lease_id=lease.lease_id,
            sequence=usage.sequence,
            term=part.term,
            epoch=usage.epoch,
            gpu_milliseconds=part.gpu_milliseconds,
            samples=part.samples,
            egress=_canonical(part.egress_bytes),
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


def _pace(lease: Lease) -> None:
    """Note how far the lease was at its first report with samples, and at this one: training without its start."""
    if lease.pace_from_gpu_milliseconds is None:
        lease.pace_from_gpu_milliseconds = lease.delivered_gpu_milliseconds
        lease.pace_from_samples = lease.delivered_samples
    else:
        lease.pace_reports += 1
    lease.pace_to_gpu_milliseconds = lease.delivered_gpu_milliseconds


def _canonical(egress_bytes: Mapping[str, int]) -> str:
    return json.dumps(egress_bytes, sort_keys=True, separators=(",", ":"))
