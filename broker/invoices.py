"""Step 8's papers: the invoice of a job for its tenant, the statement of a site for its operator.

Both are read from the accepted usage reports and the hold, and both add up: an invoice's lines
make its posted amount, a statement's lines what the site's account was paid.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.tables import Hold, Job, Lease, Placement, Site, Transfer, UsageReport
from broker.database.terms import Term
from broker.errors import NotFoundError
from broker.ledger import TransferKind, balance_micros, site_account

STATEMENT_LINES_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """What one lease came to in one term: its price is that of `round_number`, at which the term was sold.

    `lane` is instant where it was placed between rounds, at that round's prices. GPUs + rent + egress - discount - cut = charge. `discount_micros` is what the market's equity
    took over, `cut_micros` what was delivered beyond the reservation and is not charged.
    """

    lease_id: str
    site_id: str
    gpu_type: str
    gpus: int
    epoch: int
    term: int
    round_number: int | None
    lane: str
    price_micros_per_gpu_hour: int
    gpu_milliseconds: int
    samples: int
    gpu_micros: int
    rent_micros: int
    egress_micros: int
    discount_micros: int
    cut_micros: int
    charge_micros: int


@dataclass(frozen=True, slots=True)
class Amends:
    """Money that came back to the tenant beside the hold: a site's refund of lost work, or the market's for a move."""

    kind: str
    lease_id: str | None
    amount_micros: int
    reason: str


@dataclass(frozen=True, slots=True)
class Invoice:
    """What a job has cost so far; `final` once its hold is closed. `net_micros` is the total less all amends."""

    job_id: str
    tenant_id: str
    name: str
    lines: tuple[InvoiceLine, ...]
    hold_micros: int
    posted_micros: int
    voided_micros: int
    total_micros: int
    amends: tuple[Amends, ...]
    net_micros: int
    final: bool

    def as_json(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StatementLine:
    """What a site earned with one job; `uplift_micros` is the part of it that the market's equity paid.

    `rounds` are those whose prices its terms had; `refunded_micros` went back to the tenant for lost work.
    """

    job_id: str
    gpu_milliseconds: int
    payout_micros: int
    link_revenue_micros: int
    uplift_micros: int
    refunded_micros: int
    earned_micros: int
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """What a site has earned in all, what its account holds, and a page of the jobs behind it.

    `next_after` is the job after which the next page begins, None on the last.
    """

    site_id: str
    lines: tuple[StatementLine, ...]
    earned_micros: int
    balance_micros: int
    next_after: str | None

    def as_json(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def invoice(session: Session, job_id: str) -> Invoice:
    """Return a job's invoice. Raises NotFoundError where there is no such job."""
    job = session.get(Job, job_id)
    hold = session.get(Hold, job_id)
    if job is None or hold is None:
        message = f"there is no job {job_id!r}"
        raise NotFoundError(message)
    lines = _invoice_lines(session, job_id)
    amends = _amends(session, job_id)
    total = sum(line.charge_micros for line in lines)
    return Invoice(
        job_id=job_id,
        tenant_id=job.tenant_id,
        name=job.name,
        lines=lines,
        hold_micros=hold.amount_micros,
        posted_micros=hold.posted_micros,
        voided_micros=hold.voided_micros,
        total_micros=total,
        amends=amends,
        net_micros=total - sum(row.amount_micros for row in amends),
        final=hold.closed_ms is not None,
    )


def statement(session: Session, site_id: str, *, after: str = "", limit: int = STATEMENT_LINES_MAX) -> Statement:
    """Return a site's statement with the jobs after one, by id. Raises NotFoundError where there is no such site."""
    assert 0 < limit <= STATEMENT_LINES_MAX, f"a page has 1 to {STATEMENT_LINES_MAX} lines, not {limit}"
    if session.get(Site, site_id) is None:
        message = f"there is no site {site_id!r}"
        raise NotFoundError(message)
    rows = session.execute(
        select(
            Lease.job_id,
            func.sum(UsageReport.gpu_milliseconds),
            func.sum(UsageReport.payout_micros),
            func.sum(UsageReport.link_revenue_micros),
            func.sum(UsageReport.uplift_micros),
        )
        .join(Lease, Lease.lease_id == UsageReport.lease_id)
        .where(Lease.site_id == site_id, Lease.job_id > after)
        .group_by(Lease.job_id)
        .order_by(Lease.job_id)
        .limit(limit + 1)
    ).all()
    shown = [row[0] for row in rows[:limit]]
    rounds, refunds = _rounds_of(session, site_id, shown), _refunds_of(session, site_id, shown)
    earned = session.scalar(
        select(func.coalesce(func.sum(UsageReport.payout_micros + UsageReport.link_revenue_micros), 0))
        .join(Lease, Lease.lease_id == UsageReport.lease_id)
        .where(Lease.site_id == site_id)
    )
    lines = tuple(
        StatementLine(
            job_id=job_id,
            gpu_milliseconds=int(gpu_ms),
            payout_micros=int(payout),
            link_revenue_micros=int(revenue),
            uplift_micros=int(uplift),
            refunded_micros=refunds.get(job_id, 0),
            earned_micros=int(payout) + int(revenue) - refunds.get(job_id, 0),
            rounds=tuple(rounds.get(job_id, ())),
        )
        for job_id, gpu_ms, payout, revenue, uplift in rows[:limit]
    )
    return Statement(
        site_id=site_id,
        lines=lines,
        earned_micros=int(earned or 0) - sum(_refunds_of(session, site_id).values()),
        balance_micros=balance_micros(session, site_account(site_id)),
        next_after=lines[-1].job_id if len(rows) > limit else None,
    )


