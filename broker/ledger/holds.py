"""Holds: a job's budget is set aside whole at submit, then posted bit by bit, and the rest voided.

place_hold    tenant -> held           at submit, refused over the balance
post          held -> sites and fees   for metered usage, never above the hold
draw_equity   equity -> sites          for the part of a payout that the market gives
close_hold    held -> tenant           when the job is settled; nothing is posted after it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy.orm import Session

from broker.database.tables import Hold, Job
from broker.errors import InsufficientFundsError, LedgerError, NotFoundError
from broker.ledger.accounts import EQUITY, FEES, AccountKind, account_row, balance_micros, held_account, tenant_account
from broker.ledger.transfers import Movement, TransferKind, apply, apply_all, checked_amount, checked_key, made_already
from pricing.money import format_credits

Line = tuple[str, int]


def place_hold(session: Session, job: Job, amount_micros: int, now_ms: int) -> Hold:
    """Set aside a job's budget and return its hold; the same hold again is a no-op.

    Raises InsufficientFundsError where the tenant has less, LedgerError where the job has another
    hold already.
    """
    checked_amount(amount_micros)
    hold = session.get(Hold, job.job_id)
    if hold is not None:
        if hold.amount_micros == amount_micros:
            return hold
        message = (
            f"job {job.job_id} has a hold of {format_credits(hold.amount_micros)} credits already; "
            "a hold is placed once: cancel the job and submit another"
        )
        raise LedgerError(message)
    available = balance_micros(session, tenant_account(job.tenant_id))
    if available < amount_micros:
        message = (
            f"the job's budget is {format_credits(amount_micros)} credits and the account has "
            f"{format_credits(available)} available; lower the budget or add at least "
            f"{format_credits(amount_micros - available)} credits"
        )
        raise InsufficientFundsError(message)
    apply(
        session,
        Movement(
            transfer_id=f"hold/{job.job_id}",
            kind=TransferKind.HOLD,
            debit_account=tenant_account(job.tenant_id),
            credit_account=held_account(job.tenant_id),
            amount_micros=amount_micros,
            job_id=job.job_id,
            memo=f"budget of {job.name}",
        ),
        now_ms,
    )
    hold = Hold(
        job_id=job.job_id,
        tenant_id=job.tenant_id,
        amount_micros=amount_micros,
        posted_micros=0,
        voided_micros=0,
        closed_ms=None,
    )
    session.add(hold)
    session.flush()
    return hold


def post(
    session: Session, job_id: str, lease_id: str | None, lines: Sequence[Line], *, key: str, now_ms: int, memo: str = ""
) -> bool:
    """Pay sites and fees out of a job's hold; return whether money moved now.

    `lines` are (account id, micro-credits); lines to one account are added up and noughts left
    out. The same key with the same lines is a no-op, even once the hold is closed. Raises
    LedgerError where the key stands for other lines, the hold is closed or too small, or a line
    goes to an account that is no site's and not the fees'.
    """
    hold = _hold(session, job_id)
    movements = _movements(TransferKind.POST, held_account(hold.tenant_id), job_id, lease_id, lines, key=key, memo=memo)
    prefix = f"{TransferKind.POST}/{key}"
    if not movements or made_already(session, movements, prefix):
        return False
    _require_payable(session, movements, fees=True)
    total = sum(movement.amount_micros for movement in movements)
    left = hold.amount_micros - hold.posted_micros - hold.voided_micros
    if hold.closed_ms is not None:
        message = f"the hold of job {job_id} is closed: its invoice is final and nothing can be posted to it"
        raise LedgerError(message)
    if total > left:
        message = (
            f"posting {format_credits(total)} credits would pass the hold of job {job_id}, which has "
            f"{format_credits(left)} left of {format_credits(hold.amount_micros)}; nothing was posted"
        )
        raise LedgerError(message)
    apply_all(session, movements, prefix, now_ms)
    hold.posted_micros += total
    session.flush()
    return True


def draw_equity(
    session: Session, job_id: str, lease_id: str | None, lines: Sequence[Line], *, key: str, now_ms: int, memo: str = ""
) -> bool:
    """Pay sites out of the market's own money, for a job's uplift; return whether money moved now.

    Lines and keys are as for `post`. Raises InsufficientFundsError where equity has too little,
    LedgerError as `post` does.
    """
    movements = _movements(TransferKind.UPLIFT, EQUITY, job_id, lease_id, lines, key=key, memo=memo)
    if not movements:
        return False
    _require_payable(session, movements, fees=False)
    moved = apply_all(session, movements, f"{TransferKind.UPLIFT}/{key}", now_ms)
    session.flush()
    return moved


def close_hold(session: Session, job_id: str, now_ms: int) -> int:
    """Give back what a job's hold has left and return how much; closing twice changes nothing.

    Raises NotFoundError where the job has no hold.
    """
    hold = _hold(session, job_id)
    if hold.closed_ms is not None:
        return hold.voided_micros
    rest = hold.amount_micros - hold.posted_micros
    if rest:
        apply(
            session,
            Movement(
                transfer_id=f"void/{job_id}",
                kind=TransferKind.VOID,
                debit_account=held_account(hold.tenant_id),
                credit_account=tenant_account(hold.tenant_id),
                amount_micros=rest,
                job_id=job_id,
                memo="unspent budget",
            ),
            now_ms,
        )
    hold.voided_micros = rest
    hold.closed_ms = now_ms
    session.flush()
    return rest


def _hold(session: Session, job_id: str) -> Hold:
    hold = session.get(Hold, job_id)
    if hold is None:
        message = f"job {job_id!r} has no hold; a hold is placed when a job is submitted"
        raise NotFoundError(message)
    return hold


def _movements(
    kind: TransferKind, debit: str, job_id: str, lease_id: str | None, lines: Iterable[Line], *, key: str, memo: str
) -> list[Movement]:
    checked_key(key)
    amounts: dict[str, int] = {}
    for account_id, amount in lines:
        if amount < 0:
            message = f"a line of {amount} micro-credits to {account_id} cannot be posted: amounts are not negative"
            raise LedgerError(message)
        amounts[account_id] = amounts.get(account_id, 0) + amount
    # Sorted, so that the order in which a caller lists its lines is no content.
    paid = [(account_id, amount) for account_id, amount in sorted(amounts.items()) if amount]
    return [
        Movement(
            transfer_id=f"{kind}/{key}/{index}",
            kind=kind,
            debit_account=debit,
            credit_account=account_id,
            amount_micros=amount,
            job_id=job_id,
            lease_id=lease_id,
            memo=memo,
        )
        for index, (account_id, amount) in enumerate(paid)
    ]


def _require_payable(session: Session, movements: Iterable[Movement], *, fees: bool) -> None:
    for movement in movements:
        kind = account_row(session, movement.credit_account).kind
        if kind == AccountKind.SITE or (fees and movement.credit_account == FEES):
            continue
        message = f"{movement.credit_account} cannot be paid by a posting: only sites{' and fees' * fees} can"
        raise LedgerError(message)
