"""The audit of money: balances, holds, transfers, prices, postings and reservations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import QueryableAttribute, Session

from broker.allocation.clearing import Placement as Award
from broker.audit.finding import Finding
from broker.database.tables import Account, Hold, Job, Lease, Placement, Round, Transfer, UsageReport
from broker.database.terms import Term
from broker.ledger import FEES, AccountKind, TransferKind, held_account, site_account
from broker.transitions import FINAL_JOB_STATES, PlacementState
from pricing.money import cost_micros
from training.spec import SITES_PER_JOB_MAX

_TRIGGERS_SQLITE: Final = frozenset({"transfers_refuse_update", "transfers_refuse_delete"})
_TRIGGERS_POSTGRESQL: Final = frozenset({"transfers_refuse_change", "transfers_refuse_truncate"})

# From which kind of account to which each verb of the ledger moves money.
_ROUTES: Final = frozenset(
    {
        (TransferKind.DEPOSIT, AccountKind.WORLD, AccountKind.TENANT),
        (TransferKind.FUND, AccountKind.WORLD, AccountKind.EQUITY),
        (TransferKind.HOLD, AccountKind.TENANT, AccountKind.HELD),
        (TransferKind.VOID, AccountKind.HELD, AccountKind.TENANT),
        (TransferKind.POST, AccountKind.HELD, AccountKind.SITE),
        (TransferKind.POST, AccountKind.HELD, AccountKind.FEES),
        (TransferKind.UPLIFT, AccountKind.EQUITY, AccountKind.SITE),
        (TransferKind.REFUND, AccountKind.SITE, AccountKind.TENANT),
        (TransferKind.COMPENSATE, AccountKind.EQUITY, AccountKind.TENANT),
    }
)


def check_balances(session: Session) -> Iterator[Finding]:
    """Invariant 1: balances sum to nought, each is what its transfers make it, none but world's is below."""
    credited = _sums(session, Transfer.credit_account)
    debited = _sums(session, Transfer.debit_account)
    total = 0
    for account in session.scalars(select(Account)):
        total += account.balance_micros
        moved = credited.get(account.account_id, 0) - debited.get(account.account_id, 0)
        if account.balance_micros != moved:
            yield Finding(1, account.account_id, f"its balance is {account.balance_micros}, its transfers make {moved}")
        if account.balance_micros < 0 and account.kind != AccountKind.WORLD:
            yield Finding(1, account.account_id, f"its balance is {account.balance_micros}, below nought")
    if total:
        yield Finding(1, "accounts", f"all balances sum to {total}, not to nought")


def check_holds(session: Session) -> Iterator[Finding]:
    """Invariant 2: posted and voided are what was transferred and never pass the hold; closed means all of it."""
    moved = {
        kind: _sums(session, Transfer.job_id, Transfer.kind == kind)
        for kind in (TransferKind.HOLD, TransferKind.POST, TransferKind.VOID)
    }
    outstanding: dict[str, int] = {}
    for hold in session.scalars(select(Hold)):
        rest = hold.amount_micros - hold.posted_micros - hold.voided_micros
        account = held_account(hold.tenant_id)
        outstanding[account] = outstanding.get(account, 0) + rest
        figures = (
            ("set aside", TransferKind.HOLD, hold.amount_micros),
            ("posted", TransferKind.POST, hold.posted_micros),
            ("voided", TransferKind.VOID, hold.voided_micros),
        )
        for word, kind, says in figures:
            was = moved[kind].get(hold.job_id, 0)
            if was != says:
                yield Finding(2, hold.job_id, f"its hold says {says} {word}, its transfers say {was}")
        if rest < 0:
            yield Finding(2, hold.job_id, f"{-rest} more was posted and voided than its hold of {hold.amount_micros}")
        if hold.closed_ms is not None and rest:
            yield Finding(2, hold.job_id, f"its hold is closed with {rest} neither posted nor voided")
        if hold.closed_ms is not None and session.get_one(Job, hold.job_id).state not in FINAL_JOB_STATES:
            yield Finding(2, hold.job_id, "its hold is closed and the job is not over")
    for account_row in session.scalars(select(Account).where(Account.kind == AccountKind.HELD)):
        rest = outstanding.get(account_row.account_id, 0)
        if account_row.balance_micros != rest:
            detail = f"it holds {account_row.balance_micros}, open holds have {rest} left"
            yield Finding(2, account_row.account_id, detail)


