"""What an admin sees of the money: tenants with their balances, the market's accounts, the ledger's sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from broker.database.tables import Account, Job, Tenant, Transfer
from broker.ledger import AccountKind, held_account, sum_micros, tenant_account
from broker.transitions import FINAL_JOB_STATES

TENANTS_PER_PAGE: Final = 100
TRANSFERS_MAX: Final = 50


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant, what it may spend, and what its open jobs have set aside."""

    tenant_id: str
    name: str
    balance_micros: int
    held_micros: int
    open_jobs: int
    created_ms: int


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The ledger in one look: `sum_micros` is nought in a sound market."""

    sum_micros: int
    by_kind: dict[str, int]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Balance:
    """What one tenant may spend and has set aside."""

    free_micros: int
    held_micros: int


def list_tenants(session: Session, *, after: str = "", limit: int = TENANTS_PER_PAGE) -> list[TenantRow]:
    """Return `limit` tenants by id, and one more where there is a next page."""
    free, held = aliased(Account), aliased(Account)
    rows = session.execute(
        select(Tenant, free.balance_micros, held.balance_micros)
        .join(free, (free.owner == Tenant.tenant_id) & (free.kind == AccountKind.TENANT), isouter=True)
        .join(held, (held.owner == Tenant.tenant_id) & (held.kind == AccountKind.HELD), isouter=True)
        .where(Tenant.tenant_id > after)
        .order_by(Tenant.tenant_id)
        .limit(limit + 1)
    ).all()
    open_jobs = dict(
        session.execute(
            select(Job.tenant_id, func.count())
            .where(Job.tenant_id.in_([row[0].tenant_id for row in rows]), Job.state.not_in(sorted(FINAL_JOB_STATES)))
            .group_by(Job.tenant_id)
        ).all()
    )
    return [
        TenantRow(
            tenant_id=tenant.tenant_id,
            name=tenant.name,
            balance_micros=balance or 0,
            held_micros=set_aside or 0,
            open_jobs=open_jobs.get(tenant.tenant_id, 0),
            created_ms=tenant.created_ms,
        )
        for tenant, balance, set_aside in rows
    ]


def tenant_balance(session: Session, tenant_id: str) -> Balance:
    """Return what a tenant may spend and has set aside."""
    names = [tenant_account(tenant_id), held_account(tenant_id)]
    rows = session.execute(select(Account.account_id, Account.balance_micros).where(Account.account_id.in_(names)))
    found = dict(rows.all())
    return Balance(free_micros=found.get(names[0], 0), held_micros=found.get(names[1], 0))


def read_ledger(session: Session) -> LedgerView:
    """Return the sum of all balances, what each kind of account holds, and the newest transfers."""
    kinds = session.execute(select(Account.kind, func.sum(Account.balance_micros)).group_by(Account.kind))
    newest = select(Transfer).order_by(Transfer.created_ms.desc(), Transfer.transfer_id.desc()).limit(TRANSFERS_MAX)
    return LedgerView(
        sum_micros=sum_micros(session),
        by_kind={kind: int(total) for kind, total in sorted(kinds.all())},
        transfers=tuple(session.scalars(newest)),
    )
