"""Accounts: whose money stands where.

world         where credits come from; the only account that may be below nought
tenant/ID     what a tenant may spend
held/ID       what its open jobs have set aside
site/ID       what the market owes a site
fees          what rounding and the market's fee left
equity        the market's own money, from which uplift is paid
"""

from __future__ import annotations

import enum
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.tables import Account
from broker.errors import NotFoundError


class AccountKind(enum.StrEnum):
    """What an account is for."""

    WORLD = "world"
    TENANT = "tenant"
    HELD = "held"
    SITE = "site"
    FEES = "fees"
    EQUITY = "equity"


WORLD: Final = "world"
FEES: Final = "fees"
EQUITY: Final = "equity"
BALANCES_PER_PAGE: Final = 200


def tenant_account(tenant_id: str) -> str:
    """Return the account of what a tenant may spend."""
    return f"tenant/{tenant_id}"


def held_account(tenant_id: str) -> str:
    """Return the account of what a tenant's open jobs have set aside."""
    return f"held/{tenant_id}"


def site_account(site_id: str) -> str:
    """Return the account of what the market owes a site."""
    return f"site/{site_id}"


def open_accounts(session: Session, now_ms: int) -> None:
    """Open the market's own accounts; those that are open stay as they are."""
    _open(session, WORLD, AccountKind.WORLD, None, now_ms)
    _open(session, FEES, AccountKind.FEES, None, now_ms)
    _open(session, EQUITY, AccountKind.EQUITY, None, now_ms)
    session.flush()


def open_tenant(session: Session, tenant_id: str, now_ms: int) -> None:
    """Open a tenant's two accounts; those that are open stay as they are."""
    _open(session, tenant_account(tenant_id), AccountKind.TENANT, tenant_id, now_ms)
    _open(session, held_account(tenant_id), AccountKind.HELD, tenant_id, now_ms)
    session.flush()


def open_site(session: Session, site_id: str, now_ms: int) -> None:
    """Open a site's account; one that is open stays as it is."""
    _open(session, site_account(site_id), AccountKind.SITE, site_id, now_ms)
    session.flush()


def balances(session: Session, *, after: str = "", limit: int = BALANCES_PER_PAGE) -> dict[str, int]:
    """Return `limit` accounts' balances in micro-credits, by account id, and one more where there is a next page."""
    rows = session.execute(
        select(Account.account_id, Account.balance_micros)
        .where(Account.account_id > after)
        .order_by(Account.account_id)
        .limit(limit + 1)
    )
    return {row.account_id: row.balance_micros for row in rows}


def sum_micros(session: Session) -> int:
    """Return the sum of all balances: nought in a sound market."""
    return int(session.scalar(select(func.coalesce(func.sum(Account.balance_micros), 0))) or 0)


def balance_micros(session: Session, account_id: str) -> int:
    """Return one account's balance in micro-credits. Raises NotFoundError where it is not open."""
    return account_row(session, account_id).balance_micros


def account_row(session: Session, account_id: str) -> Account:
    """Return an open account's row. Raises NotFoundError where it is not open."""
    account = session.get(Account, account_id)
    if account is None:
        message = (
            f"there is no account {account_id!r}; open it first (an account is opened with its tenant or its site)"
        )
        raise NotFoundError(message)
    return account


def _open(session: Session, account_id: str, kind: AccountKind, owner: str | None, now_ms: int) -> None:
    if session.get(Account, account_id) is None:
        session.add(Account(account_id=account_id, kind=kind, owner=owner, balance_micros=0, created_ms=now_ms))