def check_transfers(session: Session) -> Iterator[Finding]:
    """Invariant 3: the triggers that make transfers immutable are there, and each row is one that a verb writes."""
    if session.get_bind().dialect.name == "sqlite":
        wanted, query = _TRIGGERS_SQLITE, "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    else:
        wanted = _TRIGGERS_POSTGRESQL
        query = "SELECT tgname FROM pg_trigger WHERE tgenabled <> 'D' AND tgrelid = 'transfers'::regclass"
    for name in sorted(wanted - set(session.scalars(text(query)))):
        yield Finding(3, "transfers", f"the trigger {name} is missing or disabled: rows could be changed")
    for row in session.scalars(select(Transfer)):
        if row.amount_micros <= 0:
            yield Finding(3, row.transfer_id, f"it moves {row.amount_micros}, which no verb of the ledger does")
        if not row.transfer_id.startswith(f"{row.kind}/") or not _route_is_legal(row):
            detail = f"a {row.kind} from {row.debit_account} to {row.credit_account} is none of the ledger's verbs"
            yield Finding(3, row.transfer_id, detail)


def check_prices(session: Session) -> Iterator[Finding]:
    """Invariant 11: no job pays above its bid, no site is paid below what its term says.

    What a delivery beyond its reservation misses (`cut_micros`) is no breach: it was never sold.
    """
    for placement in session.scalars(select(Placement)):
        if placement.charge_micros_per_hour > placement.value_micros_per_hour:
            detail = (
                f"it pays {placement.charge_micros_per_hour} per hour for what its bid values at "
                f"{placement.value_micros_per_hour}"
            )
            yield Finding(11, placement.placement_id, detail)
    for report in session.scalars(select(UsageReport)):
        gpus = cost_micros(report.payout_micros_per_gpu_hour, report.gpu_milliseconds)
        due = gpus + report.rent_micros + report.egress_micros
        paid = report.payout_micros + report.link_revenue_micros
        # The rent of each link rounds down for its site and is summed before rounding for the buyer.
        if paid + SITES_PER_JOB_MAX < due and not report.cut_micros:
            detail = f"the site was paid {paid} for what its term prices at {due}"
            yield Finding(11, f"{report.lease_id} report {report.sequence}", detail)


def check_terms_trace(session: Session) -> Iterator[Finding]:
    """Invariant 11: a term's prices are those that its round published; between rounds an ask may have risen above."""
    published: dict[int, dict[str, int]] = {}
    terms = select(Term, Placement.lane).join(Placement, Placement.placement_id == Term.placement_id)
    for term, lane in session.execute(terms.where(Term.round_number.is_not(None))):
        number = term.round_number or 0
        if number not in published:
            published[number] = json.loads(session.get_one(Round, number).prices)
        for row in Award.model_validate_json(term.award).pools:
            price = published[number].get(row.pool_id)
            sold = row.price_micros_per_gpu_hour
            if price is None or (sold != price and (lane != "instant" or term.number > 1 or sold < price)):
                name = f"{term.placement_id} term {term.number}"
                yield Finding(11, name, f"{row.pool_id} is sold at {sold}, round {term.round_number} says {price}")


def check_usage_money(session: Session) -> Iterator[Finding]:
    """Invariant 14: of every report, charge + equity = payout + link revenue + fee, and so it was transferred."""
    post, uplift = Transfer.kind == TransferKind.POST, Transfer.kind == TransferKind.UPLIFT
    posted = _sums(session, Transfer.lease_id, post)
    drawn = _sums(session, Transfer.lease_id, uplift)
    fees = _sums(session, Transfer.lease_id, Transfer.credit_account == FEES)
    charged: dict[str, list[int]] = {}
    for report in session.scalars(select(UsageReport)):
        given = report.charge_micros + report.uplift_micros
        taken = report.payout_micros + report.link_revenue_micros + report.fee_micros
        if given != taken:
            yield Finding(14, f"{report.lease_id} report {report.sequence}", f"{given} was given and {taken} taken")
        figures = charged.setdefault(report.lease_id, [0, 0, 0])
        figures[0] += report.charge_micros
        figures[1] += report.uplift_micros
        figures[2] += report.fee_micros
    for lease_id in sorted({*charged, *posted, *drawn, *fees}):
        says = charged.get(lease_id, [0, 0, 0])
        was = [posted.get(lease_id, 0), drawn.get(lease_id, 0), fees.get(lease_id, 0)]
        for word, reported, transferred in zip(("charged", "drawn from equity", "kept as fee"), says, was, strict=True):
            if reported != transferred:
                yield Finding(14, lease_id, f"{reported} was {word} by its reports, {transferred} by its transfers")
    stray = select(Transfer.transfer_id, Transfer.credit_account, Lease.site_id).join(
        Lease, Lease.lease_id == Transfer.lease_id
    )
    paid = stray.where(Transfer.credit_account != FEES, Transfer.kind != TransferKind.REFUND)
    for transfer_id, credited, site_id in session.execute(paid):
        if credited != site_account(site_id):
            yield Finding(14, transfer_id, f"usage at {site_id} was paid to {credited}")
    refunds = select(Transfer, Lease.site_id).join(Lease, Lease.lease_id == Transfer.lease_id)
    for transfer, site_id in session.execute(refunds.where(Transfer.kind == TransferKind.REFUND)):
        charge, _, fee = charged.get(transfer.lease_id or "", [0, 0, 0])
        if transfer.debit_account != site_account(site_id) or transfer.amount_micros > charge - fee:
            detail = (
                f"{transfer.debit_account} gave back {transfer.amount_micros} of {charge - fee} earned at {site_id}"
            )
            yield Finding(14, transfer.transfer_id, detail)


