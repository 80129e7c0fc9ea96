"""Transfers: the one way by which a balance changes, and the verbs that bring money in.

A transfer's id says what it is for (`hold/JOB`, `post/KEY/0`), so a retry meets the row that the
first try wrote: the same content is a no-op, any other is refused. Reading a balance and writing
it back is right here because nobody else can have done so in between: SQLite gives out its write
lock with `BEGIN IMMEDIATE`, PostgreSQL runs `SERIALIZABLE` and makes the loser run again.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from broker.database.tables import Transfer
from broker.errors import InsufficientFundsError, LedgerError
from broker.ledger.accounts import EQUITY, WORLD, AccountKind, account_row, tenant_account
from pricing.money import CREDITS_MAX, MICROS_PER_CREDIT, format_credits

AMOUNT_MICROS_MAX: Final = CREDITS_MAX * MICROS_PER_CREDIT
# A thousand times the largest amount: far below 2^63, so that no sum of balances overflows its column.
BALANCE_MICROS_MAX: Final = 1000 * AMOUNT_MICROS_MAX
MEMO_LENGTH_MAX: Final = 300

# Built once: every posting asks it.
_BY_IDS: Final = select(Transfer).where(Transfer.transfer_id.in_(bindparam("ids", expanding=True)))

_KEY: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,140}", re.ASCII)


class TransferKind(enum.StrEnum):
    """What a transfer does."""

    DEPOSIT = "deposit"  # world -> tenant
    FUND = "fund"  # world -> equity
    HOLD = "hold"  # tenant -> held
    POST = "post"  # held -> site or fees
    UPLIFT = "uplift"  # equity -> site
    VOID = "void"  # held -> tenant
    REFUND = "refund"  # site -> tenant
    COMPENSATE = "compensate"  # equity -> tenant


@dataclass(frozen=True, slots=True)
class Movement:
    """A transfer as it is asked for. Its content, but for the memo, is what a retry must repeat."""

    transfer_id: str
    kind: TransferKind
    debit_account: str
    credit_account: str
    amount_micros: int
    job_id: str | None = None
    lease_id: str | None = None
    memo: str = ""


def deposit(
    session: Session, tenant_id: str, amount_micros: int, transfer_id: str, now_ms: int, *, memo: str = ""
) -> bool:
    """Give a tenant credits; `transfer_id` names the deposit, so that a retry gives them once.

    Returns whether money moved now. Raises LedgerError where the id was used for another deposit
    or the amount is not one, NotFoundError where the tenant has no account.
    """
    moved = apply(
        session,
        Movement(
            transfer_id=f"deposit/{checked_key(transfer_id)}",
            kind=TransferKind.DEPOSIT,
            debit_account=WORLD,
            credit_account=tenant_account(tenant_id),
            amount_micros=amount_micros,
            memo=memo,
        ),
        now_ms,
    )
    session.flush()
    return moved


def fund_equity(session: Session, amount_micros: int, transfer_id: str, now_ms: int, *, memo: str = "") -> bool:
    """Give the market money of its own, from which uplift is paid. Returns and raises as `deposit`."""
    moved = apply(
        session,
        Movement(
            transfer_id=f"fund/{checked_key(transfer_id)}",
            kind=TransferKind.FUND,
            debit_account=WORLD,
            credit_account=EQUITY,
            amount_micros=amount_micros,
            memo=memo,
        ),
        now_ms,
    )
    session.flush()
    return moved


def apply(session: Session, movement: Movement, now_ms: int) -> bool:
    """Make a movement unless it was made already; return whether it was made now.

    The caller flushes, together with what the money is for. Raises LedgerError where its id stands
    for another movement, InsufficientFundsError where the debited account holds too little.
    """
    row = session.get(Transfer, movement.transfer_id)
    if row is not None:
        _require_same(row, movement)
        return False
    _write(session, [movement], now_ms)
    return True


def apply_all(session: Session, movements: Sequence[Movement], key_prefix: str, now_ms: int) -> bool:
    """Make all movements of one key, `PREFIX/0` and on, or find that all were made already.

    Returns whether they were made now; the caller flushes. Raises LedgerError where the key stands
    for others, InsufficientFundsError where the debited account holds less than their sum.
    """
    if made_already(session, movements, key_prefix):
        return False
    _write(session, movements, now_ms)
    return True


def made_already(session: Session, movements: Sequence[Movement], key_prefix: str) -> bool:
    """Say whether exactly these movements stand under the key. Raises LedgerError where others do."""
    # One more than asked for: a key that stands for more lines is another content.
    ids = [f"{key_prefix}/{index}" for index in range(len(movements) + 1)]
    rows = {row.transfer_id: row for row in session.scalars(_BY_IDS, {"ids": ids})}
    if not rows:
        return False
    if len(rows) != len(movements):
        message = (
            f"the key {key_prefix!r} stands for {len(rows)} lines or more, not for these {len(movements)}; "
            "nothing was posted: use a new key for another posting"
        )
        raise LedgerError(message)
    for movement in movements:
        _require_same(rows[movement.transfer_id], movement)
    return True


def checked_amount(amount_micros: int) -> int:
    """Return an amount that may be moved. Raises LedgerError where it is not above nought, or too large."""
    if not 0 < amount_micros <= AMOUNT_MICROS_MAX:
        message = (
            f"{amount_micros} micro-credits cannot be moved: an amount is above nought and at most "
            f"{format_credits(AMOUNT_MICROS_MAX)} credits"
        )
        raise LedgerError(message)
    return amount_micros


def checked_key(key: str) -> str:
    """Return a key that a transfer's id may carry. Raises LedgerError where it may not."""
    if _KEY.fullmatch(key) is None:
        message = f"{key[:40]!r} cannot name a transfer; use 1 to 140 of the characters A-Z a-z 0-9 _ . : / -"
        raise LedgerError(message)
    return key


