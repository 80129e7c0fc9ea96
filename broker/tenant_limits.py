"""What a tenant may spend in an hour over all of its jobs, and how many GPUs the market owes it at least.

Both are rows of a round's linear programme (`broker.allocation`): the budget is a constraint with a price of its own,
the floor a promise whose breach costs the market HANSA_FLOOR_PENALTY_MICROS_PER_GPU_HOUR. A tenant sets its budget, an
admin both. A running term is never cut short by either: a budget below what runs lets nothing new start.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from broker.allocation.snapshot import TenantState
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import Job, Placement, Tenant
from broker.errors import NotFoundError
from broker.market import Market
from broker.transitions import note_change, record_event
from pricing.money import format_credits

FLOOR_GPUS_MAX: Final = 1_000_000


def set_budget(
    session: Session, market: Market, tenant_id: str, budget_micros_per_hour: int | None, *, actor: str | None = None
) -> None:
    """Bound what all jobs of a tenant may cost together, in micro-credits per hour; None: no bound.

    Raises NotFoundError where there is no such tenant.
    """
    tenant = _tenant(session, tenant_id)
    if tenant.budget_micros_per_hour == budget_micros_per_hour:
        return
    tenant.budget_micros_per_hour = budget_micros_per_hour
    said = "none" if budget_micros_per_hour is None else f"{format_credits(budget_micros_per_hour)} credits an hour"
    _record(session, market, tenant_id, what="budget", detail=said, actor=actor)


def set_floor(session: Session, market: Market, tenant_id: str, floor_gpus: int, *, actor: str | None = None) -> None:
    """Promise a tenant GPUs, as far as the market's penalty makes it worth while; 0: none. Raises NotFoundError."""
    assert 0 <= floor_gpus <= FLOOR_GPUS_MAX, "checked where it is read"
    tenant = _tenant(session, tenant_id)
    if (tenant.floor_gpus or 0) == floor_gpus:
        return
    tenant.floor_gpus = floor_gpus or None
    _record(session, market, tenant_id, what="floor", detail=f"{floor_gpus} GPUs", actor=actor)


def limited_tenants(session: Session) -> tuple[TenantState, ...]:
    """Return the tenants that have a budget or a floor, by id."""
    rows = session.scalars(
        select(Tenant)
        .where(or_(Tenant.budget_micros_per_hour.is_not(None), Tenant.floor_gpus.is_not(None)))
        .order_by(Tenant.tenant_id)
    )
    return tuple(
        TenantState(
            tenant_id=row.tenant_id, budget_micros_per_hour=row.budget_micros_per_hour, floor_gpus=row.floor_gpus
        )
        for row in rows
    )


def budget_left_micros_per_hour(session: Session, tenant_id: str) -> int | None:
    """Return what a tenant's budget leaves beside its live placements, at least 0; None where it has none."""
    tenant = session.get(Tenant, tenant_id)
    if tenant is None or tenant.budget_micros_per_hour is None:
        return None
    return max(0, tenant.budget_micros_per_hour - spending_micros_per_hour(session, tenant_id))


def budgets_left(session: Session) -> dict[str, int]:
    """Return for each tenant with a budget what it leaves beside the live placements, below 0 where it was lowered."""
    budgets = select(Tenant.tenant_id, Tenant.budget_micros_per_hour).where(Tenant.budget_micros_per_hour.is_not(None))
    left = {tenant_id: most or 0 for tenant_id, most in session.execute(budgets)}
    # Added up here: grouped by tenant, SQLite would go through every job that ever was.
    standing = (
        select(Job.tenant_id, Placement.charge_micros_per_hour)
        .join(Job, Job.job_id == Placement.job_id)
        .where(PLACEMENT_STANDS)
    )
    for tenant_id, charge in session.execute(standing):
        if tenant_id in left:
            left[tenant_id] -= charge
    return left


def spending_micros_per_hour(session: Session, tenant_id: str) -> int:
    """Return what the live placements of a tenant cost together, in micro-credits per hour."""
    live = (
        select(func.coalesce(func.sum(Placement.charge_micros_per_hour), 0))
        .join(Job, Job.job_id == Placement.job_id)
        .where(Job.tenant_id == tenant_id, PLACEMENT_STANDS)
    )
    return int(session.scalar(live) or 0)


def _tenant(session: Session, tenant_id: str) -> Tenant:
    tenant = session.get(Tenant, tenant_id)
    if tenant is None:
        raise NotFoundError(f"there is no tenant {tenant_id!r}")
    return tenant


def _record(session: Session, market: Market, tenant_id: str, *, what: str, detail: str, actor: str | None) -> None:
    record_event(
        session, "tenant", now_ms=market.clock.now_ms(), after=what, tenant_id=tenant_id, detail=detail, actor=actor
    )
    note_change(session)
