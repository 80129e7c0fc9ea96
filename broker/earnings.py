"""What a site's own agent is told of its money: earned in the market, spent by its customers, and what alone would have been worth.

*Alone* is what rounds' economics find (`broker.rounds.economics`): what the site's GPUs and its own customers' jobs would have been worth
in a market of their own, beside what they have in the federation. Each round counts for the time until the next one.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.certificates import RoundCertificate
from broker.database.tables import Job, Lease, Round, Tenant, Transfer, UsageReport
from broker.ledger import TransferKind, balance_micros, site_account
from broker.market import Market
from sites.protocol import SiteStatement

# A market in which nothing changes holds no rounds: what the last one found is not taken to hold for longer.
ROUND_MS_MAX: Final = 3_600_000
# The newest rounds of a period that are read; a longer period is then only partly covered, and the statement says how far.
ROUNDS_READ_MAX: Final = 5_000


def site_statement(session: Session, market: Market, site_id: str, *, days: int) -> SiteStatement:
    """Return what a site earned and its customers spent in the last days."""
    now_ms = market.clock.now_ms()
    since_ms = now_ms - days * 86_400_000
    at_site = Lease.site_id == site_id, UsageReport.received_ms >= since_ms
    gpu_ms, payout, revenue, leases = session.execute(
        select(
            func.coalesce(func.sum(UsageReport.gpu_milliseconds), 0),
            func.coalesce(func.sum(UsageReport.payout_micros), 0),
            func.coalesce(func.sum(UsageReport.link_revenue_micros), 0),
            func.count(func.distinct(UsageReport.lease_id)),
        )
        .join(Lease, Lease.lease_id == UsageReport.lease_id)
        .where(*at_site)
    ).one()
    refunded = session.scalar(
        select(func.coalesce(func.sum(Transfer.amount_micros), 0)).where(
            Transfer.debit_account == site_account(site_id),
            Transfer.kind == TransferKind.REFUND,
            Transfer.created_ms >= since_ms,
        )
    )
    spent = session.scalar(
        select(func.coalesce(func.sum(UsageReport.charge_micros), 0))
        .join(Lease, Lease.lease_id == UsageReport.lease_id)
        .join(Job, Job.job_id == Lease.job_id)
        .join(Tenant, Tenant.tenant_id == Job.tenant_id)
        .where(Tenant.home_site == site_id, UsageReport.received_ms >= since_ms)
    )
    worth = _worth(session, site_id, since_ms, now_ms)
    return SiteStatement(
        site_id=site_id,
        since_ms=since_ms,
        until_ms=now_ms,
        leases=int(leases),
        gpu_milliseconds=int(gpu_ms),
        payout_micros=int(payout),
        link_revenue_micros=int(revenue),
        refunded_micros=int(refunded or 0),
        spent_by_customers_micros=int(spent or 0),
        balance_micros=balance_micros(session, site_account(site_id)),
        **worth,
    )


def _worth(session: Session, site_id: str, since_ms: int, now_ms: int) -> dict[str, int]:
    """Return what a site and its customers had, and would have had alone, over the rounds for which that is known."""
    rows = session.execute(
        select(Round.taken_ms, RoundCertificate.economics, RoundCertificate.sites)
        .outerjoin(RoundCertificate, RoundCertificate.round_number == Round.round_number)
        .where(Round.taken_ms >= since_ms)
        .order_by(Round.round_number.desc())
        .limit(ROUNDS_READ_MAX)
    ).all()[::-1]
    covered_ms = federated = alone = rounds = 0
    lasts = itertools.pairwise([*(row[0] for row in rows), now_ms])
    for (_, economics, text), (taken_ms, next_ms) in zip(rows, lasts, strict=True):
        if economics != "done":
            continue
        documents: list[dict[str, Any]] = json.loads(text)
        found = next((row for row in documents if row["site_id"] == site_id), None)
        if found is None:
            continue
        lasted_ms = max(0, min(next_ms - taken_ms, ROUND_MS_MAX))
        rounds += 1
        covered_ms += lasted_ms
        federated += found["federated_micros_per_hour"] * lasted_ms
        alone += found["alone_micros_per_hour"] * lasted_ms
    return {
        "rounds_known": rounds,
        "covered_ms": covered_ms,
        "worth_federated_micros": federated // 3_600_000,
        "worth_alone_micros": alone // 3_600_000,
    }