def check_reservations(session: Session) -> Iterator[Finding]:
    """Invariant 15: charges stay within the reservation, and a running one within what its hold has left."""
    charged = dict.fromkeys(session.scalars(select(Placement.placement_id)), 0)
    totals = (
        select(Lease.placement_id, func.sum(UsageReport.charge_micros))
        .join(UsageReport, UsageReport.lease_id == Lease.lease_id)
        .group_by(Lease.placement_id)
    )
    for placement_id, total in session.execute(totals):
        charged[placement_id] = int(total)
    yield from _check_terms(session)
    for placement in session.scalars(select(Placement)):
        name = placement.placement_id
        if charged[name] != placement.charged_micros:
            yield Finding(15, name, f"it says {placement.charged_micros} charged, its reports say {charged[name]}")
        if charged[name] > placement.reserved_micros:
            yield Finding(15, name, f"{charged[name]} was charged of {placement.reserved_micros} reserved")
        if placement.state == PlacementState.ENDED:
            continue
        hold = session.get(Hold, placement.job_id)
        left = 0 if hold is None else hold.amount_micros - hold.posted_micros - hold.voided_micros
        promised = placement.reserved_micros - placement.charged_micros
        if promised > left:
            yield Finding(15, name, f"{promised} of its reservation is open, its job's hold has {left} left")


def _check_terms(session: Session) -> Iterator[Finding]:
    """Each term is charged what its own reports say, within its own reservation, and they make the placement's."""
    by_term = (
        select(Lease.placement_id, UsageReport.term, func.sum(UsageReport.charge_micros))
        .join(UsageReport, UsageReport.lease_id == Lease.lease_id)
        .group_by(Lease.placement_id, UsageReport.term)
    )
    charged = {(placement_id, number): int(total) for placement_id, number, total in session.execute(by_term)}
    reserved: dict[str, int] = {}
    for term in session.scalars(select(Term)):
        name = f"{term.placement_id} term {term.number}"
        reports_say = charged.pop((term.placement_id, term.number), 0)
        if reports_say != term.charged_micros:
            yield Finding(15, name, f"it says {term.charged_micros} charged, its reports say {reports_say}")
        if reports_say > term.reserved_micros:
            yield Finding(15, name, f"{reports_say} was charged of {term.reserved_micros} reserved")
        reserved[term.placement_id] = reserved.get(term.placement_id, 0) + term.reserved_micros
    for placement_id, number in sorted(charged):
        yield Finding(15, f"{placement_id} term {number}", "usage was charged to a term that never was")
    for placement in session.scalars(select(Placement)):
        terms_say = reserved.get(placement.placement_id, 0)
        if terms_say != placement.reserved_micros:
            detail = f"it has {placement.reserved_micros} reserved, its terms {terms_say}"
            yield Finding(15, placement.placement_id, detail)


def _sums(session: Session, by: QueryableAttribute[Any], *where: ColumnElement[bool]) -> dict[str, int]:
    query = select(by, func.sum(Transfer.amount_micros)).where(by.is_not(None), *where).group_by(by)
    return {str(key): int(total) for key, total in session.execute(query)}


def _route_is_legal(row: Transfer) -> bool:
    debit, debit_owner = _split(row.debit_account)
    credit, credit_owner = _split(row.credit_account)
    if row.kind in {TransferKind.HOLD, TransferKind.VOID} and debit_owner != credit_owner:
        return False
    return (row.kind, debit, credit) in _ROUTES


def _split(account_id: str) -> tuple[str, str]:
    kind, _, owner = account_id.partition("/")
    return kind, owner
