"""Amends to tenants: money that goes back to an account, by new transfers; what was posted stays as it is.

refund       site -> tenant      work that a site was paid for and lost
compensate   equity -> tenant    what a move inside a term destroyed
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from broker.database.tables import Lease
from broker.ledger.accounts import EQUITY, site_account, tenant_account
from broker.ledger.transfers import Movement, TransferKind, apply, checked_amount


def refund(session: Session, lease: Lease, tenant_id: str, amount_micros: int, *, now_ms: int, memo: str) -> bool:
    """Give a tenant back what a lease's site was paid for lost work, once for a lease; return whether money moved now."""
    checked_amount(amount_micros)
    return apply(
        session,
        Movement(
            transfer_id=f"{TransferKind.REFUND}/{lease.lease_id}",
            kind=TransferKind.REFUND,
            debit_account=site_account(lease.site_id),
            credit_account=tenant_account(tenant_id),
            amount_micros=amount_micros,
            job_id=lease.job_id,
            lease_id=lease.lease_id,
            memo=memo,
        ),
        now_ms,
    )


def compensate(
    session: Session, job_id: str, tenant_id: str, amount_micros: int, *, key: str, now_ms: int, memo: str
) -> bool:
    """Pay a tenant out of the market's own money, once for a key; return whether money moved now."""
    checked_amount(amount_micros)
    return apply(
        session,
        Movement(
            transfer_id=f"{TransferKind.COMPENSATE}/{key}",
            kind=TransferKind.COMPENSATE,
            debit_account=EQUITY,
            credit_account=tenant_account(tenant_id),
            amount_micros=amount_micros,
            job_id=job_id,
            memo=memo,
        ),
        now_ms,
    )
