"""Tenants: opened by an admin with their ledger accounts, given credits."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Tenant
from broker.errors import ConflictError, RefusedError
from broker.market import Market
from broker.transitions import note_change, record_event

NAME_LENGTH_MAX: Final = 200
_TENANT_ID: Final = re.compile(r"[a-z][a-z0-9-]{0,50}")


class TenantNameError(RefusedError):
    """An id that no tenant can have."""

    code = "tenant.name"


def create_tenant(
    market: Market, tenant_id: str, name: str = "", *, home_site: str | None = None, actor: str | None = None
) -> Tenant:
    """Open a tenant and its accounts. Raises ConflictError where the id is taken.

    `home_site` is the site whose own customer the tenant is: with it, a round's certificate says what that site
    and its customers would have alone.
    """
    if not _TENANT_ID.fullmatch(tenant_id):
        raise TenantNameError("a tenant's id has up to 51 lower-case letters, digits and dashes, a letter first")
    now_ms = market.clock.now_ms()

    def work(session: Session) -> Tenant:
        if session.get(Tenant, tenant_id) is not None:
            raise ConflictError(f"there is a tenant {tenant_id!r} already; choose another id")
        tenant = Tenant(
            tenant_id=tenant_id,
            name=(name or tenant_id)[:NAME_LENGTH_MAX],
            created_ms=now_ms,
            home_site=home_site,
        )
        session.add(tenant)
        session.flush()
        ledger.open_tenant(session, tenant_id, now_ms)
        record_event(session, "tenant", now_ms=now_ms, after="created", tenant_id=tenant_id, actor=actor)
        return tenant

    return market.database.write("create tenant", work)


def deposit(
    session: Session,
    market: Market,
    tenant_id: str,
    amount_micros: int,
    transfer_id: str,
    *,
    actor: str | None = None,
) -> int:
    """Give a tenant credits and return its balance; the same `transfer_id` gives them once."""
    now_ms = market.clock.now_ms()
    if ledger.deposit(session, tenant_id, amount_micros, transfer_id, now_ms):
        record_event(
            session,
            "tenant",
            now_ms=now_ms,
            after="deposit",
            tenant_id=tenant_id,
            detail=f"{amount_micros} micros",
            actor=actor,
        )
        note_change(session)
    session.flush()
    return ledger.balance_micros(session, ledger.tenant_account(tenant_id))


def add_equity(
    session: Session, market: Market, amount_micros: int, transfer_id: str, *, actor: str | None = None
) -> int:
    """Give the market money of its own, from which uplift is paid, and return its balance; once for a `transfer_id`."""
    now_ms = market.clock.now_ms()
    if ledger.fund_equity(session, amount_micros, transfer_id, now_ms, memo="by its admin"):
        record_event(session, "market", now_ms=now_ms, after="equity", detail=f"{amount_micros} micros", actor=actor)
        note_change(session)
    session.flush()
    return ledger.balance_micros(session, ledger.EQUITY)