def _rounds_of(session: Session, site_id: str, jobs: list[str]) -> dict[str, list[int]]:
    """Return by job the rounds whose prices a site's usage of it had."""
    used = (
        select(Lease.job_id, Term.round_number)
        .join(UsageReport, UsageReport.lease_id == Lease.lease_id)
        .join(Term, (Term.placement_id == Lease.placement_id) & (Term.number == UsageReport.term))
        .where(Lease.site_id == site_id, Lease.job_id.in_(jobs), Term.round_number.is_not(None))
        .distinct()
        .order_by(Lease.job_id, Term.round_number)
    )
    found: dict[str, list[int]] = {}
    for job_id, number in session.execute(used):
        found.setdefault(job_id, []).append(int(number or 0))
    return found


def _refunds_of(session: Session, site_id: str, jobs: list[str] | None = None) -> dict[str, int]:
    """Return by job what a site gave back for lost work."""
    given = select(Transfer.job_id, func.sum(Transfer.amount_micros)).where(
        Transfer.debit_account == site_account(site_id), Transfer.kind == TransferKind.REFUND
    )
    if jobs is not None:
        given = given.where(Transfer.job_id.in_(jobs))
    return {str(job_id): int(amount) for job_id, amount in session.execute(given.group_by(Transfer.job_id))}


def _amends(session: Session, job_id: str) -> tuple[Amends, ...]:
    kinds = (TransferKind.REFUND, TransferKind.COMPENSATE)
    rows = select(Transfer).where(Transfer.job_id == job_id, Transfer.kind.in_(kinds)).order_by(Transfer.transfer_id)
    return tuple(Amends(row.kind, row.lease_id, row.amount_micros, row.memo) for row in session.scalars(rows))


def _invoice_lines(session: Session, job_id: str) -> tuple[InvoiceLine, ...]:
    price = UsageReport.price_micros_per_gpu_hour
    summed = (
        UsageReport.gpu_milliseconds,
        UsageReport.samples,
        UsageReport.gpu_micros,
        UsageReport.rent_micros,
        UsageReport.egress_micros,
        UsageReport.discount_micros,
        UsageReport.cut_micros,
        UsageReport.charge_micros,
    )
    rows = session.execute(
        select(
            Lease,
            UsageReport.term,
            Term.round_number,
            Placement.lane,
            price,
            *(func.sum(column).label(column.key) for column in summed),
        )
        .join(UsageReport, UsageReport.lease_id == Lease.lease_id)
        .join(Term, (Term.placement_id == Lease.placement_id) & (Term.number == UsageReport.term))
        .join(Placement, Placement.placement_id == Lease.placement_id)
        .where(Lease.job_id == job_id)
        .group_by(Lease.lease_id, UsageReport.term, Term.round_number, Placement.lane, price)
        .order_by(Lease.epoch, Lease.site_id, UsageReport.term, price)
    )
    return tuple(
        InvoiceLine(
            lease_id=lease.lease_id,
            site_id=lease.site_id,
            gpu_type=lease.gpu_type,
            gpus=lease.gpus,
            epoch=lease.epoch,
            term=term,
            round_number=round_number,
            # Only the first term can have been sold between rounds: renewals are a round's.
            lane=lane if term == 1 else "round",
            price_micros_per_gpu_hour=price_micros,
            # PostgreSQL sums 64-bit integers to a decimal.
            **{column.key: int(total) for column, total in zip(summed, sums, strict=True)},
        )
        for lease, term, round_number, lane, price_micros, *sums in rows
    )