def _require_same(row: Transfer, movement: Movement) -> None:
    stands = (row.kind, row.debit_account, row.credit_account, row.amount_micros, row.job_id, row.lease_id)
    asked = (
        movement.kind,
        movement.debit_account,
        movement.credit_account,
        movement.amount_micros,
        movement.job_id,
        movement.lease_id,
    )
    if stands != asked:
        message = (
            f"transfer {row.transfer_id!r} was made already as {format_credits(row.amount_micros)} credits from "
            f"{row.debit_account} to {row.credit_account}; it cannot stand for another: use a new key"
        )
        raise LedgerError(message)


def _write(session: Session, movements: Sequence[Movement], now_ms: int) -> None:
    """Write transfers out of one account and the balances after them; all is checked before anything is written."""
    total = sum(checked_amount(movement.amount_micros) for movement in movements)
    debit = account_row(session, movements[0].debit_account)
    credited = [account_row(session, movement.credit_account) for movement in movements]
    if debit.kind != AccountKind.WORLD and debit.balance_micros < total:
        message = (
            f"{debit.account_id} holds {format_credits(debit.balance_micros)} credits and {format_credits(total)} "
            f"are needed; add at least {format_credits(total - debit.balance_micros)} credits or ask for less"
        )
        raise InsufficientFundsError(message)
    fullest = max(credit.balance_micros for credit in credited)
    if max(fullest + total, total - debit.balance_micros) > BALANCE_MICROS_MAX:
        message = (
            f"moving {format_credits(total)} credits out of {debit.account_id} would pass the largest balance that "
            f"the ledger keeps, {format_credits(BALANCE_MICROS_MAX)} credits"
        )
        raise LedgerError(message)
    debit.balance_micros -= total
    for movement, credit in zip(movements, credited, strict=True):
        assert movement.debit_account == debit.account_id, "the movements of one key leave one account"
        credit.balance_micros += movement.amount_micros
        session.add(
            Transfer(
                transfer_id=movement.transfer_id,
                kind=movement.kind,
                debit_account=movement.debit_account,
                credit_account=movement.credit_account,
                amount_micros=movement.amount_micros,
                job_id=movement.job_id,
                lease_id=movement.lease_id,
                memo=movement.memo[:MEMO_LENGTH_MAX],
                created_ms=now_ms,
            )
        )
